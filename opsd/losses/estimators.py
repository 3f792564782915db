"""Estimators from the sampled tokens alone: k1, k2, k3 of the reverse KL, rewards to go, baseline, importance ratio.

Pure functions of log-probabilities of the tokens that were sampled. r = log s(y) - log t(y), in nats.

Shapes: N scored tokens of a micro-batch (packed, in order) with `row_N`, the rollout of each · R tokens · V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

REWARD_TO_GO = {
    "none": "no reward of later tokens",
    "discounted": "plus the reward of later tokens, discounted by {discount:g} per token",
    "mean": "plus the mean reward of later tokens",
}


def k1(ratio_N: Tensor) -> Tensor:
    """Return r: unbiased for KL(s ‖ t), of high variance, negative at many tokens (Schulman 2020)."""
    return ratio_N


def k2(ratio_N: Tensor) -> Tensor:
    """Return r²/2: biased, of low variance; its gradient is unbiased for the KL's."""
    return 0.5 * ratio_N.square()


def k3(ratio_N: Tensor) -> Tensor:
    """Return e^-r - 1 + r: unbiased, never negative."""
    return torch.expm1(-ratio_N) + ratio_N


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def optimal_baseline(s: Tensor, ratio: Tensor) -> Tensor:
    """Return the baseline b that gives (r(y) - b)·∇log s(y) the smallest variance, y drawn from s.

    b = E[r·g] / E[g] with g(y) = |∇log s(y)|² = 1 - 2·s(y) + Σ s², the gradient taken with respect to the logits
    (Greensmith, Bartlett, Baxter 2004, JMLR 5). The estimate stays unbiased, because b does not depend on y. The mean
    of r, the usual baseline, can give a larger variance than none.

    Args:
        s: (R, V) probabilities.
        ratio: (R, V) r of every entry.

    Returns:
        (R,); 0 where one token has all the mass, and every gradient is 0.
    """
    size = 1.0 - 2.0 * s + s.square().sum(-1, keepdim=True)
    share = s * size
    return (share * ratio).sum(-1) / share.sum(-1).clamp(min=torch.finfo(s.dtype).tiny)


def discounted_reward_to_go(reward_N: Tensor, row_N: Tensor, discount: float) -> Tensor:
    """Return Σ_{m>n} discount^(m-n)·reward_m over the later tokens of the same rollout.

    With the token's own reward it is the return that Thinking Machines' on-policy distillation uses as the advantage;
    their discount is 0.

    Args:
        reward_N: float32, nats: log t(y) - log s(y).
        row_N: int64, the rollout of each token; tokens of a rollout stand together, in order.
        discount: per token, in [0, 1].
    """
    to_go_N = torch.zeros_like(reward_N)
    for places in _rows(row_N):
        total = 0.0
        totals = []
        for reward in reversed(reward_N[places].tolist()):
            totals.append(total)
            total = discount * (reward + total)
        to_go_N[places] = torch.tensor(totals[::-1], dtype=reward_N.dtype, device=reward_N.device)
    return to_go_N


def mean_reward_to_go(reward_N: Tensor, row_N: Tensor) -> Tensor:
    """Return the mean reward of the later tokens of the same rollout, 0 at the last.

    MiniLLM's length-normalised return (arXiv 2306.08543, section 2.2); with the exact divergence of the token itself,
    its single-step decomposition.
    """
    to_go_N = torch.zeros_like(reward_N)
    for places in _rows(row_N):
        rewards = reward_N[places]
        later = rewards.flip(0).cumsum(0).flip(0) - rewards
        count = torch.arange(len(rewards) - 1, -1, -1, device=rewards.device)
        to_go_N[places] = later / count.clamp(min=1)
    return to_go_N


def _rows(row_N: Tensor) -> list[Tensor]:
    return [(row_N == row).nonzero()[:, 0] for row in row_N.unique()]


def importance_weight(student_N: Tensor, rollout_logprobs_N: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Return truncated importance ratios, which correct for samples of other probabilities than the student's.

    Args:
        student_N: log s(y) in nats, the trainer's.
        rollout_logprobs_N: log-probability in nats of the same token where it was sampled; NaN where unknown
            (off-policy rows).
        clip: largest ratio; truncation bounds the variance and biases towards smaller steps.

    Returns:
        min(s / p, clip), 1 where p is unknown, without gradient; and 1 where it was truncated, else 0.
    """
    ratio_N = (student_N - rollout_logprobs_N).exp().nan_to_num(nan=1.0, posinf=torch.inf)
    return ratio_N.clamp(max=clip), (ratio_N > clip).to(ratio_N.dtype)
