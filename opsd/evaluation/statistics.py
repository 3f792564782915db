"""Statistics over questions: an interval for one run, a paired test for two, the share of a gap, the spread of seeds.

Knows numbers, one per question: right or wrong (0/1), a share of right samples (avg@k), a length; never where they
came from. All but `over_seeds` takes the questions for a sample of all questions of their kind; the spread between
training seeds is another matter, which no interval over questions contains.

Shapes: `N` questions, `R` resamples, `D` numbers per question. NaN (or None) is a value that is not known. scipy is
imported inside functions: it takes most of a second, and help texts need none of it.
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
    """A figure over questions with its interval."""

    value: float
    """The figure."""
    low: float | None
    """Lower end of the interval; None where the questions show no spread to make one from."""
    high: float | None
    """Upper end of the interval; None with `low`."""
    n: int
    """How many questions it comes from; those whose value is not known are left out."""


@dataclass(frozen=True)
class PairedDifference:
    """By how much a figure changed between two runs on the same questions."""

    difference: float
    """Mean after minus mean before."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    p_value: float
    """How often a difference this large would come up, to either side, if gains and losses were equally likely."""
    n: int
    """How many questions are known on both sides."""
    deviation: float | None
    """Standard deviation of the differences per question, for `questions_needed`; None with one question."""


@dataclass(frozen=True)
class SeedSpread:
    """A figure over training seeds."""

    mean: float
    """Mean over seeds."""
    deviation: float | None
    """Standard deviation between seeds (divided by seeds - 1); None with one seed, which shows no spread."""
    low: float | None
    """Lower end of the interval of the mean; None with one seed, or where all seeds agree."""
    high: float | None
    """Upper end of the interval; None with `low`."""
    seeds: int
    """How many seeds there are."""


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
    check_rate("confidence", confidence)
    found = _stats().binomtest(int(sum(correct)), n).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)


def estimate(
    values: ArrayLike, confidence: float = 0.95, seed: int = 0, *, is_share: bool = True, resamples: int = 10_000
) -> Estimate:
    """Return the mean over questions: with the Wilson interval if all values are 0 or 1, else with a BCa bootstrap's.

    BCa: B. Efron, "Better bootstrap confidence intervals", JASA 82 (1987), widened for few questions (see `_tail`).
    If all values are the same and not 0 or 1, or there is only one, nothing shows how far the mean may be off; then
    `low` and `high` are None, for a point would look like certainty.

    Args:
        values: (N,) one number per question in any unit; NaN where it is not known, and that question is left out.
        confidence: how often intervals made this way contain the true mean.
        seed: of the resampling.
        is_share: whether 0 and 1 stand for wrong and right; of a length of 1 token they do not.
        resamples: bootstrap resamples; 10,000 put the ends within about 2 % of the interval's width.

    Raises:
        DataError: the value of no question is known, or there are several values per question.
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

    The test is McNemar's exact one where all values are 0 or 1, else 'sign flip': how often the mean change would be as
    far from 0 if each question's change had gone either way with equal chance. Interval and test answer slightly
    different questions; at the border one may exclude 0 where the other does not.

    The interval is Agresti and Min's where all values are 0 or 1, which is not a point where few answers changed or
    none did; else a percentile bootstrap over questions, which cannot draw what the sample lacks.

    Args:
        before: (N,) one number per question; NaN where it is not known, and that question is left out on both sides.
        after: (N,) the same questions in the same order.
        confidence: how often intervals made this way contain the true difference.
        seed: of the resampling and the sign flips.
        resamples: how many of either; no p-value of sign flips is below 1 / (resamples + 1).

    Raises:
        DataError: the two are not the same questions, or no question is known on both sides.
        ConfigError: `confidence` is not between 0 and 1.
    """
    check_rate("confidence", confidence)
    known = _known(before, after)
    changes, n = known[:, 1] - known[:, 0], len(known)
    rng = np.random.default_rng(seed)
    tail = _tail(n, confidence, resamples)
    if _is_0_or_1(known):
        low, high = _agresti_min(changes, confidence)
    else:
        low, high = np.quantile(_resampled_means(changes[:, None], resamples, rng), [tail, 1 - tail])
    p_value = _mcnemar(changes) if _is_0_or_1(known) else _sign_flip(changes, resamples, rng)
    deviation = float(changes.std(ddof=1)) if n > 1 else None
    return PairedDifference(float(changes.mean()), float(low), float(high), p_value, n, deviation)


def over_seeds(values_per_seed: ArrayLike, confidence: float = 0.95) -> SeedSpread:
    """Return the mean over training seeds with Student's t interval, which takes them for a normal sample.

    Student, "The probable error of a mean", Biometrika 6 (1908).

    Args:
        values_per_seed: (seeds,) one figure per training run, all on the same questions.
        confidence: how often intervals made this way contain the mean over all seeds.

    Raises:
        DataError: there are no seeds, or a seed has no finite value: to leave out runs that broke flatters the rest.
        ConfigError: `confidence` is not between 0 and 1.
    """
    check_rate("confidence", confidence)
    values = np.asarray(values_per_seed, dtype=float)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise DataError(
            f"a spread over seeds needs one finite number per seed, and got {values.tolist()}.\n"
            "To leave out a run that broke would flatter the rest. Run it again, or report it by itself."
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
    """Return `share_of_gap` of the means with a percentile bootstrap interval: questions are drawn with all three runs.

    A resample whose ceiling is not above its `before` has no share; it counts as beyond the end its gain points to, so
    it widens the interval. If as many are so as lie outside one end, (1 - confidence) / 2 of them, then that end would
    be infinite: the gap itself cannot be told from none, a share of it has no meaning, and the result is None.

    Args:
        before: (N,) one number per question; NaN where it is not known, and that question is left out in all three.
        after: (N,) the same questions after training.
        ceiling: (N,) the same questions for the teacher with its context.
        confidence: how often intervals made this way contain the true share.
        seed: of the resampling.
        resamples: bootstrap resamples.

    Raises:
        DataError: the three are not the same questions, or no question is known in all of them.
        ConfigError: `confidence` is not between 0 and 1.
    """
    check_rate("confidence", confidence)
    known = _known(before, after, ceiling)
    gain_and_gap, n = known[:, 1:] - known[:, :1], len(known)
    gain, gap = gain_and_gap.mean(axis=0)
    tail = _tail(n, confidence, resamples)
    gains, gaps = _resampled_means(gain_and_gap, resamples, np.random.default_rng(seed)).T
    has_gap = gaps > ROUNDING
    if np.mean(~has_gap) >= tail:
        return None
    shares = np.divide(gains, gaps, out=np.copysign(np.inf, gains), where=has_gap)
    if _is_constant(shares[has_gap]):
        return Estimate(float(gain / gap), None, None, n)
    # No interpolation: between a number and infinity there is nothing.
    low, high = np.quantile(shares, [tail, 1 - tail], method="inverted_cdf")
    return Estimate(float(gain / gap), float(low), float(high), n)


def adjusted(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for how many there are: each below 0.05 then errs in all with a chance of at most 0.05.

    S. Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6 (1979): the smallest counts
    m-fold, the next m-1 fold, and none less than a smaller one. Holds however the tests depend on each other.

    Args:
        p_values: of all comparisons that were made, not only of those that are shown; the result has their order.
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
        ConfigError: it is not.
    """
    if not 0 < value < 1:
        raise ConfigError(
            f"{name} must be between 0 and 1, and is {value}.\n"
            "It is the rate at which intervals contain the truth, or tests find it. Write 0.95 for 95 %."
        )


def _known(*runs: ArrayLike) -> Floats:
    """Return (questions, runs) of the questions that are known in every run."""
    vectors = [np.asarray(run, dtype=float) for run in runs]
    if any(vector.ndim != 1 for vector in vectors):
        raise DataError(
            f"statistics need one number per question, and got shapes {[vector.shape for vector in vectors]}.\n"
            "Samples of one question are no further questions. Average them first: avg@k in opsd.evaluation."
        )
    if len({len(vector) for vector in vectors}) > 1:
        raise DataError(
            f"a paired comparison needs runs on the same questions, and got {[len(v) for v in vectors]} of them.\n"
            "Pairing question by question is what makes the comparison sharp. Evaluate all on one split."
        )
    known = np.stack(vectors, axis=1)
    known = known[~np.isnan(known).any(axis=1)]
    if not len(known):
        raise DataError(
            f"statistics need at least one question that is known in every run, and of {len(vectors[0])} none is.\n"
            "Check the split and the grader."
        )
    return known


def _is_0_or_1(values: Floats) -> bool:
    return bool(((values == 0) | (values == 1)).all())


def _is_constant(values: Floats) -> bool:
    return bool(np.ptp(values) <= ROUNDING * np.abs(values).max())


def _tail(n: int, confidence: float, resamples: int) -> float:
    """Return the share of resamples that shall lie beyond each end of the interval: Φ(sqrt(n/(n-1))·t).

    t is Student's quantile at (1 - confidence) / 2. Resamples of n spread sqrt((n-1)/n) too little and know nothing of
    the t distribution, so that plain percentiles cover 93 % in place of 95 % at n = 30. T. C. Hesterberg, "What
    teachers should know about the bootstrap", The American Statistician 69 (2015), the expanded percentile interval.
    One resample is the least that can lie beyond an end.
    """
    free = max(n - 1, 1)
    t = float(_stats().t.ppf((1 - confidence) / 2, free))
    return max(1 / resamples, NormalDist().cdf(math.sqrt(n / free) * t))


def _resampled_means(values_ND: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """Return (R, D) means of questions drawn with replacement.

    That is a multinomial draw of how often each distinct row comes up, and there are far fewer of those than questions.
    """
    n = len(values_ND)
    distinct, counts = np.unique(values_ND, axis=0, return_counts=True)
    parts = _parts(resamples, len(distinct))
    return np.concatenate([rng.multinomial(n, counts / n, size=size) @ distinct / n for size in parts])


def _parts(resamples: int, width: int) -> list[int]:
    size = max(1, CELLS // width)
    return [min(size, resamples - start) for start in range(0, resamples, size)]


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
    """Two-sided exact p-value: the changed answers as throws of a fair coin (McNemar 1947)."""
    lost, gained = int((changes < 0).sum()), int((changes > 0).sum())
    return float(_stats().binomtest(gained, lost + gained).pvalue) if lost + gained else 1.0


def _sign_flip(changes: Floats, resamples: int, rng: np.random.Generator) -> float:
    """Two-sided p-value of the mean under random signs, (k + 1) / (R + 1) so that it is never 0.

    Fisher's randomisation test; the +1: B. Phipson and G. K. Smyth, "Permutation p-values should never be zero" (2010).
    Of `m` changes of one size, a binomial number goes up.
    """
    sizes, counts = np.unique(np.abs(changes), return_counts=True)
    parts = _parts(resamples, len(sizes))
    sums = np.concatenate([(2 * rng.binomial(counts, 0.5, size=(r, len(sizes))) - counts) @ sizes for r in parts])
    # Sums that are equal on paper differ by rounding, and equal counts as "as far from 0".
    bound = abs(changes.sum()) - ROUNDING * np.abs(changes).sum()
    return float((np.count_nonzero(np.abs(sums) >= bound) + 1) / (resamples + 1))
