"""lmbda, the share of rows trained on the student's own rollouts: a convex mix, a coin per row, and a counting rule.

    expected loss = lmbda · mean(on-policy loss) + (1-lmbda) · mean(off-policy loss)

On-policy rows are completions that the student sampled; off-policy rows come from the data (or from the teacher).
Three ways to mix them, equal in expectation: the formula itself; a coin per row (GKD's Algorithm 1, arXiv 2306.13649,
tosses one per batch); and the rule of opsd's trainer, in which each rank takes floor(lmbda · B + carry) rows on-policy
and carries the fraction to the next step. The rule tosses no coin, so all ranks take the same number at every step: if
one rank skipped generation while others wait for it in a collective, the run would hang.
Knows one loss per row; nothing of how rows are made.

Shapes: `B` rows, `T` steps. Run: python examples/core_math/lmbda_mix.py
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def check_lmbda(lmbda: float) -> None:
    """Refuse an lmbda that is no share.

    Raises:
        ValueError: lmbda is outside [0, 1] or not a number.
    """
    if not 0.0 <= lmbda <= 1.0:
        raise ValueError(f"lmbda is a share of rows and must be within [0, 1], got {lmbda}. 1 is fully on-policy.")


def expected_loss(on_policy_B: Floats, off_policy_B: Floats, lmbda: float) -> float:
    """Return the convex mix: each row counts on-policy with weight lmbda and off-policy with weight 1-lmbda."""
    check_lmbda(lmbda)
    return float(lmbda * on_policy_B.mean() + (1.0 - lmbda) * off_policy_B.mean())


def sampled_loss(on_policy_B: Floats, off_policy_B: Floats, lmbda: float, rng: np.random.Generator) -> float:
    """Return a Monte-Carlo sample of it: a coin per row decides which of its two losses counts in this step."""
    check_lmbda(lmbda)
    heads_B = rng.random(on_policy_B.size) < lmbda  # random() is below 1 and may be 0: lmbda 1 is always, 0 is never
    return float(np.where(heads_B, on_policy_B, off_policy_B).mean())


def on_policy_counts(lmbda: float, rows: int, steps: int) -> list[int]:
    """Return how many of `rows` are on-policy at each step by the trainer's rule, which carries fractions forward."""
    check_lmbda(lmbda)
    counts_T, carry = [], 0.0
    for _ in range(steps):
        due = lmbda * rows + carry
        counts_T.append(math.floor(due + 1e-9))  # 0.3 · 4 rows, five times, is 5.999… in floats, and 6 are due
        carry = due - counts_T[-1]
    return counts_T


def show_twin(draws: int = 4000) -> None:
    rng = np.random.default_rng(0)
    on_policy_B, off_policy_B = rng.gamma(2.0, 0.2, size=8), rng.gamma(2.0, 0.6, size=8)
    print(f"lmbda   expected loss   mean of {draws} coin-tossed steps   standard error")
    for lmbda in (0.0, 0.25, 0.5, 0.75, 1.0):
        sampled = np.array([sampled_loss(on_policy_B, off_policy_B, lmbda, rng) for _ in range(draws)])
        error = sampled.std() / math.sqrt(draws)
        print(f"{lmbda:>5.2f}   {expected_loss(on_policy_B, off_policy_B, lmbda):>13.4f}", end="   ")
        print(f"{sampled.mean():>30.4f}   {error:>14.4f}")
    print("The mix is linear in lmbda, from the off-policy to the on-policy loss; the coin agrees with it on average.")


def show_rule(rows: int = 4) -> None:
    print(f"\nlmbda   rows on-policy of {rows}, steps 1 to 10   share after 1, 10, 1000 steps")
    for lmbda in (0.1, 0.3, 0.5, 0.9):
        counts = on_policy_counts(lmbda, rows, 1000)
        shares = "   ".join(f"{sum(counts[:t]) / (rows * t):.3f}" for t in (1, 10, 1000))
        print(f"{lmbda:>5.2f}   {' '.join(map(str, counts[:10])):>34}   {shares:>29}")
    print("In total the rule is less than one row behind lmbda, so the share tends to lmbda, the same on every rank.")


if __name__ == "__main__":
    show_twin()
    show_rule()
