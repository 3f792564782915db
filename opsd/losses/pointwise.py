"""The table of divergences: what each vocabulary entry adds to a token's divergence, and the gradient of it.

Pure functions of log-probabilities. They know nothing of logits, supports, token weights or teachers. A new divergence
is one function and one row of `DIVERGENCES`; supports, tails, clips, heads and mixtures then work with it.

Shapes: R tokens of a block · V entries: the vocabulary, or a support of it and its tail. s is the student, t the
teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

# Log-probabilities below it count as it (e^-100 = 4e-44, where float32 ends). So a token's reverse KL, and the gradient
# of each of its logits, stay below 100 nats where a teacher's probability underflows, and -inf - -inf does not arise.
FLOOR = -100.0


class PointwiseTerms(NamedTuple):
    """The terms of a divergence, one per vocabulary entry.

    The gradient with respect to the logits is g - s·Σ g with g = `grad_log_s`. Summed over a whole distribution, a
    multiple of s in g cancels; keeping it out of `grad_log_s`, in `shift`, makes the gradient exactly 0 where student
    and teacher are equal.

    Args:
        value: (R, V) float, nats; sums over V to the divergence.
        grad_log_s: (R, V) float, ∂divergence/∂log s(v), less `shift`·s(v).
        shift: the multiple of s(v) that was left out, a number or (R, 1).
    """

    value: Tensor
    grad_log_s: Tensor
    shift: float | Tensor = 0.0


# (log_s, s, log_t, beta) -> terms. log_s and log_t: (R, V) log-probabilities in nats; s = exp(log_s). Either can be
# -inf, and both are at entries of a support that are not used: terms must be finite, and 0 where both are -inf.
TermsFunction: TypeAlias = Callable[[Tensor, Tensor, Tensor, float], PointwiseTerms]


def log_ratio(log_s: Tensor, log_t: Tensor) -> Tensor:
    """Return log s - log t in nats, both floored, so that it is finite."""
    return log_s.clamp(min=FLOOR) - log_t.clamp(min=FLOOR)


def reverse_kl(log_s: Tensor, s: Tensor, log_t: Tensor, beta: float = 1.0) -> PointwiseTerms:
    """Return the terms of KL(s ‖ t)."""
    value = s * log_ratio(log_s, log_t)
    return PointwiseTerms(value, value, shift=1.0)


def forward_kl(log_s: Tensor, s: Tensor, log_t: Tensor, beta: float = 0.0) -> PointwiseTerms:
    """Return the terms of KL(t ‖ s); the gradient is that of the divergence without a floor, which is bounded."""
    t = log_t.exp()
    return PointwiseTerms(t * -log_ratio(log_s, log_t), s - t, shift=-1.0)


def generalised_jsd(log_s: Tensor, s: Tensor, log_t: Tensor, beta: float) -> PointwiseTerms:
    """Return the terms of β·KL(t ‖ m) + (1-β)·KL(s ‖ m), m = β·t + (1-β)·s (GKD, arXiv 2306.13649, eq. 1)."""
    log_m_over_s, log_m_over_t = _log_mixture(log_ratio(log_s, log_t), beta)
    of_student = (1.0 - beta) * s * -log_m_over_s
    return PointwiseTerms(of_student - beta * log_t.exp() * log_m_over_t, of_student)


def _log_mixture(gap: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return log(m/s) and log(m/t) from log(s/t): exact near equality, and without overflow where one side is tiny."""
    log_m_over_s = torch.log1p(beta * torch.expm1(-gap.clamp(min=0.0)))  # where s ≥ t
    log_m_over_t = torch.log1p((1.0 - beta) * torch.expm1(gap.clamp(max=0.0)))  # where s < t
    student_leads = gap >= 0
    return (
        torch.where(student_leads, log_m_over_s, log_m_over_t - gap),
        torch.where(student_leads, log_m_over_s + gap, log_m_over_t),
    )


@dataclass(frozen=True)
class PointwiseDivergence:
    """A row of the table of divergences.

    Args:
        terms: (log_s, s, log_t, beta) -> PointwiseTerms.
        description: the name and its direction, as logs and reports write it; `{beta:g}` is filled in.
        formula: one term as text; `{beta:g}` and `{rest:g}`, which is 1 - beta, are filled in.
        definitions: what else the formula uses, in the same way.
        uses_beta: whether `terms` depends on beta, which must then lie strictly between 0 and 1.
        vanishes_near_ends: whether value and gradient go to 0 with beta near 0 or 1; such a beta gets a warning.
        falls_off_support: whether the sum over a support alone falls when the student moves mass outside it; tail
            "none" is then refused unless it is forced.
        has_sampled_estimator: whether log s(y) - log t(y) of a sampled token estimates it, as support "sampled" and
            `reward_to_go` assume.
        takes_entropy_gate: whether `entropy_gate` may add the forward KL to it.

    Example:
        Add a divergence, the squared Hellinger distance, and train on it with `OPSDConfig(divergence="hellinger")`::

            from opsd.losses.pointwise import DIVERGENCES, PointwiseDivergence, PointwiseTerms

            def hellinger(log_s, s, log_t, beta):
                t, root = log_t.exp(), (0.5 * (log_s + log_t)).exp()
                return PointwiseTerms(0.5 * (s + t) - root, 0.5 * (s - root))

            DIVERGENCES["hellinger"] = PointwiseDivergence(
                hellinger, "squared Hellinger distance", "½·[√s(v) − √t(v)]²"
            )
    """

    terms: TermsFunction
    description: str
    formula: str
    definitions: str = ""
    uses_beta: bool = False
    vanishes_near_ends: bool = False
    falls_off_support: bool = True
    has_sampled_estimator: bool = False
    takes_entropy_gate: bool = False

    def describe(self, beta: float) -> str:
        """Return name and direction."""
        return self.description.format(beta=beta)

    def name(self, beta: float) -> str:
        """Return the name alone, such as "reverse KL"."""
        return self.describe(beta).partition("(")[0].strip()

    def term_formula(self, beta: float) -> str:
        """Return the formula of one term."""
        return self.formula.format(beta=beta, rest=1.0 - beta)

    def define(self, beta: float) -> str:
        """Return the definitions that the formula needs."""
        return self.definitions.format(beta=beta, rest=1.0 - beta)


# To add a divergence, add a row: here, or from your own code before OPSDConfig is made (PointwiseDivergence has an
# example). `terms` gives value and gradient in closed form, because the loss is computed without autograd; compare both
# with a float64 definition, as tests/test_own_divergence.py does.
DIVERGENCES: dict[str, PointwiseDivergence] = {
    "reverse_kl": PointwiseDivergence(
        reverse_kl,
        "reverse KL(student ‖ teacher)",
        "s(v)·[log s(v) − log t(v)]",
        has_sampled_estimator=True,
        takes_entropy_gate=True,
    ),
    "forward_kl": PointwiseDivergence(
        forward_kl, "forward KL(teacher ‖ student)", "t(v)·[log t(v) − log s(v)]", falls_off_support=False
    ),
    "generalised_jsd": PointwiseDivergence(
        generalised_jsd,
        "generalised JSD (β = {beta:g})",
        "{beta:g}·t(v)·[log t(v) − log m(v)] + {rest:g}·s(v)·[log s(v) − log m(v)]",
        definitions="m = {beta:g}·t + {rest:g}·s",
        uses_beta=True,
        vanishes_near_ends=True,
    ),
}


def divergence_of_beta(beta: float) -> str:
    """Return the divergence that GKD's `beta` chooses: an exact KL at each end, the generalised JSD between them."""
    if beta == 1.0:
        return "reverse_kl"
    return "forward_kl" if beta == 0.0 else "generalised_jsd"


def clip_terms(terms: PointwiseTerms, s: Tensor, clip: float) -> tuple[PointwiseTerms, Tensor]:
    """Cap the value of every term (OPSD, arXiv 2601.18734: 0.05); a capped term has no gradient.

    Terms t·log(t/s) of a forward KL are negative where t < s, and a cap lowers only the positive ones: the sum can then
    be negative, which is correct.

    Args:
        terms: the terms.
        s: (R, V) the student's probabilities.
        clip: nats.

    Returns:
        The capped terms, and (R,) float32: 1 for tokens with at least one capped term.
    """
    kept = terms.value <= clip
    grad_log_s = kept * (terms.grad_log_s + terms.shift * s) - terms.shift * s
    return PointwiseTerms(terms.value.clamp(max=clip), grad_log_s, terms.shift), (~kept).any(-1).float()
