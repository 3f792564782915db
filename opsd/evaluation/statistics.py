"""Statistics over questions: an interval for one run, a paired test for two, the share of a gap, the spread of seeds.

Knows one number per question: right or wrong (0/1), a share of right samples (avg@k), or a length. Intervals over
questions treat the questions as a sample of all questions of their kind. They do not contain the spread between
training seeds: that is `over_seeds`.

Shapes: `N` questions, `R` resamples, `D` numbers per question. NaN (or None) marks a missing value. scipy is imported
inside functions: the import takes most of a second, and help texts do not need it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from opsd.errors import ConfigError, DataError

Floats = NDArray[np.float64]
ROUNDING = 1e-12  # below this, relative to the values, two numbers differ by rounding only
CELLS = 2_000_000  # numbers held at once while resampling


@dataclass(frozen=True)
class Estimate:
    """A mean over questions with its interval, as `estimate` returns it.

    Example:
        >>> estimate([True] * 8 + [False] * 2)
        Estimate(value=0.8, low=0.490..., high=0.943..., n=10)
    """

    value: float
    """The mean."""
    low: float | None
    """Lower end of the interval; None where all questions have the same value."""
    high: float | None
    """Upper end of the interval; None with `low`."""
    n: int
    """Number of questions; those with a missing value are left out."""


@dataclass(frozen=True)
class PairedDifference:
    """The change of a metric between two runs on the same questions, as `paired_difference` returns it.

    Example:
        >>> gain = paired_difference([True, False, False], [True, True, False])
        >>> gain.difference, gain.n
        (0.333..., 3)
    """

    difference: float
    """Mean after minus mean before."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    p_value: float
    """Probability of a difference at least this large, in either direction, if gains and losses were equally likely."""
    n: int
    """Number of questions with a value on both sides."""
    deviation: float | None
    """Standard deviation of the differences per question, for `questions_needed`; None with one question."""


@dataclass(frozen=True)
class SeedSpread:
    """A metric over training seeds, as `over_seeds` returns it.

    Example:
        >>> over_seeds([0.36, 0.38, 0.40]).deviation
        0.02...
    """

    mean: float
    """Mean over seeds."""
    deviation: float | None
    """Standard deviation between seeds (divided by seeds - 1); None with one seed."""
    low: float | None
    """Lower end of the interval of the mean; None with one seed, or where all seeds agree."""
    high: float | None
    """Upper end of the interval; None with `low`."""
    seeds: int
    """Number of seeds."""


def proportion_interval(correct: Sequence[bool], confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval for a share of right answers.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927). Unlike
    p ± z·sqrt(p(1-p)/n) it covers at its rate also near 0 and 1 and with few questions.

    Args:
        correct: one boolean per question.
        confidence: rate at which such intervals contain the true share.

    Raises:
        DataError: there are no questions.
        ConfigError: `confidence` is not between 0 and 1.
    """
    n = len(correct)
    if n == 0:
        raise DataError("an interval needs at least one graded question, and there is none.\nCheck the split.")
    check_rate("confidence", confidence)
    interval = _stats().binomtest(int(sum(correct)), n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def estimate(
    values: ArrayLike, confidence: float = 0.95, seed: int = 0, *, is_share: bool = True, resamples: int = 10_000
) -> Estimate:
    """Return the mean over questions: with a Wilson interval if all values are 0 or 1, else with a BCa bootstrap.

    BCa: B. Efron, "Better bootstrap confidence intervals", JASA 82 (1987), widened for few questions (see `_tail`).
    If all values are equal and not 0 or 1, or there is only one value, the sample has no spread to make an interval
    from: `low` and `high` are None.

    Args:
        values: (N,) one number per question in any unit; questions whose value is NaN are left out.
        confidence: rate at which such intervals contain the true mean.
        seed: of the resampling.
        is_share: whether 0 and 1 stand for wrong and right; False for lengths.
        resamples: bootstrap resamples; 10,000 put the ends within about 2 % of the interval's width.

    Raises:
        DataError: no question has a value, or there are several values per question.
        ConfigError: `confidence` is not between 0 and 1.
    """
    check_rate("confidence", confidence)
    known = _known(values)[:, 0]
    value, n = float(known.mean()), len(known)
    if is_share and _is_0_or_1(known):
        return Estimate(value, *proportion_interval((known == 1).tolist(), confidence), n)
    if _is_constant(known):
        return Estimate(value, None, None, n)
    options = {"method": "BCa", "n_resamples": resamples, "batch": max(1, CELLS // n), "rng": seed}
    level = 1 - 2 * _tail(n, confidence, resamples)
    low, high = _stats().bootstrap((known,), np.mean, confidence_level=level, **options).confidence_interval
    return Estimate(value, float(low), float(high), n)


def paired_difference(
    before: ArrayLike, after: ArrayLike, confidence: float = 0.95, *, seed: int = 0, resamples: int = 10_000
) -> PairedDifference:
    """Compare two runs on the same questions: an interval over questions, and a test of no difference.

    Where all values are 0 or 1, the interval is Agresti and Min's and the test McNemar's exact test. Otherwise the
    interval is a percentile bootstrap over questions, and the test flips the sign of each question's change at random.
    Interval and test differ slightly: at the border one may exclude 0 where the other does not.

    Args:
        before: (N,) one number per question; questions whose value is NaN on either side are left out.
        after: (N,) the same questions in the same order.
        confidence: rate at which such intervals contain the true difference.
        seed: of the resampling and of the sign flips.
        resamples: of either; no p-value of random sign flips is below 1 / (resamples + 1).

    Raises:
        DataError: the two runs have different numbers of questions, or no question has a value on both sides.
        ConfigError: `confidence` is not between 0 and 1.
    """
    check_rate("confidence", confidence)
    known = _known(before, after)
    changes, n = known[:, 1] - known[:, 0], len(known)
    tail = _tail(n, confidence, resamples)
    if _is_0_or_1(known):
        (low, high), p_value = _agresti_min(changes, confidence), _mcnemar(changes)
    else:
        low, high = np.quantile(_resampled_means(changes[:, None], resamples, seed)[0], [tail, 1 - tail])
        p_value = _sign_flip(changes, resamples, seed)
    deviation = float(changes.std(ddof=1)) if n > 1 else None
    return PairedDifference(float(changes.mean()), float(low), float(high), p_value, n, deviation)


def over_seeds(values_per_seed: ArrayLike, confidence: float = 0.95) -> SeedSpread:
    """Return the mean over training seeds with Student's t interval, which assumes normally distributed seeds.

    Student, "The probable error of a mean", Biometrika 6 (1908).

    Args:
        values_per_seed: (seeds,) one metric per training run, all on the same questions.
        confidence: rate at which such intervals contain the mean over all seeds.

    Raises:
        DataError: there are no seeds, or a seed has no finite value.
        ConfigError: `confidence` is not between 0 and 1.
    """
    check_rate("confidence", confidence)
    values = np.asarray(values_per_seed, dtype=float)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise DataError(
            f"a spread over seeds needs one finite number per seed, and got {values.tolist()}.\n"
            "Leaving out a failed run would bias the mean. Run it again, or report it separately."
        )
    mean, seeds = float(values.mean()), len(values)
    deviation = float(values.std(ddof=1)) if seeds > 1 else None
    if deviation is None or _is_constant(values):
        return SeedSpread(mean, deviation, None, None, seeds)
    low, high = _stats().t.interval(confidence, seeds - 1, mean, deviation / math.sqrt(seeds))
    return SeedSpread(mean, deviation, float(low), float(high), seeds)


def share_of_gap(before: float, after: float, ceiling: float) -> float | None:
    """Return the share of the gap between `before` and `ceiling` that `after` closed, None where there is no gap.

    Args:
        before: the student's accuracy before training.
        after: the student's accuracy after training.
        ceiling: the accuracy of the teacher with its context.
    """
    return (after - before) / (ceiling - before) if ceiling > before else None


def gap_closed(
    before: ArrayLike,
    after: ArrayLike,
    ceiling: ArrayLike,
    confidence: float = 0.95,
    *,
    seed: int = 0,
    resamples: int = 10_000,
) -> Estimate | None:
    """Return `share_of_gap` of the means with a percentile bootstrap interval over questions.

    A resample whose ceiling is not above its `before` has no share; it counts as ±infinity, by the sign of its gain,
    and so widens the interval. Where (1 - confidence) / 2 of the resamples or more have no share, an end of the
    interval would be infinite: the gap cannot be distinguished from 0, and the result is None.

    Args:
        before: (N,) one number per question; questions whose value is NaN in any run are left out.
        after: (N,) the same questions after training.
        ceiling: (N,) the same questions for the teacher with its context.
        confidence: rate at which such intervals contain the true share.
        seed: of the resampling.
        resamples: bootstrap resamples.

    Raises:
        DataError: the runs have different numbers of questions, or no question has a value in all of them.
        ConfigError: `confidence` is not between 0 and 1.
    """
    check_rate("confidence", confidence)
    known = _known(before, after, ceiling)
    gain_and_gap, n = known[:, 1:] - known[:, :1], len(known)
    gain, gap = gain_and_gap.mean(axis=0)
    tail = _tail(n, confidence, resamples)
    gains, gaps = _resampled_means(gain_and_gap, resamples, seed)
    has_gap = gaps > ROUNDING
    if np.mean(~has_gap) >= tail:
        return None
    shares = np.divide(gains, gaps, out=np.copysign(np.inf, gains), where=has_gap)
    if _is_constant(shares[has_gap]):
        return Estimate(float(gain / gap), None, None, n)
    # No interpolation, which is undefined between a number and infinity.
    low, high = np.quantile(shares, [tail, 1 - tail], method="inverted_cdf")
    return Estimate(float(gain / gap), float(low), float(high), n)


def adjusted(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number (Holm), in the same order.

    Rejecting those below 0.05 makes any false rejection at all with a probability of at most 0.05, however the tests
    depend on each other: S. Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6
    (1979). The smallest of m p-values is multiplied by m, the next by m - 1, and so on; none falls below a smaller one.

    Args:
        p_values: of all comparisons that were made, not only of those that are reported.
    """
    raw = np.asarray(p_values, dtype=float)
    order, result = np.argsort(raw), np.empty_like(raw)
    result[order] = np.maximum.accumulate(raw[order] * np.arange(len(raw), 0, -1)).clip(max=1.0)
    return result.tolist()


def _stats() -> Any:
    from scipy import stats  # type: ignore[import-untyped]

    return stats


def check_rate(name: str, value: float) -> None:
    """Refuse a rate that is not between 0 and 1.

    Raises:
        ConfigError: `value` is not.
    """
    if not 0 < value < 1:
        raise ConfigError(
            f"{name} must be between 0 and 1, and is {value}.\n"
            "It is the rate at which intervals contain the true value, or tests find it. Write 0.95 for 95 %."
        )


def _known(*runs: ArrayLike) -> Floats:
    """Return the values of the questions that have one in every run, as (questions, runs)."""
    vectors = [np.asarray(run, dtype=float) for run in runs]
    if any(vector.ndim != 1 for vector in vectors):
        raise DataError(
            f"statistics need one number per question, and got shapes {[vector.shape for vector in vectors]}.\n"
            "Several samples of a question do not count as several questions. Average them first: avg@k in "
            "opsd.evaluation."
        )
    if len({len(vector) for vector in vectors}) > 1:
        raise DataError(
            f"a paired comparison needs runs on the same questions, and got {[len(v) for v in vectors]} of them.\n"
            "Evaluate all runs on one split."
        )
    known = np.stack(vectors, axis=1)
    known = known[~np.isnan(known).any(axis=1)]
    if not len(known):
        raise DataError(
            f"statistics need at least one question with a value in every run, and of {len(vectors[0])} none has one.\n"
            "Check the split and the grader."
        )
    return known


def _is_0_or_1(values: Floats) -> bool:
    return bool(((values == 0) | (values == 1)).all())


def _is_constant(values: Floats) -> bool:
    return bool(np.ptp(values) <= ROUNDING * np.abs(values).max())


def _tail(n: int, confidence: float, resamples: int) -> float:
    """Return the share of resamples beyond each end of the interval: Φ(sqrt(n/(n-1))·t), and at least one resample.

    t is Student's quantile at (1 - confidence) / 2. Resamples of n questions spread too little by sqrt((n-1)/n), and
    ignore the t distribution: plain percentiles cover 93 % in place of 95 % at n = 30. T. C. Hesterberg, "What teachers
    should know about the bootstrap", The American Statistician 69 (2015), the expanded percentile interval.
    """
    free = max(n - 1, 1)
    t = float(_stats().t.ppf((1 - confidence) / 2, free))
    return max(1 / resamples, NormalDist().cdf(math.sqrt(n / free) * t))


def _resampled_means(values_ND: Floats, resamples: int, seed: int) -> Floats:
    """Return (D, R) means of questions drawn with replacement; the numbers of a question stay together."""
    n = len(values_ND)
    if n == 1:  # scipy refuses a single observation; every resample is that one
        return np.repeat(values_ND.T, resamples, axis=1)

    def means(*columns: Floats, axis: int) -> Floats:
        return np.stack([column.mean(axis=axis) for column in columns])

    drawn = _stats().bootstrap(
        tuple(values_ND.T), means, paired=True, vectorized=True, method="percentile",
        n_resamples=resamples, batch=max(1, CELLS // n), rng=seed,
    )  # fmt: skip
    return drawn.bootstrap_distribution


def _agresti_min(changes: Floats, confidence: float) -> tuple[float, float]:
    """Return the interval of a paired difference of shares: Wald's, with half a question more of each kind of pair.

    A. Agresti and Y. Min, "Simple improved confidence intervals for comparing matched proportions", Statistics in
    Medicine 24 (2005).
    """
    lost, gained = (changes < 0).sum() + 0.5, (changes > 0).sum() + 0.5
    n, difference = len(changes) + 2, gained - lost
    half = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(lost + gained - difference**2 / n)
    return max(-1.0, (difference - half) / n), min(1.0, (difference + half) / n)


def _mcnemar(changes: Floats) -> float:
    """Return the two-sided exact p-value of a fair coin, thrown for each changed answer (McNemar 1947)."""
    lost, gained = int((changes < 0).sum()), int((changes > 0).sum())
    return float(_stats().binomtest(gained, lost + gained).pvalue) if lost + gained else 1.0


def _sign_flip(changes: Floats, resamples: int, seed: int) -> float:
    """Return the two-sided p-value of the mean change under random signs: Fisher's randomisation test.

    With few questions all signs are enumerated, otherwise the p-value is (k + 1) / (R + 1) and never 0: B. Phipson and
    G. K. Smyth, "Permutation p-values should never be zero" (2010).
    """
    if len(changes) == 1 or not changes.any():  # both signs are equally far from 0
        return 1.0

    def distance(sample: Floats, axis: int) -> Floats:
        return np.abs(sample.mean(axis=axis))

    options = {"permutation_type": "samples", "alternative": "greater", "vectorized": True}
    batch = max(1, CELLS // (2 * len(changes)))
    test = _stats().permutation_test((changes,), distance, **options, n_resamples=resamples, batch=batch, rng=seed)
    return float(test.pvalue)
