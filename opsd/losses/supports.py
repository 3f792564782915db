"""Supports: which vocabulary entries a divergence compares, and how the mass outside them is treated.

Pure functions over a block of tokens. They know log-probabilities and ids; nothing of logits, token weights or
teachers.

Shapes: R tokens of a block · V vocabulary · K ids of a support. s is the student, t the teacher.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opsd.losses.pointwise import PointwiseTerms

SUPPORTS = {
    "full": "the whole vocabulary",
    "teacher_top_k": "the teacher's {k} likeliest tokens",
    "student_top_k": "the student's {k} likeliest tokens",
    "union": "the {k} likeliest tokens of either side",
    "sampled": "the sampled token, as a policy gradient",
}
TAILS = {
    "bucket": "one bucket for the rest",
    "renormalise": "both sides renormalised on them",
    "none": "the rest left out",
}

# Smallest tail mass of a teacher whose tail is known only as 1 - Σ of float32 (or printed) probabilities: the rounding
# of that sum. Below it "no tail" and "a tiny tail" cannot be told apart, and a logarithm would turn noise into nats.
TAIL_RESOLUTION = 1e-6


def choose(support: str, k: int, log_s: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ids of a support, and which of them to use: an id that a union holds twice counts once.

    Args:
        support: a key of SUPPORTS other than "full" and "sampled".
        k: ids per side; at most V are taken.
        log_s: (R, V) the student's log-probabilities. The choice itself has no gradient.
        log_t: (R, V) the teacher's.

    Returns:
        ids_RK int64 and used_RK bool; K is 2k for a union.
    """
    k = min(k, log_s.shape[-1])
    sides = {"teacher_top_k": [log_t], "student_top_k": [log_s], "union": [log_t, log_s]}[support]
    ids = [side.topk(k, dim=-1).indices for side in sides]
    ids_RK = torch.cat(ids, dim=-1)
    used_RK = torch.ones_like(ids_RK, dtype=torch.bool)
    if len(ids) == 2:
        used_RK[:, k:] = ~(ids[1][:, :, None] == ids[0][:, None, :]).any(-1)
    return ids_RK, used_RK


def gather(log_p: Tensor, ids_RK: Tensor, used_RK: Tensor) -> Tensor:
    """Return log-probabilities at ids, -inf where an id is not used."""
    return log_p.gather(-1, ids_RK).masked_fill(~used_RK, -torch.inf)


def log_rest(p_RV: Tensor, ids_RK: Tensor) -> Tensor:
    """Return the logarithm of the mass outside the ids, (R, 1): summed, and so exact where 1 - Σ would round it off."""
    return p_RV.scatter(-1, ids_RK, 0.0).sum(-1, keepdim=True).log()


def log_rest_of_listed(log_p_RK: Tensor) -> Tensor:
    """Return the logarithm of 1 - Σ p, (R, 1), where only the listed probabilities are known."""
    rest = 1.0 - log_p_RK.exp().sum(-1, keepdim=True)
    return rest.clamp(min=TAIL_RESOLUTION).log()


def with_tail(log_p_RK: Tensor, log_rest_R1: Tensor, tail: str) -> Tensor:
    """Return the log-probabilities to compare: the support with its bucket, renormalised, or unchanged.

    With a bucket both sides are distributions over K + 1 entries, so the divergence is never negative.
    """
    if tail == "bucket":
        return torch.log_softmax(torch.cat([log_p_RK, log_rest_R1], dim=-1), dim=-1)
    return torch.log_softmax(log_p_RK, dim=-1) if tail == "renormalise" else log_p_RK


def scatter_to_vocab(
    terms: PointwiseTerms, compared_s: Tensor, s_RV: Tensor, ids_RK: Tensor, log_rest_s: Tensor, tail: str
) -> Tensor:
    """Return ∂divergence/∂log s over the whole vocabulary, (R, V), from that over a support.

    Args:
        terms: the terms of the support (and bucket).
        compared_s: the student's probabilities there, after the tail was treated.
        s_RV: the student's probabilities.
        ids_RK: the support; ids that are not used have a gradient of 0.
        log_rest_s: (R, 1) logarithm of the student's mass outside it.
        tail: a key of TAILS.
    """
    k = ids_RK.shape[-1]
    if tail == "bucket":
        # An entry inside the bucket moves it in proportion to its share of the bucket's mass.
        grad_RV = s_RV * (terms.grad_log_s[:, k:] / log_rest_s.exp().clamp(min=torch.finfo(s_RV.dtype).tiny))
        return grad_RV.scatter(-1, ids_RK, 0.0).scatter_add(-1, ids_RK, terms.grad_log_s[:, :k])
    grad_RK = terms.grad_log_s + terms.shift * compared_s  # cancels over all of V, and not over a support
    if tail == "renormalise":
        grad_RK = grad_RK - compared_s * grad_RK.sum(-1, keepdim=True)
    return torch.zeros_like(s_RV).scatter_add(-1, ids_RK, grad_RK)
