"""The one table of divergences: what each entry of the vocabulary adds to a token's divergence, and its slope.

Pure functions of log-probabilities. They know nothing of logits, supports, weights or teachers.

Shapes: R tokens of a block · V entries: the vocabulary, or a support of it and its tail. s is the student, t the
teacher.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Log-probabilities below it count as it (e^-100 = 4e-44, where float32 ends). So a token's reverse KL, and the gradient
# of each of its logits, stay below 100 nats where a teacher's probability underflows, and -inf - -inf does not arise.
FLOOR = -100.0


class PointwiseTerms(NamedTuple):
    """What a divergence is made of.

    Args:
        value: (R, V) float, sums over V to the divergence in nats.
        slope: (R, V) float, s(v)·∂D/∂s(v), less `shift`·s(v). Summed over a whole distribution a multiple of s(v) adds
            nothing to the gradient with respect to the logits, slope - s·Σ slope; leaving it out makes the gradient
            exactly 0 where student and teacher are equal.
        shift: what was left out, a number or (R, 1).
    """

    value: Tensor
    grad_log_s: Tensor
    shift: float | Tensor


def pointwise_terms(log_s: Tensor, s: Tensor, log_t: Tensor, beta: float) -> PointwiseTerms:
    """Return the entries of the generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649, eq. 1), ends exact.

    Args:
        log_s: (R, V) log-probabilities of the student, nats; -inf is allowed on either side.
        s: exp(log_s).
        log_t: (R, V) log-probabilities of the teacher.
        beta: 0 forward KL(t ‖ s), 1 reverse KL(s ‖ t), between them β·KL(t ‖ m) + (1-β)·KL(s ‖ m), m = β·t + (1-β)·s.
    """
    gap = log_s.clamp(min=FLOOR) - log_t.clamp(min=FLOOR)
    if beta == 1.0:
        value = s * gap
        return PointwiseTerms(value, value, 1.0)
    t = log_t.exp()
    if beta == 0.0:
        # The slope is that of the unfloored divergence: it is bounded by itself.
        return PointwiseTerms(t * -gap, s - t, -1.0)
    log_m_over_s, log_m_over_t = _log_mixture(gap, beta)
    of_student = (1.0 - beta) * s * -log_m_over_s
    return PointwiseTerms(of_student - beta * t * log_m_over_t, of_student, 0.0)


def _log_mixture(gap: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return log(m/s) and log(m/t) from log(s/t): exact near equality, and without overflow where one side is tiny."""
    log_m_over_s = torch.log1p(beta * torch.expm1(-gap.clamp(min=0.0)))  # where s ≥ t
    log_m_over_t = torch.log1p((1.0 - beta) * torch.expm1(gap.clamp(max=0.0)))  # where s < t
    student_leads = gap >= 0
    return (
        torch.where(student_leads, log_m_over_s, log_m_over_t - gap),
        torch.where(student_leads, log_m_over_s + gap, log_m_over_t),
    )


def clip_terms(found: PointwiseTerms, s: Tensor, clip: float) -> tuple[PointwiseTerms, Tensor]:
    """Cap every entry's value (OPSD, arXiv 2601.18734: 0.05); a capped entry has no gradient.

    Terms t·log(t/s) of a forward KL are negative where t < s, and a cap takes from the positive ones only: the sum
    can then be negative, and that is no error.

    Returns:
        The capped entries, and (R,) float32: 1 for tokens with at least one capped entry.
    """
    kept = found.value <= clip
    grad_log_s = kept * (found.grad_log_s + found.shift * s) - found.shift * s
    capped = PointwiseTerms(found.value.clamp(max=clip), grad_log_s, found.shift)
    return capped, (~kept).any(-1).float()


def describe(beta: float) -> str:
    """Name the divergence and its direction."""
    if beta in (0.0, 1.0):
        return "reverse KL(student ‖ teacher)" if beta else "forward KL(teacher ‖ student)"
    return f"generalised JSD (β = {beta:g})"


def entry_formula(beta: float) -> str:
    """Return one entry of the divergence as a formula; m is the mixture of the two sides."""
    if beta == 1.0:
        return "s(v)·[log s(v) − log t(v)]"
    if beta == 0.0:
        return "t(v)·[log t(v) − log s(v)]"
    return f"{beta:g}·t(v)·[log t(v) − log m(v)] + {1 - beta:g}·s(v)·[log s(v) − log m(v)]"
