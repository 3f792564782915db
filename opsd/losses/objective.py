"""The objective of a run: the divergence, the weight of each token, and the other terms of the loss.

Turns settings into a loss; the one entry point of training. Knows signals and tensors; nothing of rollouts, prompts,
teachers or trainers.

Shapes: N scored tokens of a micro-batch (packed) · D hidden width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._triton import has_triton

from opsd.errors import ConfigError, not_one_of
from opsd.losses.divergence import Divergence, DivergenceSettings
from opsd.losses.estimators import ESTIMATORS, REWARD_TO_GO, discounted_reward_to_go, mean_reward_to_go
from opsd.losses.kernel import Kernel
from opsd.losses.likeliest import ALTERNATIVES
from opsd.losses.pointwise import log_ratio
from opsd.losses.rule import Tokens, TrainingRule, compiled
from opsd.losses.token_weights import by_drift, contrastive, keep_top_fraction
from opsd.models.head import Head
from opsd.signals import DenseSignal, HiddenSignal, RoutedSignal, TeacherSignal

KEEP_BY = ("entropy", "disagreement")


@dataclass(frozen=True)
class LossOutput:
    """The loss of a micro-batch and what is logged of it.

    Args:
        loss: scalar with gradient to the student, Σ weight_N · divergence_N and the other terms of the objective.
        divergence_N: float32, nats per token, detached; 0 where a token has no weight.
        entropy_N: float32, the student's entropy in nats, detached.
        metrics: what else is logged, float32 (N,) by name, detached.
        statistics_seconds: seconds of the pass without gradient that some objectives need first.
        alternatives_NA: float32, likeliest tokens of both sides at traced tokens (losses/likeliest.py), or None.

    Example:
        >>> output = objective(hidden_ND, head, signal, tokens)
        >>> output.loss.backward()
        >>> output.divergence_N.mean()
    """

    loss: Tensor
    divergence_N: Tensor
    entropy_N: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    statistics_seconds: float = 0.0
    alternatives_NA: Tensor | None = None


@dataclass(kw_only=True)
class ObjectiveSettings:
    """Settings of an OPSDConfig that weigh tokens, add terms to the divergence, and say how the loss is computed.

    Example:
        >>> OPSDConfig("runs/first", keep_fraction=0.5, ref_kl_coef=0.1)
    """

    keep_fraction: float = field(
        default=1.0,
        metadata={
            "help": "Share of each rollout's tokens to train on, in (0, 1] (TIP, arXiv 2604.14084: 0.5); those kept "
            "share the weight of all. Costs a pass over the head without gradient."
        },
    )
    keep_by: str = field(
        default="entropy",
        metadata={
            "help": "Score by which keep_fraction keeps the highest: entropy (the student's), or disagreement (the "
            "divergence)."
        },
    )
    prefix_weight: float = field(
        default=0.0,
        metadata={
            "help": "γ of the token weight 1 + γ·(1 − d/D), at least 0 (IW-OPD, arXiv 2606.22600: 0.5). d is the size "
            "of log s(y) − log t(y) summed over the rollout's earlier tokens, D over all. Divided by its mean over the "
            "rollout. Costs a pass over the head without gradient."
        },
    )
    reward_to_go: str = field(
        default="none",
        metadata={
            "help": "Reward of later tokens, log t − log s of each, that is added to a token's advantage: none, "
            "discounted (their discounted sum), or mean (MiniLLM, arXiv 2306.08543)."
        },
    )
    discount: float = field(default=1.0, metadata={"help": "Discount per token of reward_to_go discounted, in (0, 1]."})
    importance_clip: float | None = field(
        default=None,
        metadata={
            "help": "Largest importance ratio, s(y) over p(y) where y was sampled, at least 1 (SDPO: 2); corrects for "
            "vLLM, and for the older weights of steps_per_generation, which costs a forward pass. Unset: none."
        },
    )
    ref_kl_coef: float = field(
        default=0.0,
        metadata={
            "help": "Weight of KL(student ‖ reference policy), at least 0; the reference policy is the student at step "
            "0 with the plain prompt. Costs one forward pass."
        },
    )
    loss_budget_mb: float | None = field(
        default=None,
        metadata={
            "help": "MiB for the logits of a chunk, student's and teachers' together. Unset: 128 on a CPU, 1,024 on a "
            "GPU."
        },
    )
    recompute_loss: bool = field(
        default=False,
        metadata={
            "help": "Compute the loss again in the backward pass, with half as many products more, instead of keeping "
            "the gradient of the head, which is as large as the head."
        },
    )
    compile_loss: bool | None = field(
        default=None,
        metadata={"help": "Fuse the elementwise work of the loss with torch.compile. Unset: on a GPU that has Triton."},
    )


@dataclass
class Objective(ObjectiveSettings):
    """The loss of a run; the fields are those of `ObjectiveSettings` by keyword, after the divergence.

    Settings are checked when it is made. Make another with `dataclasses.replace` rather than assigning to a field.

    Args:
        divergence: what is compared at each token.

    Raises:
        ConfigError: a setting outside its range, or a combination that cannot work.

    Example:
        >>> objective = Objective(Divergence(beta=0.0), ref_kl_coef=0.1)
        >>> objective.describe()
        'forward KL(teacher ‖ student); + 0.1·KL(student ‖ student at step 0)'
        >>> output = objective(hidden_ND, head, signal, Tokens(weight_N), reference=reference_signal)
    """

    divergence: Divergence = field(default_factory=Divergence)

    @classmethod
    def from_config(cls, settings: Any) -> Objective:
        """Read an object that has the attributes of DivergenceSettings and ObjectiveSettings, such as an OPSDConfig."""
        of_divergence, of_objective = (
            {f.name: getattr(settings, f.name) for f in fields(mixin)}
            for mixin in (DivergenceSettings, ObjectiveSettings)
        )
        return cls(Divergence(**of_divergence), **of_objective)

    def __post_init__(self) -> None:
        for name, known in (("keep_by", KEEP_BY), ("reward_to_go", tuple(REWARD_TO_GO))):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(not_one_of(name, value, known))
        for name in ("keep_fraction", "discount"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} must lie above 0 and up to 1, and is {getattr(self, name)}.")
        if self.importance_clip is not None and not self.importance_clip >= 1.0:
            raise ConfigError(
                f"importance_clip must be at least 1, and is {self.importance_clip}. Below 1 it would also cut tokens "
                "on which trainer and engine agree. 2 is usual; leave it out for no correction."
            )
        if not 0.0 <= self.prefix_weight < math.inf:
            raise ConfigError(
                f"prefix_weight must be a number of at least 0, and is {self.prefix_weight}. Below 0 it would weigh "
                "the tokens at the end of a rollout most, after prefixes that the teacher would not write. 0.5 is the "
                "paper's; leave it out for equal weights."
            )
        if not self.ref_kl_coef >= 0.0:
            raise ConfigError(
                f"ref_kl_coef must not be negative, and is {self.ref_kl_coef}: it would push the student away from "
                "its reference policy. Use 0 for no such term."
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

    # ---- descriptions ------------------------------------------------------------------------------------------

    @property
    def uses_sampled_tokens(self) -> bool:
        """Whether the gradient is an estimate from the tokens that the student sampled."""
        return self.divergence.support == "sampled" or self.reward_to_go != "none"

    def describe(self) -> str:
        """Name the objective and its settings, as the log writes them."""
        parts = [self.divergence.describe()]
        if self.reward_to_go != "none":
            parts.append(REWARD_TO_GO[self.reward_to_go].format(discount=self.discount))
        if self.keep_fraction < 1.0:
            parts.append(f"on the {self.keep_fraction:.0%} of each rollout's tokens with the highest {self.keep_by}")
        if self.prefix_weight:
            parts.append(f"tokens weighed up by {self.prefix_weight:g}·(1 − the share of drift before them)")
        if self.importance_clip is not None:
            parts.append(f"importance ratio at most {self.importance_clip:g}")
        if self.ref_kl_coef:
            parts.append(f"+ {self.ref_kl_coef:g}·KL(student ‖ student at step 0)")
        return "; ".join(parts)

    @property
    def formula(self) -> str:
        """The loss of one token as a formula."""
        text = self.divergence.formula
        if self.reward_to_go != "none":
            text += ",  gradient − (reward to go)·∇log s(y)"
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

        Heads that are padded to different sizes are compared over the ids that all have.

        Args:
            hidden_ND: float, the student's last hidden states, with gradient.
            head: the student's head.
            signal: the teacher's signal for the same N tokens.
            tokens: weights and what else is known of the tokens. A token of weight 0 is left out altogether: even a
                NaN there changes nothing.
            reference: the reference policy's signal, where `ref_kl_coef` is not 0.
            contrast_signal: the teacher's signal under the contrast context; tokens are then weighed by
                `token_weights.contrastive`.

        Raises:
            ConfigError: the signal lacks what the divergence compares.
        """
        assert hidden_ND.shape[0] == len(signal) == tokens.weight_N.shape[0], "student and teacher differ in N"
        head = head.gathered()  # once, and in every process, whatever the number of teachers
        outputs = []
        for where, part in signal.groups():
            self.divergence.check_signal(part)
            batch = _Batch(hidden_ND, head, signal, tokens, reference if self.ref_kl_coef else None, contrast_signal)
            outputs.append((where, self._of_one_teacher(replace(batch.select(where), signal=part).narrow())))
        return outputs[0][1] if len(outputs) == 1 else _merged(outputs, len(signal))

    def _of_one_teacher(self, batch: _Batch) -> LossOutput:
        """Compute the loss of the tokens that one teacher scored."""
        counted_N = batch.tokens.weight_N != 0
        used = batch if bool(counted_N.all()) else batch.select(counted_N)  # a host waits for its GPU here
        seconds, seen_N, seen = 0.0, counted_N, dict[str, Tensor]()
        if self.needs_statistics or batch.contrast_signal is not None:
            start = time.perf_counter()
            used, kept, seen = self._after_statistics(used)
            seconds = time.perf_counter() - start
            counted_N = counted_N.masked_scatter(counted_N, kept)
        loss, values = self._kernel(used).loss(used.hidden_ND, used.head)
        metrics = {name: _scatter(column, counted_N) for name, column in values.items()}
        # Tokens that the statistics pass saw and left out are logged all the same.
        metrics |= {name: _scatter(column, seen_N) for name, column in seen.items()}
        if self.uses_sampled_tokens:
            ratio_N = log_ratio(metrics["logprob"], metrics["teacher_logprob"])
            metrics |= {name: estimate(ratio_N) for name, estimate in ESTIMATORS.items()}
        alternatives = metrics.pop(ALTERNATIVES, None)
        return LossOutput(loss, metrics.pop("divergence"), metrics.pop("entropy"), metrics, seconds, alternatives)

    @property
    def needs_statistics(self) -> bool:
        """Whether all tokens go through a pass without gradient before they are weighed."""
        return self.keep_fraction < 1.0 or self.prefix_weight > 0.0 or self.reward_to_go != "none"

    def _after_statistics(self, batch: _Batch) -> tuple[_Batch, Tensor, dict[str, Tensor]]:
        """Run all tokens without gradient, and weigh them by the result.

        Returns:
            The tokens to train on, with weights and advantages; which they are; the metrics of all.
        """
        tokens = batch.tokens
        assert tokens.row_N is not None and tokens.ids_N is not None, "tokens are compared within their rollout"
        weight_N, advantage_N, seen = tokens.weight_N, tokens.advantage_N, dict[str, Tensor]()
        if self.needs_statistics:
            with torch.no_grad():
                untraced = replace(batch, reference=None, tokens=replace(tokens, is_traced_N=None))
                _, seen = self._kernel(untraced).loss(batch.hidden_ND, batch.head)
            if self.keep_fraction < 1.0:
                score_N = seen["entropy" if self.keep_by == "entropy" else "divergence"]
                kept_N = keep_top_fraction(score_N, tokens.row_N, self.keep_fraction)
                weight_N = weight_N * tokens.where_distilled(kept_N)
            reward_N = -log_ratio(seen["logprob"], seen["teacher_logprob"])
            if self.prefix_weight:
                weight_N = weight_N * tokens.where_distilled(by_drift(reward_N, tokens.row_N, self.prefix_weight))
            if self.reward_to_go == "discounted":
                advantage_N = tokens.plus_advantage(discounted_reward_to_go(reward_N, tokens.row_N, self.discount))
            elif self.reward_to_go == "mean":
                advantage_N = tokens.plus_advantage(mean_reward_to_go(reward_N, tokens.row_N))
        if batch.contrast_signal is not None:
            ids_N = tokens.ids_N
            right_N, contrast_N = batch.signal.logprobs(ids_N), batch.contrast_signal.logprobs(ids_N)
            weight_N = weight_N * tokens.where_distilled(contrastive(right_N, contrast_N, tokens.row_N))
        kept = weight_N != 0
        weighed = replace(batch, tokens=replace(tokens, weight_N=weight_N, advantage_N=advantage_N))
        return weighed.select(kept), kept, seen

    def _kernel(self, batch: _Batch) -> Kernel:
        # Without the mask of traced tokens, whose coming and going would compile the rule once more.
        tokens = replace(batch.tokens, is_traced_N=None)
        rule = TrainingRule(
            self.divergence, batch.signal, tokens, self.importance_clip, batch.reference, self.ref_kl_coef
        )
        fuse = batch.hidden_ND.is_cuda and has_triton() if self.compile_loss is None else self.compile_loss
        traced_N = batch.tokens.is_traced_N  # a host waits for its GPU here
        observe = None if traced_N is None else partial(rule.alternatives, traced_N.nonzero()[:, 0].tolist())
        call = partial(compiled(), rule) if fuse else rule
        return Kernel(rule.parts, call, self.loss_budget_mb, self.recompute_loss, observe)


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
    shape = (len(used_N) if count is None else count, *values.shape[1:])
    out_N = torch.zeros(shape, dtype=torch.float32, device=used_N.device)
    values = values.detach().float()
    if isinstance(used_N, Tensor) and used_N.dtype == torch.bool:
        used_N = used_N.reshape(-1, *[1] * (values.ndim - 1)).expand(shape)
        return out_N.masked_scatter(used_N, values)  # unlike an index, it does not wait for the mask
    out_N[used_N] = values
    return out_N


def _merged(outputs: Sequence[tuple[Any, LossOutput]], count: int) -> LossOutput:
    """Return the outputs of several teachers' tokens as one."""

    def together(values: Sequence[tuple[Any, Tensor]]) -> Tensor:
        return torch.stack([_scatter(column, where, count) for where, column in values]).sum(0)

    names = sorted({name for _, output in outputs for name in output.metrics})
    traced = [(where, o.alternatives_NA) for where, o in outputs if o.alternatives_NA is not None]
    return LossOutput(
        torch.stack([output.loss for _, output in outputs]).sum(),
        together([(where, output.divergence_N) for where, output in outputs]),
        together([(where, output.entropy_N) for where, output in outputs]),
        {name: together([(w, o.metrics[name]) for w, o in outputs if name in o.metrics]) for name in names},
        sum(output.statistics_seconds for _, output in outputs),
        together(traced) if traced else None,
    )
