"""Token weights: which tokens count, and how much. Pure functions, made to be composed.

Two kinds. Masks look at ids and positions only, and are applied to rollouts before anything is scored: what they leave
out costs nothing and is not counted by the normaliser. Weights look at what both models say, and are multiplied into
the loss; they compare tokens of one rollout with each other, never of a micro-batch, so that the batch size changes
nothing.

Shapes: N scored tokens of a micro-batch (packed) with `row_N`, the rollout of each.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

Mask = list[int]

# ---- masks: of one completion, 1 for tokens that are scored ---------------------------------------------------------


def skip_first(mask: Sequence[int], count: int) -> Mask:
    """Leave out the first `count` tokens (SDFT, arXiv 2601.19897: 3), where a context's wording leaks through."""
    return [0 if position < count else is_scored for position, is_scored in enumerate(mask)]


def first_only(mask: Sequence[int], count: int) -> Mask:
    """Keep the first `count` tokens only (prefix distillation, arXiv 2602.15260); the passes then end there."""
    return [is_scored if position < count else 0 for position, is_scored in enumerate(mask)]


def without_ids(mask: Sequence[int], completion_ids: Sequence[int], left_out: Collection[int]) -> Mask:
    """Leave out tokens by their id: special tokens (arXiv 2603.25562), or words of style."""
    pairs = zip(mask, completion_ids, strict=True)
    return [0 if token in left_out else is_scored for is_scored, token in pairs]


def without_truncated(mask: Sequence[int], completion_ids: Sequence[int], end_ids: Collection[int]) -> Mask:
    """Leave out a completion that did not come to its end: it was cut at the length limit."""
    ended = bool(completion_ids) and completion_ids[-1] in end_ids
    return list(mask) if ended else [0] * len(mask)


# ---- weights of rows ------------------------------------------------------------------------------------------------


def by_pass_rate(rate: float) -> float:
    """Return 4·p·(1-p): 1 where half of the attempts pass, 0 where all or none do (SSOPD).

    Raises:
        ValueError: the rate is no share.
    """
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"a pass rate lies between 0 and 1, and this one is {rate}")
    return 4.0 * rate * (1.0 - rate)


# ---- weights of tokens, from what both models say -------------------------------------------------------------------


def keep_top_fraction(score_N: Tensor, row_N: Tensor, fraction: float) -> Tensor:
    """Keep the highest scores of each rollout (TIP, arXiv 2604.14084: by student entropy or disagreement).

    A rollout keeps ⌈fraction · its tokens⌉, the earlier one where two are equal, and they share the weight of all its
    tokens: its share of the loss does not change.

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


def contrastive(right_N: Tensor, contrast_N: Tensor, row_N: Tensor) -> Tensor:
    """Weigh tokens by how much the right context says beyond a wrong one (RLCSD, arXiv 2606.11709).

    Tokens that any context moves, of style mostly, get little. The student's log-probability drops out of the
    difference of the two signals, (log t_right - log s) - (log t_wrong - log s).

    Args:
        right_N: float32, log-probabilities of the scored tokens under the teacher's context, nats.
        wrong_N: the same under a wrong context.
        row_N: int64, the rollout of each token.

    Returns:
        weight_N, float32: |right - wrong|, divided by its mean over the rollout; 0 where no token tells them apart.
    """
    size_N = (right_N - contrast_N).abs()
    row_of_N = row_N.unique(return_inverse=True)[1]
    rows = int(row_of_N.max()) + 1 if len(row_of_N) else 0
    total = size_N.new_zeros(rows).index_add_(0, row_of_N, size_N)
    tokens = size_N.new_zeros(rows).index_add_(0, row_of_N, torch.ones_like(size_N))
    mean_N = (total / tokens)[row_of_N]
    return torch.where(mean_N > 0, size_N / mean_N.clamp(min=torch.finfo(size_N.dtype).tiny), 0.0)
