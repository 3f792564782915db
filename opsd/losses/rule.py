"""The loss of a block of tokens: logits in, each token's weighted loss and its gradient out.

Adds up, token by token: the divergence, the policy gradient of the advantages, and the KL to the reference policy;
each weighted, and corrected for how the token was sampled. It knows no chunks and no heads.

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
from opsd.losses.likeliest import ALTERNATIVES, WIDTH, likeliest
from opsd.losses.pointwise import FLOOR, reverse_kl
from opsd.signals import DenseSignal, HiddenSignal, TeacherSignal, TopKSignal


@cache
def compiled() -> Callable[..., BlockLoss]:
    """Return the rule's call, fused by torch.compile: one graph for all sizes, built on first use (seconds)."""
    return torch.compile(TrainingRule.__call__, dynamic=True)


@dataclass(frozen=True)
class Tokens:
    """The scored tokens of a micro-batch.

    Args:
        weight_N: float32, weight in the loss: row weight × token weight ÷ number of loss tokens.
        ids_N: int64, the tokens themselves; None where no setting needs them.
        row_N: int64, the rollout of each, where tokens of a rollout are compared.
        rollout_logprobs_N: float32, nats, their log-probabilities where they were sampled, for the importance
            correction; NaN where unknown.
        advantage_N: float32, advantage of each sampled token, in a policy gradient beside the divergence: the reward to
            go of later tokens and the reward of the rollout (GRPO).
        is_traced_N: bool, tokens whose likeliest alternatives are kept for a trace; None for none.
        distill_weight_N: float32, factor on the divergence: 0 where a token is only reinforced by its reward; None
            for 1.

    Example:
        >>> Tokens(weight_N=torch.full((6,), 1 / 6), ids_N=torch.tensor([5, 9, 2, 7, 7, 1]))
    """

    weight_N: Tensor
    ids_N: Tensor | None = None
    row_N: Tensor | None = None
    rollout_logprobs_N: Tensor | None = None
    advantage_N: Tensor | None = None
    distill_weight_N: Tensor | None = None
    is_traced_N: Tensor | None = None

    def plus_advantage(self, advantage_N: Tensor) -> Tensor:
        """Return the advantages with those of the divergence added, scaled by each token's distillation weight."""
        advantage_N = advantage_N if self.distill_weight_N is None else self.distill_weight_N * advantage_N
        return advantage_N if self.advantage_N is None else self.advantage_N + advantage_N

    def where_distilled(self, weight_N: Tensor) -> Tensor:
        """Return a weight that was made by comparing with the teacher, and 1 where tokens are only reinforced."""
        return weight_N if self.distill_weight_N is None else torch.where(self.distill_weight_N == 0, 1.0, weight_N)

    def select(self, index: Tensor | slice) -> Tokens:
        """Return some of the tokens."""
        return Tokens(*(None if x is None else x[index] for x in vars(self).values()))  # type: ignore[arg-type]


@dataclass(frozen=True)
class TrainingRule:
    """Σ_n weight · (divergence + ref_kl_coef · KL(student ‖ reference)), and −Σ_n weight · advantage · log s(y).

    The second sum has a gradient and no value.

    Args:
        divergence: what is compared.
        signal: the teacher's signal for the N tokens.
        tokens: their ids and weights.
        importance_clip: largest importance ratio, or None for no correction.
        reference: the reference policy's signal, or None.
        ref_kl_coef: weight of KL(student ‖ reference policy).
    """

    divergence: Divergence
    signal: TeacherSignal
    tokens: Tokens
    importance_clip: float | None = None
    reference: HiddenSignal | None = None
    ref_kl_coef: float = 0.0

    @property
    def parts(self) -> list[HiddenSignal]:
        """The signals whose logits the rule needs beside the student's, in the order in which it gets them."""
        parts = list(self.signal.parts) if isinstance(self.signal, DenseSignal) else []
        return parts + ([] if self.reference is None else [self.reference])

    def __call__(self, student_RV: Tensor, others: Sequence[Tensor], rows: slice) -> BlockLoss:
        """Return losses in nats, their gradient with respect to the student's logits, and metrics."""
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
            # The teacher saw no prompt of a token that is only reinforced: what it says of it is 0 in the log too.
            distill_R = tokens.distill_weight_N.to(log_s.dtype)
            of_teacher = metrics.keys() - {"entropy", "logprob", "teacher_logprob"}
            metrics |= {name: distill_R * metrics[name] for name in of_teacher}
            if "logprob" in metrics:
                metrics["teacher_logprob"] = metrics["teacher_logprob"].where(distill_R > 0, metrics["logprob"])
            value_R = metrics["divergence"]
            grad_log_s_RV = distill_R[:, None] * grad_log_s_RV
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

    def alternatives(
        self, traced: Sequence[int], student_RV: Tensor, others: Sequence[Tensor], rows: slice
    ) -> dict[str, Tensor]:
        """Return the likeliest tokens of both sides at traced places of N, (R, WIDTH), 0 elsewhere; see `likeliest`."""
        columns = torch.zeros((len(student_RV), WIDTH), dtype=torch.float32, device=student_RV.device)
        places = [place for place in traced if rows.start <= place < rows.stop]
        if places:
            place_M = torch.tensor(places, device=student_RV.device)
            row_M = place_M - rows.start
            log_s = torch.log_softmax(student_RV[row_M] / self.divergence.temperature, dim=-1)
            teacher = self._teacher([logits_RV[row_M] for logits_RV in others], place_M)
            assert self.tokens.ids_N is not None
            columns[row_M] = likeliest(log_s, teacher, self.tokens.ids_N[place_M])
        return {ALTERNATIVES: columns}

    def _teacher(self, others: Sequence[Tensor], rows: slice | Tensor) -> Tensor | TopKSignal:
        if isinstance(self.signal, DenseSignal):
            return self.signal.combine(others[: len(self.signal.parts)], self.divergence.temperature)
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
