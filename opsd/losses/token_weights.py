"""Token weights: how much each token of a rollout counts, from the predictions of student and teacher.

Pure functions whose results are multiplied into the loss. They compare tokens of one rollout with each other, never of
a micro-batch, so that the batch size changes nothing.

Shapes: N scored tokens of a micro-batch (packed) with `row_N`, the rollout of each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def keep_top_fraction(score_N: Tensor, row_N: Tensor, fraction: float) -> Tensor:
    """Keep the tokens with the highest scores of each rollout (TIP, arXiv 2604.14084: entropy or disagreement).

    A rollout keeps ⌈fraction · tokens⌉, the earlier one where two are equal, and they share the weight of all its
    tokens, so that its share of the loss does not change.

    Args:
        score_N: float, without NaN.
        row_N: int64, the rollout of each token.
        fraction: in (0, 1].

    Returns:
        weight_N, float32: 0, or tokens / kept tokens of the rollout.
    """
    weight_N = torch.zeros_like(score_N, dtype=torch.float32)
    for row in row_N.unique():
        places = (row_N == row).nonzero()[:, 0]
        kept = max(1, math.ceil(fraction * len(places) - 1e-9))  # 0.07 · 100 is a little more than 7
        best = score_N[places].argsort(descending=True, stable=True)[:kept]
        weight_N[places[best]] = len(places) / kept
    return weight_N


def by_drift(ratio_N: Tensor, row_N: Tensor, gamma: float) -> Tensor:
    """Weigh a token by how little the rollout has drifted from the teacher before it (IW-OPD, arXiv 2606.22600).

    The paper's factor is 1 + gamma · (1 - d / D), where d sums |log s(y) - log t(y)| over the earlier tokens and D over
    all tokens of the rollout: 1 + gamma at the first token, and falling. Here it is divided by its mean over the
    rollout, whose share of the loss does not change.

    Args:
        ratio_N: float32, log s(y) - log t(y) of the scored tokens, nats; tokens of a rollout stand in order.
        row_N: int64, the rollout of each token.
        gamma: at least 0.

    Returns:
        weight_N, float32: with a mean of 1 in each rollout; 1 where student and teacher agree on all of it.
    """
    weight_N = torch.ones_like(ratio_N, dtype=torch.float32)
    for row in row_N.unique():
        places = (row_N == row).nonzero()[:, 0]
        size = ratio_N[places].abs()
        before, total = size.cumsum(0) - size, size.sum()
        factor = 1.0 + gamma * (1.0 - before / total) if total > 0 else torch.ones_like(size)
        weight_N[places] = (factor / factor.mean()).float()
    return weight_N


def contrastive(right_N: Tensor, contrast_N: Tensor, row_N: Tensor) -> Tensor:
    """Weigh tokens by how much their log-probability differs between the context and a contrast context.

    Tokens that any context changes, mostly of style, get a small weight (RLCSD, arXiv 2606.11709). The student's
    log-probability cancels in the difference of the two signals, (log t - log s) - (log t_contrast - log s).

    Args:
        right_N: float32, log-probabilities of the scored tokens under the teacher's context, nats.
        contrast_N: the same under the contrast context.
        row_N: int64, the rollout of each token.

    Returns:
        weight_N, float32: |right - contrast|, divided by its mean over the rollout; 0 where no token differs.
    """
    size_N = (right_N - contrast_N).abs()
    row_of_N = row_N.unique(return_inverse=True)[1]
    rows = int(row_of_N.max()) + 1 if len(row_of_N) else 0
    total = size_N.new_zeros(rows).index_add_(0, row_of_N, size_N)
    tokens = size_N.new_zeros(rows).index_add_(0, row_of_N, torch.ones_like(size_N))
    mean_N = (total / tokens)[row_of_N]
    return torch.where(mean_N > 0, size_N / mean_N.clamp(min=torch.finfo(size_N.dtype).tiny), 0.0)
