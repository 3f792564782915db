"""Statistics of right and wrong answers: an interval for one model, a paired test for two, the share of a gap closed.

Knows lists of booleans only. Everything here speaks of the questions as a sample of all questions of their kind; the
spread between training seeds is another matter, which no interval over questions contains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from opsd.errors import ConfigError, DataError


@dataclass(frozen=True)
class PairedDifference:
    """By how much accuracy changed between two runs on the same questions."""

    difference: float
    """Accuracy after minus accuracy before."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    p_value: float
    """How often a difference this large would come up, to either side, if gains and losses were equally likely."""


def proportion_interval(correct: Sequence[bool], confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval for a share of right answers.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927). Unlike
    p ± z·sqrt(p(1-p)/n) it keeps its rate near 0 and 1 and with few questions.

    Args:
        correct: one boolean per question.
        confidence: how often intervals made this way contain the true share.

    Raises:
        DataError: there are no questions.
        ConfigError: `confidence` is not between 0 and 1.
    """
    n = len(correct)
    if n == 0:
        raise DataError("an interval needs at least one graded question, and got none.\nCheck the split.")
    _check_confidence(confidence)
    share = float(np.mean(correct))
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = share + z**2 / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    scale = 1 + z**2 / n
    # The ends at shares of 0 and 1 are exactly 0 and 1; rounding may step over.
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def paired_difference(
    before: Sequence[bool],
    after: Sequence[bool],
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """Compare two runs on the same questions: percentile bootstrap over questions, and McNemar's exact test.

    The interval and the test answer slightly different questions, and the exact test is the stricter with few changed
    answers; at the border one may exclude 0 where the other does not. If no answer changed, the interval is a point:
    a bootstrap cannot draw what the sample lacks.

    Args:
        before: one boolean per question.
        after: the same questions in the same order.
        confidence: how often intervals made this way contain the true difference.
        resamples: bootstrap resamples; 10,000 put the ends within about 2 % of the interval's width.
        seed: of the resampling.

    Raises:
        DataError: the two are not the same questions, or there are none.
        ConfigError: `confidence` is not between 0 and 1.
    """
    n = len(before)
    if n == 0 or n != len(after):
        raise DataError(
            f"a paired comparison needs two runs on the same questions, and got {n} and {len(after)}.\n"
            "Pairing question by question is what makes the comparison sharp. Evaluate both on one split."
        )
    _check_confidence(confidence)
    was, now = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    lost, gained = int((was & ~now).sum()), int((now & ~was).sum())
    # Drawing n questions with replacement is a multinomial draw of how many are lost, gained, unchanged.
    shares = [lost / n, gained / n, 1 - (lost + gained) / n]
    drawn = np.random.default_rng(seed).multinomial(n, shares, size=resamples)
    tail = (1 - confidence) / 2
    low, high = np.quantile((drawn[:, 1] - drawn[:, 0]) / n, [tail, 1 - tail])
    return PairedDifference((gained - lost) / n, float(low), float(high), _mcnemar(lost, gained))


def share_of_gap(before: float, after: float, ceiling: float) -> float | None:
    """Return the share of the gap between `before` and `ceiling` that `after` closed, None where there is no gap.

    Args:
        before: the student's accuracy before training.
        after: the student's accuracy after training.
        ceiling: the accuracy of the teacher with its context.
    """
    return (after - before) / (ceiling - before) if ceiling > before else None


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ConfigError(
            f"confidence must be between 0 and 1, and is {confidence}.\n"
            "It is the rate at which intervals contain the truth. Write 0.95 for 95 %."
        )


def _mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact p-value: the changed answers as throws of a fair coin (McNemar 1947)."""
    changed = lost + gained
    term, ways = 1, 1  # C(changed, 0), and the sum of C(changed, i) up to i = min(lost, gained)
    for i in range(min(lost, gained)):
        term = term * (changed - i) // (i + 1)
        ways += term
    return min(1.0, 2 * ways / 2**changed)
