"""The objective of a run: the divergence, which tokens count for how much, and what holds the student back.

The one place that turns settings into a loss, and the one entry point of training. It knows signals and tensors;
nothing of rollouts, prompts, teachers or trainers.

Shapes: N scored tokens of a micro-batch (packed) · D hidden width.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._triton import has_triton

from opsd.errors import ConfigError, not_one_of
from opsd.losses.divergence import Divergence
from opsd.losses.estimators import ESTIMATORS, FUTURES, discounted_reward_to_go, mean_reward_to_go
from opsd.losses.kernel import Kernel
from opsd.losses.pointwise import log_ratio
from opsd.losses.rule import Tokens, TrainingRule, compiled
from opsd.losses.token_weights import contrastive, keep_top_fraction
from opsd.models.head import Head
from opsd.signals import DenseSignal, HiddenSignal, RoutedSignal, TeacherSignal

KEEP_BY = ("entropy", "disagreement")


@dataclass(frozen=True)
class LossOutput:
    """What the objective returns.

    Args:
        loss: scalar with gradient to the student, Σ weight_N · divergence_N and what else the objective adds.
        divergence_N: float32, nats per token, detached; 0 where a token has no weight.
        entropy_N: float32, the student's entropy in nats, detached.
        metrics: what else is logged, float32 (N,) by name, detached.
        statistics_seconds: what the pass without gradient took, that weights which rank tokens need first.
    """

    loss: Tensor
    divergence_N: Tensor
    entropy_N: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    statistics_seconds: float = 0.0


@dataclass(frozen=True)
class Objective:
    """What training minimises.

    Args:
        divergence: what is compared at each token.
        keep_fraction: share of each rollout's tokens to train on, in (0, 1] (TIP, arXiv 2604.14084).
        keep_by: which to keep: the highest student "entropy", or "disagreement", the divergence.
        reward_to_go: what a token pays for those after it, a key of `estimators.FUTURES`: with support "sampled" and
            "discounted" Thinking Machines' on-policy distillation, with full support and "mean" MiniLLM's.
        discount: of "discounted", per token, in (0, 1].
        importance_clip: largest ratio of trainer's to sampler's probability, where rollouts carry the sampler's.
        ref_kl_coef: weight of KL(student ‖ anchor); the anchor is the student at step 0, without context.
        loss_budget_mb: memory for a chunk's logits; None chooses by device.
        recompute_loss: keep no gradient of the head between forward and backward, at half as many products again.
        compile_loss: fuse what lies between the products with torch.compile; None does so on a GPU that has Triton.

    Raises:
        ConfigError: a setting outside its range, or a combination that cannot work.
    """

    divergence: Divergence = field(default_factory=Divergence)
    keep_fraction: float = 1.0
    keep_by: str = "entropy"
    reward_to_go: str = "none"
    discount: float = 1.0
    importance_clip: float | None = None
    ref_kl_coef: float = 0.0
    loss_budget_mb: float | None = None
    recompute_loss: bool = False
    compile_loss: bool | None = None

    @classmethod
    def from_config(cls, settings: Any) -> Objective:
        """Read the settings of a run: attributes named like the fields of Divergence and of this class."""
        divergence = Divergence(**{f.name: getattr(settings, f.name) for f in fields(Divergence)})
        own = {f.name: getattr(settings, f.name) for f in fields(cls) if f.name != "divergence"}
        return cls(divergence, **own)

    def __post_init__(self) -> None:
        for name, known in (("keep_by", KEEP_BY), ("reward_to_go", tuple(FUTURES))):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(not_one_of(name, value, known))
        for name in ("keep_fraction", "discount"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} must lie above 0 and up to 1, and is {getattr(self, name)}.")
        if self.importance_clip is not None and not self.importance_clip >= 1.0:
            raise ConfigError(
                f"importance_clip must be at least 1, and is {self.importance_clip}. Below 1 it would also cut tokens "
                "on which trainer and sampler agree. 2 is usual; leave it out for no correction."
            )
        if not self.ref_kl_coef >= 0.0:
            raise ConfigError(
                f"ref_kl_coef must not be negative, and is {self.ref_kl_coef}: it would push the student away from "
                "where it began. Use 0 for no anchor."
            )
        if self.loss_budget_mb is not None and not self.loss_budget_mb > 0.0:
            raise ConfigError(
                f"loss_budget_mb must be above 0, and is {self.loss_budget_mb}. Leave it out to let it be chosen."
            )
        self._check_reward_to_go()

    def _check_reward_to_go(self) -> None:
        if self.reward_to_go != "none" and not self.divergence.kind.has_sampled_estimator:
            raise ConfigError(
                f"reward_to_go {self.reward_to_go!r} belongs to the reverse KL of whole rollouts, and "
                f"{self.divergence.chosen_by}. {self.divergence.set_reverse_kl}, or reward_to_go to 'none'."
            )
        if self.reward_to_go == "none" and self.discount != 1.0:
            raise ConfigError("discount has no effect while reward_to_go is 'none'. Set reward_to_go to 'discounted'.")

    # ---- in words ----------------------------------------------------------------------------------------------

    def describe(self) -> str:
        """The objective in words, as the log names it."""
        said = [self.divergence.describe()]
        if self.reward_to_go != "none":
            said.append(FUTURES[self.reward_to_go].format(discount=self.discount))
        if self.keep_fraction < 1.0:
            said.append(f"on the {self.keep_fraction:.0%} of each rollout's tokens with the highest {self.keep_by}")
        if self.importance_clip is not None:
            said.append(f"importance ratio at most {self.importance_clip:g}")
        if self.ref_kl_coef:
            said.append(f"+ {self.ref_kl_coef:g}·KL(student ‖ student at step 0)")
        return "; ".join(said)

    @property
    def formula(self) -> str:
        """The loss of one token as a formula."""
        text = self.divergence.formula
        if self.reward_to_go != "none":
            text += ",  gradient + (what later tokens cost)·∇log s(y)"
        return text if not self.ref_kl_coef else f"{text}  + {self.ref_kl_coef:g}·Σ_v s(v)·[log s(v) − log s₀(v)]"

    # ---- the computation ---------------------------------------------------------------------------------------

    def __call__(
        self,
        hidden_ND: Tensor,
        head: Head,
        signal: TeacherSignal,
        tokens: Tokens,
        *,
        reference: HiddenSignal | None = None,
        contrast_signal: TeacherSignal | None = None,
    ) -> LossOutput:
        """Compute the loss of a micro-batch.

        Args:
            hidden_ND: float, the student's last hidden states, with gradient.
            head: the student's head.
            signal: the teacher's answer for the same N tokens.
            tokens: weights and what else is known of the tokens. A token of weight 0 is left out altogether: even a
                NaN there changes nothing.
            anchor: the anchor's answer, where `ref_kl_coef` is not 0.
            wrong: the teacher's answer under a wrong context; tokens are then weighed by `token_weights.contrastive`.

        Returns:
            The record; heads that are padded to different sizes are compared over the ids that all have.

        Raises:
            ConfigError: the signal does not know what the divergence compares.
        """
        assert hidden_ND.shape[0] == len(signal) == tokens.weight_N.shape[0], "student and teacher differ in N"
        head = head.gathered()  # once, and in every process, however many teachers answered
        found = []
        for where, part in signal.groups():
            self.divergence.check_signal(part)
            batch = _Batch(hidden_ND, head, signal, tokens, reference if self.ref_kl_coef else None, contrast_signal)
            found.append((where, self._of_one_teacher(replace(batch.select(where), signal=part).narrow())))
        return found[0][1] if len(found) == 1 else _merged(found, len(signal))

    def _of_one_teacher(self, batch: _Batch) -> LossOutput:
        """Compute the loss of the tokens that one teacher answered for."""
        counted_N = batch.tokens.weight_N != 0
        used = batch.select(counted_N) if not bool(counted_N.all()) else batch
        seconds, seen_N, seen = 0.0, counted_N, dict[str, Tensor]()
        if self._needs_statistics or batch.contrast_signal is not None:
            start = time.perf_counter()
            used, kept, seen = self._after_statistics(used)
            seconds = time.perf_counter() - start
            counted_N = counted_N.masked_scatter(counted_N, kept)
        loss, found = self._kernel(used).loss(used.hidden_ND, used.head)
        found = {name: _scatter(values, counted_N) for name, values in found.items()}
        # Tokens that were looked at and left out are in the log all the same.
        found |= {name: _scatter(values, seen_N) for name, values in seen.items()}
        if self.divergence.support == "sampled" or self.reward_to_go != "none":
            ratio_N = log_ratio(found["logprob"], found["teacher_logprob"])
            found |= {name: estimate(ratio_N) for name, estimate in ESTIMATORS.items()}
        return LossOutput(loss, found.pop("divergence"), found.pop("entropy"), found, seconds)

    @property
    def _needs_statistics(self) -> bool:
        return self.keep_fraction < 1.0 or self.reward_to_go != "none"

    def _after_statistics(self, batch: _Batch) -> tuple[_Batch, Tensor, dict[str, Tensor]]:
        """Look at all tokens without gradient.

        Returns:
            Those to train on, with their weights and costs; which they are; the metrics of all.
        """
        tokens = batch.tokens
        assert tokens.row_N is not None and tokens.ids_N is not None, "tokens are compared within their rollout"
        weight_N, advantage_N, found = tokens.weight_N, tokens.advantage_N, dict[str, Tensor]()
        if self._needs_statistics:
            with torch.no_grad():
                _, found = self._kernel(replace(batch, reference=None)).loss(batch.hidden_ND, batch.head)
            if self.keep_fraction < 1.0:
                score_N = found["entropy" if self.keep_by == "entropy" else "divergence"]
                kept_N = keep_top_fraction(score_N, tokens.row_N, self.keep_fraction)
                weight_N = weight_N * tokens.where_distilled(kept_N)
            reward_N = -log_ratio(found["logprob"], found["teacher_logprob"])
            if self.reward_to_go == "discounted":
                advantage_N = tokens.plus_advantage(discounted_reward_to_go(reward_N, tokens.row_N, self.discount))
            elif self.reward_to_go == "mean":
                advantage_N = tokens.plus_advantage(mean_reward_to_go(reward_N, tokens.row_N))
        if batch.contrast_signal is not None:
            ids_N = tokens.ids_N
            right_N, contrast_N = batch.signal.logprobs(ids_N), batch.contrast_signal.logprobs(ids_N)
            weight_N = weight_N * tokens.where_distilled(contrastive(right_N, contrast_N, tokens.row_N))
        kept = weight_N != 0
        return (
            replace(batch, tokens=replace(tokens, weight_N=weight_N, advantage_N=advantage_N)).select(kept),
            kept,
            found,
        )

    def _kernel(self, batch: _Batch) -> Kernel:
        rule = TrainingRule(
            self.divergence,
            batch.signal,
            batch.tokens,
            self.importance_clip,
            batch.reference,
            self.ref_kl_coef,
        )
        fuse = batch.hidden_ND.is_cuda and has_triton() if self.compile_loss is None else self.compile_loss
        return Kernel(rule.parts, partial(compiled(), rule) if fuse else rule, self.loss_budget_mb, self.recompute_loss)


@dataclass(frozen=True)
class _Batch:
    """What the loss is computed from; all of it has the same N."""

    hidden_ND: Tensor
    head: Head
    signal: TeacherSignal
    tokens: Tokens
    reference: HiddenSignal | None = None
    contrast_signal: TeacherSignal | None = None

    def select(self, index: Tensor | slice) -> _Batch:
        """Return some of the tokens."""
        return replace(
            self,
            hidden_ND=self.hidden_ND[index],
            signal=self.signal.select(index),
            tokens=self.tokens.select(index),
            reference=None if self.reference is None else self.reference.select(index),
            contrast_signal=None if self.contrast_signal is None else self.contrast_signal.select(index),
        )

    def narrow(self) -> _Batch:
        """Return it with all heads over the ids that they share: they may be padded to different sizes."""
        others = {"signal": self.signal, "reference": self.reference, "contrast_signal": self.contrast_signal}
        wide = {name: signal for name, signal in others.items() if isinstance(signal, DenseSignal | RoutedSignal)}
        sizes = [signal.vocab_size for signal in wide.values() if isinstance(signal, DenseSignal)]
        vocab_size = min([self.head.vocab_size, *sizes])
        narrowed: dict[str, Any] = {name: signal.narrow(vocab_size) for name, signal in wide.items()}
        return replace(self, head=self.head.narrow(vocab_size), **narrowed)


def _scatter(values: Tensor, used_N: Tensor, count: int | None = None) -> Tensor:
    """Put the values of the used tokens (a mask, or positions among `count`) back among N, zeros elsewhere."""
    out_N = torch.zeros(len(used_N) if count is None else count, dtype=torch.float32, device=used_N.device)
    out_N[used_N] = values.detach().float()
    return out_N


def _merged(found: Sequence[tuple[Any, LossOutput]], count: int) -> LossOutput:
    """Return one record of several teachers' tokens."""

    def together(values: Sequence[tuple[Any, Tensor]]) -> Tensor:
        return torch.stack([_scatter(each, where, count) for where, each in values]).sum(0)

    names = sorted({name for _, record in found for name in record.metrics})
    return LossOutput(
        torch.stack([record.loss for _, record in found]).sum(),
        together([(where, record.divergence_N) for where, record in found]),
        together([(where, record.entropy_N) for where, record in found]),
        {name: together([(w, r.metrics[name]) for w, r in found if name in r.metrics]) for name in names},
        sum(record.statistics_seconds for _, record in found),
    )
