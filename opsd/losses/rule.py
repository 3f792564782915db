"""The rule of training: a block's logits in, each token's weighted loss and its gradient out.

Composes what the other files of this folder define, token by token: divergence, weights that are local to a token
(importance), what a sampled token costs beside it, and the anchor. It knows no chunks and no heads.

Shapes: N scored tokens · R of them in a block · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from opsd.losses.divergence import Divergence, sampled_logprobs
from opsd.losses.estimators import importance_weight
from opsd.losses.kernel import BlockLoss
from opsd.losses.pointwise import FLOOR, reverse_kl
from opsd.signals import DenseSignal, HiddenSignal, TeacherSignal, TopKSignal


@cache
def compiled() -> Callable[..., BlockLoss]:
    """Return the rule's call, fused by torch.compile: one graph for all sizes, built on first use (seconds)."""
    return torch.compile(TrainingRule.__call__, dynamic=True)


@dataclass(frozen=True)
class Tokens:
    """What the loss is told of the scored tokens.

    Args:
        weight_N: float32, what each counts: row weight × token weight ÷ normaliser.
        ids_N: int64, the tokens themselves; None where nothing asks for them.
        row_N: int64, the rollout of each, where tokens of a rollout are compared.
        sampler_N: float32, their log-probabilities where they were sampled, for importance correction; NaN if unknown.
        advantage_N: float32, advantage of each sampled token, in a policy gradient beside the divergence: the reward to
            go of later tokens and the reward of the rollout (GRPO).
        share_N: float32, the share of the divergence that counts: 0 where a token only carries a reward; None for 1.
    """

    weight_N: Tensor
    ids_N: Tensor | None = None
    row_N: Tensor | None = None
    rollout_logprobs_N: Tensor | None = None
    advantage_N: Tensor | None = None
    distill_weight_N: Tensor | None = None

    def plus_advantage(self, advantage_N: Tensor) -> Tensor:
        """Return the advantages with those of the divergence added, scaled by each token's distillation weight."""
        advantage_N = advantage_N if self.distill_weight_N is None else self.distill_weight_N * advantage_N
        return advantage_N if self.advantage_N is None else self.advantage_N + advantage_N

    def where_distilled(self, weight_N: Tensor) -> Tensor:
        """Return a weight that comes from comparing with the teacher, 1 where tokens only carry a reward."""
        return weight_N if self.distill_weight_N is None else torch.where(self.distill_weight_N == 0, 1.0, weight_N)

    def select(self, index: Tensor | slice) -> Tokens:
        """Return some of the tokens."""
        return Tokens(*(None if x is None else x[index] for x in vars(self).values()))  # type: ignore[arg-type]


@dataclass(frozen=True)
class TrainingRule:
    """Σ_n weight · (divergence + anchor) with the gradient of −Σ_n weight · advantage · log s(y) beside it.

    Args:
        divergence: what is compared.
        signal: the teacher's answer for the N tokens.
        tokens: what is known of them.
        importance_clip: largest importance ratio, or None for no correction.
        anchor: the anchor's answer, or None.
        ref_kl_coef: weight of KL(student ‖ anchor).
    """

    divergence: Divergence
    signal: TeacherSignal
    tokens: Tokens
    importance_clip: float | None = None
    reference: HiddenSignal | None = None
    ref_kl_coef: float = 0.0

    @property
    def parts(self) -> list[HiddenSignal]:
        """Whose logits the rule needs beside the student's, in the order in which it gets them."""
        parts = list(self.signal.parts) if isinstance(self.signal, DenseSignal) else []
        return parts + ([] if self.reference is None else [self.reference])

    def __call__(self, student_RV: Tensor, others: Sequence[Tensor], rows: slice) -> BlockLoss:
        """Return losses, gradient with respect to the student's logits, and metrics."""
        temperature = self.divergence.temperature
        log_s = torch.log_softmax(student_RV if temperature == 1.0 else student_RV / temperature, dim=-1)
        s = log_s.exp()
        tokens = self.tokens.select(rows)
        teacher = self._teacher(others, rows)
        value_R, grad_log_s_RV, metrics = self.divergence.compare(log_s, s, teacher, tokens.ids_N)
        metrics["divergence"] = value_R
        metrics["entropy"] = -torch.linalg.vecdot(s, log_s.clamp(min=FLOOR))
        if tokens.ids_N is not None:
            metrics["logprob"] = log_s.gather(-1, tokens.ids_N[:, None])[:, 0]
            metrics["teacher_logprob"] = sampled_logprobs(teacher, tokens.ids_N).to(log_s.dtype)
        if tokens.distill_weight_N is not None:
            share_R = tokens.distill_weight_N.to(log_s.dtype)
            value_R = metrics["divergence"] = share_R * value_R
            grad_log_s_RV = share_R[:, None] * grad_log_s_RV
        weight_R = tokens.weight_N.to(log_s.dtype)
        grad_log_s_RV = self._with_policy_gradient(grad_log_s_RV, tokens)
        weight_R = self._corrected(weight_R, tokens, metrics)
        loss_R, grad_log_s_RV = weight_R * value_R, weight_R[:, None] * grad_log_s_RV
        if self.reference is not None:
            terms = reverse_kl(log_s, s, self.reference.combine(others[-1:], temperature))
            metrics["ref_kl"] = terms.value.sum(-1)
            weight_R = self.ref_kl_coef * weight_R
            loss_R = loss_R + weight_R * metrics["ref_kl"]
            grad_log_s_RV = grad_log_s_RV + weight_R[:, None] * terms.grad_log_s
        grad_RV = torch.addcmul(grad_log_s_RV, s, grad_log_s_RV.sum(-1, keepdim=True), value=-1.0)
        return BlockLoss(loss_R, grad_RV if temperature == 1.0 else grad_RV / temperature, metrics)

    def _teacher(self, others: Sequence[Tensor], rows: slice) -> Tensor | TopKSignal:
        if isinstance(self.signal, DenseSignal):
            own = others[: len(self.signal.parts)]
            return self.signal.combine(own, self.divergence.temperature)
        assert isinstance(self.signal, TopKSignal)
        return self.signal.select(rows)

    def _with_policy_gradient(self, grad_log_s_RV: Tensor, tokens: Tokens) -> Tensor:
        """Add the gradient of −advantage · log s(y) of the sampled tokens."""
        if tokens.advantage_N is None:
            return grad_log_s_RV
        assert tokens.ids_N is not None
        return grad_log_s_RV.scatter_add(
            -1, tokens.ids_N[:, None], -tokens.advantage_N[:, None].to(grad_log_s_RV.dtype)
        )

    def _corrected(self, weight_R: Tensor, tokens: Tokens, metrics: dict[str, Tensor]) -> Tensor:
        """Return the weights, corrected for how the tokens were sampled."""
        if self.importance_clip is None or tokens.rollout_logprobs_N is None:
            return weight_R
        ratio_R, metrics["importance/truncated"] = importance_weight(
            metrics["logprob"], tokens.rollout_logprobs_N.to(weight_R.dtype), self.importance_clip
        )
        metrics["importance/ratio"] = ratio_R
        return weight_R * ratio_R
