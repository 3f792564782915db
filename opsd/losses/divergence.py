"""The divergence between student and teacher at every scored token, as the settings describe it.

Knows signals, supports and the table of divergences; nothing of logits, token weights, prompts, teachers or trainers.

Shapes: N scored tokens of a micro-batch · R of them in a block · V vocabulary · K ids of a support.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from opsd.errors import ConfigError, not_one_of
from opsd.losses.estimators import optimal_baseline
from opsd.losses.pointwise import (
    DIVERGENCES,
    FLOOR,
    PointwiseDivergence,
    PointwiseTerms,
    clip_terms,
    divergence_of_beta,
    forward_kl,
    log_ratio,
)
from opsd.losses.supports import (
    SUPPORTS,
    TAILS,
    choose,
    gather,
    log_rest,
    log_rest_of_listed,
    scatter_to_vocab,
    with_tail,
)
from opsd.signals import TOP_K, TeacherSignal, TopKSignal

BASELINES = ("optimal", "none")


class DivergenceOutput(NamedTuple):
    """The divergence of a block of tokens.

    Args:
        value_R: nats per token.
        grad_log_s_RV: g = ∂value/∂log s(v), up to a multiple of s(v); the gradient with respect to the logits is
            g - s·Σ g.
        metrics: (R,) tensors by name.
    """

    value_R: Tensor
    grad_log_s_RV: Tensor
    metrics: dict[str, Tensor]


class _Compared(NamedTuple):
    """Log-probabilities of the entries that are compared: the vocabulary, or a support and its tail."""

    log_s: Tensor
    s: Tensor
    log_t: Tensor
    ids_RK: Tensor | None = None
    log_rest_s: Tensor | None = None


def sampled_logprobs(teacher: Tensor | TopKSignal, token_ids_R: Tensor) -> Tensor:
    """Return the teacher's log-probabilities of the sampled tokens, (R,)."""
    if isinstance(teacher, TopKSignal):
        return teacher.sampled_logprobs_N
    return teacher.gather(-1, token_ids_R[:, None])[:, 0]


@dataclass
class DivergenceSettings:
    """Settings of an OPSDConfig that choose what is compared at each token.

    Example:
        >>> OPSDConfig("runs/first", beta=0.0, support="teacher_top_k", support_k=20)
    """

    beta: float = field(
        default=1.0,
        metadata={
            "help": "Divergence as in GKD (arXiv 2306.13649), in [0, 1]: 1 is the reverse KL(student ‖ teacher), 0 the "
            "forward KL(teacher ‖ student), between them the generalised JSD."
        },
    )
    temperature: float = field(
        default=1.0,
        metadata={"help": "Divides the logits of both models, in sampling and in the divergence; above 0."},
    )
    support: str = field(
        default="full",
        metadata={
            "help": "Vocabulary entries that are compared: full (all of them), teacher_top_k, student_top_k, union "
            "(both), or sampled (the sampled token, as a policy gradient)."
        },
    )
    support_k: int = field(
        default=TOP_K,
        metadata={
            "help": "Tokens per side of a top-k support, at least 1 (SDPO, arXiv 2601.20802: 100; SDFT's recipe: 20)."
        },
    )
    tail: str = field(
        default="bucket",
        metadata={
            "help": "Probability mass outside a top-k support: bucket (one more entry), renormalise (both sides are "
            "divided by their mass on the support), or none (left out)."
        },
    )
    force_tail: bool = field(
        default=False,
        metadata={"help": "Accept tail none where the loss falls when the student moves mass outside the support."},
    )
    entry_clip: float | None = field(
        default=None,
        metadata={
            "help": "Largest value of a vocabulary entry's term in nats, without gradient above it (OPSD, arXiv "
            "2601.18734: 0.05). Unset: no clip."
        },
    )
    token_clip: float | None = field(
        default=None,
        metadata={"help": "Largest divergence of a token in nats, without gradient above it. Unset: no clip."},
    )
    entropy_gate: float | None = field(
        default=None,
        metadata={
            "help": "Entropy of the teacher in nats above which the forward KL is added to the reverse KL (EOPD, arXiv "
            "2603.07079). Unset: never."
        },
    )
    baseline: str = field(
        default="optimal",
        metadata={"help": "Baseline of the policy gradient with support sampled: optimal (least variance), or none."},
    )
    divergence: str | None = field(
        default=None,
        metadata={
            "help": "Name of a divergence in losses.pointwise.DIVERGENCES: forward_kl, reverse_kl, generalised_jsd, or "
            "one that you added. Unset: the one that beta chooses."
        },
    )


@dataclass
class Divergence(DivergenceSettings):
    """A divergence with its support, tail, clips and temperature; the fields are those of `DivergenceSettings`.

    Settings are checked when it is made. Make another with `dataclasses.replace` rather than assigning to a field.

    Raises:
        ConfigError: a setting outside its range, or a combination that cannot work.

    Example:
        >>> Divergence(beta=0.0, support="teacher_top_k", support_k=20).describe()
        "forward KL(teacher ‖ student), over the teacher's 20 likeliest tokens, one bucket for the rest"
    """

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_combinations()

    # ---- which divergence --------------------------------------------------------------------------------------

    @property
    def kind(self) -> PointwiseDivergence:
        """The row of the table: that of `divergence`, or the one that `beta` chooses."""
        return DIVERGENCES[divergence_of_beta(self.beta) if self.divergence is None else self.divergence]

    @property
    def chosen_by(self) -> str:
        """The setting that chose the divergence, for messages."""
        return f"beta is {self.beta:g}" if self.divergence is None else f"divergence is {self.divergence!r}"

    @property
    def set_reverse_kl(self) -> str:
        """How to choose the reverse KL instead, for messages."""
        return "Set beta to 1" if self.divergence is None else "Set divergence to 'reverse_kl'"

    @property
    def _is_top_k(self) -> bool:
        return self.support not in ("full", "sampled")

    # ---- what is refused ---------------------------------------------------------------------------------------

    def _check_ranges(self) -> None:
        if not 0.0 <= self.beta <= 1.0:
            raise ConfigError(
                f"beta must lie between 0 and 1, and is {self.beta}. It interpolates from the forward KL (0) to the "
                "reverse KL (1). Use 1 for reverse KL, 0 for forward KL, 0.5 for the Jensen-Shannon divergence."
            )
        if not self.temperature > 0.0:
            raise ConfigError(
                f"temperature must be above 0, and is {self.temperature}. Logits are divided by it. Use 1 to train "
                "on the distributions as they are."
            )
        choices = {"support": SUPPORTS, "tail": TAILS, "baseline": BASELINES}
        if self.divergence is not None:
            choices["divergence"] = DIVERGENCES
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(not_one_of(name, getattr(self, name), known))
        if self.support_k < 1:
            raise ConfigError(f"support_k must be at least 1, and is {self.support_k}. It is the size of the support.")
        for name in ("entry_clip", "token_clip", "entropy_gate"):
            value = getattr(self, name)
            if value is not None and not value > 0.0:
                raise ConfigError(f"{name} must be above 0 nats, and is {value}. Leave it out to do without.")

    def _check_combinations(self) -> None:
        if self.kind.uses_beta and not 0.0 < self.beta < 1.0:
            raise ConfigError(
                f"divergence {self.divergence!r} needs a beta between 0 and 1, ends excluded, and beta is "
                f"{self.beta:g}. It is not defined, or 0, at the ends. Set beta to 0.5, or choose another divergence."
            )
        if self.entropy_gate is not None and not self.kind.takes_entropy_gate:
            raise ConfigError(
                f"entropy_gate adds the forward KL to the reverse KL where the teacher is uncertain, and "
                f"{self.chosen_by}. {self.set_reverse_kl} (reverse KL), or leave entropy_gate out."
            )
        if self.support == "sampled":
            self._check_sampled()
        elif self._is_top_k and self.tail == "none" and self.kind.falls_off_support and not self.force_tail:
            raise ConfigError(
                f"support {self.support!r} with tail 'none' and {self.kind.describe(self.beta)} is refused: the loss "
                "falls when the student moves its mass outside the support, where nothing is compared, and training "
                "does move it there (verl PR 5041). Use tail 'bucket' or 'renormalise', or set force_tail to train it "
                "anyway."
            )

    def _check_sampled(self) -> None:
        if not self.kind.has_sampled_estimator:
            raise ConfigError(
                f"support 'sampled' estimates the reverse KL from the student's own tokens, and {self.chosen_by}. "
                f"Other divergences are expectations over tokens that the student did not sample. "
                f"{self.set_reverse_kl}, or use another support."
            )
        for name in ("entry_clip", "entropy_gate"):
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"{name} needs the whole distribution, and support 'sampled' compares one token of it. Use "
                    "token_clip, or another support."
                )

    def check_signal(self, signal: TeacherSignal) -> None:
        """Refuse a signal that lacks the log-probabilities that this divergence compares; raises ConfigError."""
        if isinstance(signal, TopKSignal):
            self.check_listed()

    def check_listed(self) -> None:
        """Refuse a teacher that lists its likeliest tokens only, where this divergence needs more; raises likewise."""
        if self.support not in ("teacher_top_k", "sampled"):
            raise ConfigError(
                f"support {self.support!r} needs the teacher's whole distribution, and this teacher lists its "
                "likeliest tokens only. Use support 'teacher_top_k' or 'sampled', or a teacher that runs here."
            )
        if self.temperature != 1.0 and not (self._is_top_k and self.tail == "renormalise"):
            raise ConfigError(
                f"temperature is {self.temperature:g}, and this teacher lists its likeliest tokens at temperature 1: "
                "the mass of the rest of the vocabulary at another one cannot be known. Set temperature to 1, or "
                "tail to 'renormalise'."
            )

    # ---- descriptions ------------------------------------------------------------------------------------------

    def describe(self) -> str:
        """Name the divergence and its settings, as logs and reports write them."""
        parts = [self.kind.describe(self.beta)]
        if self.temperature != 1.0:
            parts[0] += f" at temperature {self.temperature:g}"
        if self.support != "full":
            parts.append("over " + SUPPORTS[self.support].format(k=self.support_k))
        if self._is_top_k:
            parts.append(TAILS[self.tail])
        if self.support == "sampled" and self.baseline == "none":
            parts.append("no baseline")
        if self.entropy_gate is not None:
            parts.append(f"and the forward KL where the teacher's entropy is above {self.entropy_gate:g} nats")
        if self.entry_clip is not None:
            parts.append(f"each entry at most {self.entry_clip:g} nats")
        if self.token_clip is not None:
            parts.append(f"each token at most {self.token_clip:g} nats")
        return ", ".join(parts)

    @property
    def formula(self) -> str:
        """The divergence as a formula: s the student, t the teacher, y the sampled token, v an entry, S the support."""
        if self.support == "sampled":
            less = "" if self.baseline == "none" else " − b"
            return f"log s(y) − log t(y),  gradient (log s(y) − log t(y){less})·∇log s(y)"
        term = self.kind.term_formula(self.beta)
        if self.entropy_gate is not None:
            term += f" + [H(t) > {self.entropy_gate:g}]·{DIVERGENCES['forward_kl'].term_formula(0.0)}"
        if self.entry_clip is not None:
            term = f"min({self.entry_clip:g}, {term})"
        text = f"{'Σ_v∈S' if self._is_top_k else 'Σ_v'} {term}"
        if self.token_clip is not None:
            text = f"min({self.token_clip:g}, {text})"
        definitions = self.kind.define(self.beta)
        return f"{text},  {definitions}" if definitions else text

    # ---- the computation ---------------------------------------------------------------------------------------

    def compare(
        self, log_s: Tensor, s: Tensor, teacher: Tensor | TopKSignal, token_ids_R: Tensor | None
    ) -> DivergenceOutput:
        """Compare student and teacher at a block of tokens.

        Args:
            log_s: (R, V) the student's log-probabilities, nats.
            s: exp(log_s).
            teacher: (R, V) the teacher's log-probabilities, or its likeliest ones.
            token_ids_R: the scored tokens; needed for support "sampled".
        """
        metrics: dict[str, Tensor] = {}
        if self.support == "sampled":
            assert token_ids_R is not None, "support 'sampled' needs the sampled tokens"
            value_R, grad_log_s_RV = self._policy_gradient(log_s, s, teacher, token_ids_R)
        else:
            compared = self._compared(log_s, s, teacher, metrics)
            terms = self._pointwise_terms(compared, metrics)
            if self.entry_clip is not None:
                terms, metrics["clipped/entries"] = clip_terms(terms, compared.s, self.entry_clip)
            value_R, grad_log_s_RV = terms.value.sum(-1), self._over_vocab(terms, compared, s)
        if self.token_clip is not None:
            clipped_R = value_R > self.token_clip
            metrics["clipped/tokens"] = clipped_R.float()
            value_R = value_R.clamp(max=self.token_clip)
            grad_log_s_RV = grad_log_s_RV.masked_fill(clipped_R[:, None], 0.0)
        return DivergenceOutput(value_R, grad_log_s_RV, metrics)

    def _pointwise_terms(self, compared: _Compared, metrics: dict[str, Tensor]) -> PointwiseTerms:
        log_s, s, log_t = compared[:3]
        terms = self.kind.terms(log_s, s, log_t, self.beta)
        if self.entropy_gate is None:
            return terms
        entropy_R = -(log_t.exp() * log_t.clamp(min=FLOOR)).sum(-1)
        gate_R1 = (entropy_R > self.entropy_gate).to(s.dtype)[:, None]
        metrics["gated"] = gate_R1[:, 0]
        forward = forward_kl(log_s, s, log_t)
        return PointwiseTerms(
            terms.value + gate_R1 * forward.value,
            terms.grad_log_s + gate_R1 * forward.grad_log_s,
            terms.shift + gate_R1 * forward.shift,
        )

    def _compared(
        self, log_s: Tensor, s: Tensor, teacher: Tensor | TopKSignal, metrics: dict[str, Tensor]
    ) -> _Compared:
        """Return the entries to compare, and record how much mass a support holds."""
        if not self._is_top_k:
            assert isinstance(teacher, Tensor)
            return _Compared(log_s, s, teacher)
        if isinstance(teacher, TopKSignal):
            used_RK = teacher.logprobs_NK > -torch.inf
            ids_RK = torch.where(used_RK, teacher.ids_NK, teacher.ids_NK[:, :1])
            log_t = teacher.logprobs_NK.to(log_s.dtype)
            log_rest_t = log_rest_of_listed(log_t)
            log_t = log_t / self.temperature
        else:
            ids_RK, used_RK = choose(self.support, self.support_k, log_s, teacher)
            log_t = gather(teacher, ids_RK, used_RK)
            log_rest_t = log_rest(teacher.exp(), ids_RK)
        log_rest_s = log_rest(s, ids_RK)
        metrics["support/student"], metrics["support/teacher"] = (1 - x.exp()[:, 0] for x in (log_rest_s, log_rest_t))
        compared_s = with_tail(gather(log_s, ids_RK, used_RK), log_rest_s, self.tail)
        compared_t = with_tail(log_t, log_rest_t, self.tail)
        return _Compared(compared_s, compared_s.exp(), compared_t, ids_RK, log_rest_s)

    def _over_vocab(self, terms: PointwiseTerms, compared: _Compared, s: Tensor) -> Tensor:
        """Return the gradient of the terms over the whole vocabulary."""
        if compared.ids_RK is None or compared.log_rest_s is None:
            return terms.grad_log_s
        return scatter_to_vocab(terms, compared.s, s, compared.ids_RK, compared.log_rest_s, self.tail)

    def _policy_gradient(
        self, log_s: Tensor, s: Tensor, teacher: Tensor | TopKSignal, token_ids_R: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return log s(y) - log t(y), and the grad_log_s whose gradient is (that - baseline)·∇log s(y)."""
        ids_R1 = token_ids_R[:, None]
        ratio_R = log_ratio(log_s.gather(-1, ids_R1)[:, 0], sampled_logprobs(teacher, token_ids_R))
        coefficient_R = ratio_R - self._baseline(log_s, s, teacher)
        grad_log_s_RV = torch.zeros_like(log_s).scatter_(-1, ids_R1, coefficient_R[:, None].to(log_s.dtype))
        return ratio_R, grad_log_s_RV

    def _baseline(self, log_s: Tensor, s: Tensor, teacher: Tensor | TopKSignal) -> Tensor | float:
        """Return the baseline; for a teacher that lists its likeliest tokens, over those and one bucket."""
        if self.baseline == "none":
            return 0.0
        over = _FULL if isinstance(teacher, Tensor) else _LISTED
        compared = over._compared(log_s, s, teacher, {})
        return optimal_baseline(compared.s, log_ratio(compared.log_s, compared.log_t))


_FULL, _LISTED = Divergence(), Divergence(support="teacher_top_k")
