"""The divergence between student and teacher at every scored token, as the settings describe it.

The one place where settings become a loss and its words. It knows signals, supports and entries; nothing of logits,
weights of tokens, prompts, teachers or trainers.

Shapes: N scored tokens of a micro-batch · R of them in a block · V vocabulary · K ids of a support.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from opsd.errors import ConfigError, not_one_of
from opsd.losses.estimators import log_ratio, optimal_baseline
from opsd.losses.pointwise import FLOOR, PointwiseTerms, clip_terms, describe, entry_formula, pointwise_terms
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
from opsd.signals import TeacherSignal, TopKSignal

NEAR_AN_END = 0.05  # between 0 and this (or its mirror) the generalised JSD is close to 0 whatever the two models say
BASELINES = ("optimal", "none")


class DivergenceOutput(NamedTuple):
    """What a divergence finds at a block of tokens.

    Args:
        value_R: nats per token.
        grad_log_s_RV: ∂value/∂log s(v), up to a multiple of s(v); the gradient with respect to the logits is
            grad_log_s - s·Σ grad_log_s.
        metrics: (R,) tensors by name.
    """

    value_R: Tensor
    grad_log_s_RV: Tensor
    metrics: dict[str, Tensor]


class _View(NamedTuple):
    """The entries that are compared: all of them, or a support and what stands for the rest."""

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


@dataclass(frozen=True)
class Divergence:
    """The generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649, eq. 1) with its two ends made exact.

    With M = β·teacher + (1-β)·student it is β·KL(teacher‖M) + (1-β)·KL(student‖M); β = 0 is the forward
    KL(teacher‖student) and β = 1 the reverse KL(student‖teacher), of which only JSD / (β(1-β)) is the limit.

    Args:
        beta: in [0, 1].
        temperature: divides both sides' logits, > 0.
        support: what is compared; a key of `supports.SUPPORTS`.
        support_k: ids per side of a top-k support; SDPO (arXiv 2601.20802) takes 100, SDFT's recipe 20.
        tail: what becomes of the mass outside a top-k support; a key of `supports.TAILS`.
        force_tail: accept tail "none" with β > 0, whose minimum is no mass on the support at all.
        entry_clip: nats; each vocabulary entry adds at most this (OPSD, arXiv 2601.18734: 0.05). A forward KL can
            then be negative, which is no error. None does not clip.
        token_clip: nats; each token adds at most this, and has no gradient above it. None does not clip.
        entropy_gate: nats of the teacher's entropy above which the forward KL is added to the reverse KL (EOPD, arXiv
            2603.07079). None does not gate.
        baseline: what a sampled token's log-ratio is compared with in the policy gradient: "optimal", the
            number that makes the gradient vary least (`estimators.optimal_baseline`), or "none".

    Raises:
        ConfigError: a setting outside its range, or a combination that cannot work.
    """

    beta: float = 1.0
    temperature: float = 1.0
    support: str = "full"
    support_k: int = 100
    tail: str = "bucket"
    force_tail: bool = False
    entry_clip: float | None = None
    token_clip: float | None = None
    entropy_gate: float | None = None
    baseline: str = "optimal"

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_combinations()

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
        for name, known in (("support", SUPPORTS), ("tail", TAILS), ("baseline", BASELINES)):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(not_one_of(name, value, known))
        if self.support_k < 1:
            raise ConfigError(f"support_k must be at least 1, and is {self.support_k}. It is the size of the support.")
        for name in ("entry_clip", "token_clip", "entropy_gate"):
            value = getattr(self, name)
            if value is not None and not value > 0.0:
                raise ConfigError(f"{name} must be above 0 nats, and is {value}. Leave it out to do without.")

    def _check_combinations(self) -> None:
        if self.entropy_gate is not None and self.beta != 1.0:
            raise ConfigError(
                f"entropy_gate adds the forward KL to the reverse KL where the teacher is uncertain, and beta is "
                f"{self.beta:g}. Set beta to 1 (reverse KL), or leave entropy_gate out."
            )
        if self.support == "sampled":
            self._check_sampled()
        elif self._is_top_k and self.tail == "none" and self.beta > 0.0 and not self.force_tail:
            raise ConfigError(
                f"support {self.support!r} with tail 'none' and {describe(self.beta)} is refused: the loss falls "
                "when the student moves its mass outside the support, where nothing is compared, and training finds "
                "that out (verl PR 5041). Use tail 'bucket' or 'renormalise', or set force_tail to train it anyway."
            )

    def _check_sampled(self) -> None:
        if self.beta != 1.0:
            raise ConfigError(
                f"support 'sampled' estimates the reverse KL from the student's own tokens, and beta is {self.beta:g}. "
                "Other divergences are expectations over tokens that the student did not sample. Set beta to 1."
            )
        for name in ("entry_clip", "entropy_gate"):
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"{name} looks at the whole distribution, and support 'sampled' at one token of it. Use "
                    "token_clip, or another support."
                )

    def check_signal(self, signal: TeacherSignal) -> None:
        """Refuse a signal that does not know what this divergence compares.

        Raises:
            ConfigError: the teacher lists its likeliest tokens only, and more is asked of it.
        """
        if not isinstance(signal, TopKSignal):
            return
        if self.support not in ("teacher_top_k", "sampled"):
            raise ConfigError(
                f"support {self.support!r} needs the teacher's whole distribution, and this teacher lists its "
                "likeliest tokens only. Use support 'teacher_top_k' or 'sampled', or a teacher that runs here."
            )
        if self.temperature != 1.0 and not (self._is_top_k and self.tail == "renormalise"):
            raise ConfigError(
                f"temperature is {self.temperature:g}, and this teacher lists its likeliest tokens at temperature 1: "
                "what the rest of the vocabulary weighs at another one cannot be known. Set temperature to 1, or "
                "tail to 'renormalise'."
            )

    # ---- in words ----------------------------------------------------------------------------------------------

    @property
    def _is_top_k(self) -> bool:
        return self.support not in ("full", "sampled")

    def describe(self) -> str:
        """The divergence in words, as logs and reports name it."""
        said = [describe(self.beta)]
        if self.temperature != 1.0:
            said[0] += f" at temperature {self.temperature:g}"
        if self.support != "full":
            said.append("over " + SUPPORTS[self.support].format(k=self.support_k))
        if self._is_top_k:
            said.append(TAILS[self.tail])
        if self.support == "sampled" and self.baseline == "none":
            said.append("no baseline")
        if self.entropy_gate is not None:
            said.append(f"and the forward KL where the teacher's entropy is above {self.entropy_gate:g} nats")
        if self.entry_clip is not None:
            said.append(f"each entry at most {self.entry_clip:g} nats")
        if self.token_clip is not None:
            said.append(f"each token at most {self.token_clip:g} nats")
        return ", ".join(said)

    @property
    def formula(self) -> str:
        """The divergence as a formula: s the student, t the teacher, y the sampled token, v an entry, S the support."""
        if self.support == "sampled":
            less = "" if self.baseline == "none" else " − b"
            return f"log s(y) − log t(y),  gradient (log s(y) − log t(y){less})·∇log s(y)"
        entry = entry_formula(self.beta)
        if self.entropy_gate is not None:
            entry += f" + [H(t) > {self.entropy_gate:g}]·{entry_formula(0.0)}"
        if self.entry_clip is not None:
            entry = f"min({self.entry_clip:g}, {entry})"
        text = f"{'Σ_v∈S' if self._is_top_k else 'Σ_v'} {entry}"
        if self.token_clip is not None:
            text = f"min({self.token_clip:g}, {text})"
        mixture = f",  m = {self.beta:g}·t + {1 - self.beta:g}·s" if 0.0 < self.beta < 1.0 else ""
        return text + mixture

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
            view = self._view(log_s, s, teacher, metrics)
            found = self._pointwise_terms(view, metrics)
            if self.entry_clip is not None:
                found, metrics["clipped/entries"] = clip_terms(found, view.s, self.entry_clip)
            value_R, grad_log_s_RV = found.value.sum(-1), self._scatter_to_vocab(found, view, s)
        if self.token_clip is not None:
            clipped_R = value_R > self.token_clip
            metrics["clipped/tokens"] = clipped_R.float()
            value_R = value_R.clamp(max=self.token_clip)
            grad_log_s_RV = grad_log_s_RV.masked_fill(clipped_R[:, None], 0.0)
        return DivergenceOutput(value_R, grad_log_s_RV, metrics)

    def _pointwise_terms(self, view: _View, metrics: dict[str, Tensor]) -> PointwiseTerms:
        found = pointwise_terms(view.log_s, view.s, view.log_t, self.beta)
        if self.entropy_gate is None:
            return found
        entropy_R = -(view.log_t.exp() * view.log_t.clamp(min=FLOOR)).sum(-1)
        gate_R1 = (entropy_R > self.entropy_gate).to(view.s.dtype)[:, None]
        metrics["gated"] = gate_R1[:, 0]
        forward = pointwise_terms(view.log_s, view.s, view.log_t, 0.0)
        return PointwiseTerms(
            found.value + gate_R1 * forward.value,
            found.grad_log_s + gate_R1 * forward.grad_log_s,
            found.shift + gate_R1 * forward.shift,
        )

    def _view(self, log_s: Tensor, s: Tensor, teacher: Tensor | TopKSignal, metrics: dict[str, Tensor]) -> _View:
        """Return the entries to compare, and record how much mass a support holds."""
        if not self._is_top_k:
            assert isinstance(teacher, Tensor)
            return _View(log_s, s, teacher)
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
        return _View(compared_s, compared_s.exp(), compared_t, ids_RK, log_rest_s)

    def _scatter_to_vocab(self, found: PointwiseTerms, view: _View, s: Tensor) -> Tensor:
        if view.ids_RK is None or view.log_rest_s is None:
            return found.grad_log_s
        return scatter_to_vocab(found, view.s, s, view.ids_RK, view.log_rest_s, self.tail)

    def _policy_gradient(
        self, log_s: Tensor, s: Tensor, teacher: Tensor | TopKSignal, token_ids_R: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return log s(y) - log t(y), and the slope whose gradient is (that - baseline)·∇log s(y)."""
        ids_R1 = token_ids_R[:, None]
        ratio_R = log_ratio(log_s.gather(-1, ids_R1)[:, 0], sampled_logprobs(teacher, token_ids_R))
        coefficient_R = ratio_R - self._baseline(log_s, s, teacher)
        grad_log_s_RV = torch.zeros_like(log_s).scatter_(-1, ids_R1, coefficient_R[:, None].to(log_s.dtype))
        return ratio_R, grad_log_s_RV

    def _baseline(self, log_s: Tensor, s: Tensor, teacher: Tensor | TopKSignal) -> Tensor | float:
        """Return the baseline; where the teacher lists its likeliest tokens, that of its coarsening."""
        if self.baseline == "none":
            return 0.0
        view = _View(log_s, s, teacher) if isinstance(teacher, Tensor) else _COARSE._view(log_s, s, teacher, {})
        return optimal_baseline(view.s, log_ratio(view.log_s, view.log_t))


_COARSE = Divergence(support="teacher_top_k")
