"""Intervals and paired tests: against closed forms, by hand, by brute force and by simulation.

Shares counted in 1,000 simulated repeats may be 0.02 off: the binomial spread of a true 95 % is 0.0069, of a true 5 %
the same, and 0.02 is 2.9 of it. Seeds are fixed, so that a test that passes keeps passing.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from scipy import stats

from opsd.errors import ConfigError, DataError
from opsd.evaluation.power import power_of, questions_needed
from opsd.evaluation.statistics import (
    estimate,
    gap_closed,
    over_seeds,
    paired_difference,
    proportion_interval,
)

REPEATS, NOISE = 1000, 0.02


def truth(rate: float, n: int, rng: np.random.Generator) -> list[bool]:
    return (rng.random(n) < rate).tolist()


def avg_at_4(rate: float, n: int, rng: np.random.Generator) -> np.ndarray:
    """Four samples each of questions that differ in how hard they are."""
    return rng.binomial(4, rng.beta(2 * rate, 2 * (1 - rate), size=n)) / 4


@pytest.fixture(autouse=True)
def no_warnings() -> Any:
    """Whatever scipy or numpy think of a sample, a user reads our docstring and not their warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# ---- one run -----------------------------------------------------------------------------------------------------


def test_wilson_interval_of_eight_in_ten() -> None:
    assert proportion_interval([True] * 8 + [False] * 2) == pytest.approx((0.4902, 0.9433), abs=1e-4)


@pytest.mark.parametrize("right", [0, 1, 13, 46, 47])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
def test_wilson_ends_are_where_the_score_test_turns(right: int, confidence: float) -> None:
    """The definition, by bisection: the ends are the rates at which the observed share is z standard errors away."""
    n, share = 47, right / 47
    z = {0.5: 0.6744898, 0.95: 1.9599640, 0.99: 2.5758293}[confidence]

    def turn(inside: float, outside: float) -> float:
        for _ in range(60):
            middle = (inside + outside) / 2
            if abs(share - middle) <= z * math.sqrt(middle * (1 - middle) / n):
                inside = middle
            else:
                outside = middle
        return inside

    got = proportion_interval([True] * right + [False] * (n - right), confidence)
    assert got == pytest.approx((turn(share, 0.0), turn(share, 1.0)), abs=1e-7)


def test_wilson_interval_never_leaves_zero_to_one() -> None:
    """Rounding steps over at some n."""
    for n in range(1, 200):
        assert proportion_interval([False] * n)[0] >= 0
        assert proportion_interval([True] * n)[1] <= 1


@pytest.mark.parametrize("n", [30, 200])
def test_a_wilson_interval_covers_the_truth_at_its_stated_rate(n: int) -> None:
    """Over all rates alike: at a single one, counts come in steps and so does the coverage."""
    rng, inside = np.random.default_rng(0), 0
    for rate in rng.random(REPEATS):
        got = estimate(truth(rate, n, rng))
        inside += got.low <= rate <= got.high  # type: ignore[operator]
    assert inside / REPEATS == pytest.approx(0.95, abs=NOISE)


@pytest.mark.slow
@pytest.mark.parametrize("n", [30, 200])
@pytest.mark.parametrize("rate", [0.3, 0.9])
def test_a_bootstrap_interval_covers_the_truth_at_its_stated_rate(n: int, rate: float) -> None:
    """Shares of four samples; at n = 30 and a rate of 0.9, plain percentiles cover 0.91."""
    rng, inside = np.random.default_rng(0), 0
    for i in range(REPEATS):
        got = estimate(avg_at_4(rate, n, rng), seed=i, resamples=1000)
        inside += got.low <= rate <= got.high  # type: ignore[operator]
    assert inside / REPEATS == pytest.approx(0.95, abs=NOISE)


def test_an_estimate_of_rights_and_wrongs_is_the_share_with_its_wilson_interval() -> None:
    right = [True] * 8 + [False] * 2
    for values in (right, [float(r) for r in right], np.array(right)):
        got = estimate(values, 0.9)
        assert (got.value, got.n) == (0.8, 10)
        assert (got.low, got.high) == proportion_interval(right, 0.9)


def test_a_bootstrap_interval_of_many_questions_is_that_of_normal_theory() -> None:
    values = avg_at_4(0.4, 2000, np.random.default_rng(1))
    for confidence, z in ((0.95, 1.95996), (0.5, 0.67449)):
        got, half = estimate(values, confidence), z * values.std(ddof=1) / math.sqrt(2000)
        assert got.value == pytest.approx(values.mean())
        assert (got.low, got.high) == pytest.approx((got.value - half, got.value + half), abs=0.05 * half)


def test_a_bootstrap_interval_of_few_questions_is_as_wide_as_students() -> None:
    """At n = 10 plain percentiles are 0.82 times as wide, and with Student's quantile alone 0.95 times."""
    values = stats.norm.ppf((np.arange(10) + 0.5) / 10)
    low, high = stats.t.interval(0.95, 9, 0, values.std(ddof=1) / math.sqrt(10))
    one, two = estimate(values, resamples=40_000), paired_difference(np.zeros(10), values, resamples=40_000)
    assert (one.low, one.high) == pytest.approx((low, high), rel=0.03)
    assert (two.low, two.high) == pytest.approx((low, high), rel=0.03)


def test_a_skewed_sample_gets_the_interval_of_efrons_formula() -> None:
    """A slow twin, from equations 14.9 to 14.15 of Efron and Tibshirani (1993), at the level for few questions."""
    values = np.random.default_rng(3).lognormal(0, 1.2, size=31)
    n, mean, normal = 31, values.mean(), statistics.NormalDist()
    draws = np.random.default_rng(4).choice(values, size=(100_000, n)).mean(axis=1)
    bias = normal.inv_cdf(float((draws < mean).mean()))
    without = np.array([np.delete(values, i).mean() for i in range(n)])
    off = without.mean() - without
    acceleration = (off**3).sum() / (6 * (off**2).sum() ** 1.5)
    z = math.sqrt(31 / 30) * 2.042272  # Student's quantile at 30 degrees of freedom
    shifted = [bias + sign * z for sign in (-1, 1)]
    levels = [normal.cdf(bias + s / (1 - acceleration * s)) for s in shifted]
    low, high = np.quantile(draws, levels)
    got = estimate(values, resamples=100_000)
    assert (got.low, got.high) == pytest.approx((low, high), abs=0.03 * (high - low))
    plain = np.quantile(draws, [normal.cdf(-z), normal.cdf(z)])
    assert plain[1] < high - 0.12 * (high - low), "a sample on which percentiles would do as well shows nothing"


def test_questions_whose_value_is_not_known_are_left_out() -> None:
    got = estimate([0.25, math.nan, 0.5, None, 0.75])  # type: ignore[list-item]
    assert got == estimate([0.25, 0.5, 0.75])
    assert got.n == 3
    assert estimate([1, math.nan, 0]) == estimate([True, False])


def test_an_estimate_is_repeatable_and_follows_its_seed() -> None:
    values = avg_at_4(0.4, 50, np.random.default_rng(16))
    assert estimate(values) == estimate(values, seed=0)
    assert len({estimate(values, seed=seed, resamples=200).high for seed in range(5)}) > 1


def test_a_sample_without_spread_has_no_interval_unless_it_is_right_or_wrong() -> None:
    """A point would look like certainty; and 0.1 + 0.2 is not 0.3 by rounding only."""
    for values in ([0.5] * 30, [0.25], [17, 17], [0.1 + 0.2, 0.3]):
        got = estimate(values)
        assert got.value == pytest.approx(values[0])
        assert (got.low, got.high, got.n) == (None, None, len(values))
    assert estimate([1.0]).low == pytest.approx(0.2065, abs=1e-4)
    assert estimate([0, 0, 0]).high == pytest.approx(0.5615, abs=1e-4)


def test_no_sample_however_odd_has_an_interval_that_leaves_it() -> None:
    rng = np.random.default_rng(5)
    for n in (2, 3, 4, 9, 40):
        for values in (rng.choice([0, 0.5, 1], n), np.eye(1, n)[0] / 4, rng.lognormal(5, 2, n), 1e6 + np.arange(n)):
            for confidence in (0.5, 0.95, 0.9999):
                got = estimate(values, confidence, resamples=1000)
                if not np.isin(values, (0, 1)).all() and np.ptp(values):
                    assert got.low <= got.value <= got.high  # type: ignore[operator]
                    assert got.low == pytest.approx(np.clip(got.low, values.min(), values.max()), rel=1e-12)
                    assert got.high == pytest.approx(np.clip(got.high, values.min(), values.max()), rel=1e-12)


@pytest.mark.parametrize("values", [[], [math.nan, math.nan]])
def test_an_estimate_of_nothing_is_refused(values: list[float]) -> None:
    with pytest.raises(DataError, match=f"at least one question .* of {len(values)} none"):
        estimate(values)


def test_samples_are_not_taken_for_questions() -> None:
    """Flattened, the interval of 8 samples of 100 questions would be far too narrow."""
    with pytest.raises(DataError, match="one number per question"):
        estimate(np.zeros((100, 8)))


# ---- two runs ----------------------------------------------------------------------------------------------------


def test_interval_of_a_difference_agrees_with_normal_theory() -> None:
    rng = np.random.default_rng(1)
    before, after = truth(0.4, 2000, rng), truth(0.5, 2000, rng)
    changes = np.array(after, dtype=float) - np.array(before, dtype=float)
    got = paired_difference(before, after)
    half = 1.96 * changes.std() / math.sqrt(2000)
    assert got.difference == pytest.approx(changes.mean())
    assert got.deviation == pytest.approx(statistics.stdev(changes))
    assert (got.low, got.high) == pytest.approx((changes.mean() - half, changes.mean() + half), abs=0.05 * half)
    narrower = paired_difference(before, after, confidence=0.5)
    assert narrower.high - narrower.low == pytest.approx(2 * half * 0.6745 / 1.96, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("n", [30, 200])
def test_interval_of_a_difference_covers_the_truth_at_its_stated_rate(n: int) -> None:
    rng, inside = np.random.default_rng(6), 0
    for i in range(REPEATS):
        hard = rng.random(n)
        before, after = rng.binomial(4, 0.8 * hard) / 4, rng.binomial(4, 0.1 + 0.8 * hard) / 4
        got = paired_difference(before, after, resamples=1000, seed=i)
        inside += got.low <= 0.1 <= got.high
    assert inside / REPEATS == pytest.approx(0.95, abs=NOISE)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (0, 1), (3, 3), (0, 9), (7, 2), (2, 7), (4, 6)])
def test_mcnemar_equals_brute_force(lost: int, gained: int) -> None:
    """All ways in which the changed answers could have gone, each as likely as any other."""
    before = [True] * lost + [False] * gained + [True, False]
    after = [False] * lost + [True] * gained + [True, False]
    ways = [abs(sum(way)) >= abs(gained - lost) for way in itertools.product([-1, 1], repeat=lost + gained)]
    assert paired_difference(before, after, resamples=10).p_value == pytest.approx(sum(ways) / len(ways))


def test_mcnemar_stays_finite_on_many_questions() -> None:
    assert paired_difference([False] * 5000 + [True] * 100, [True] * 5100, resamples=10).p_value < 1e-300
    half = [True, False] * 3000
    assert paired_difference(half, [not right for right in half], resamples=10).p_value == 1.0


@pytest.mark.parametrize("resamples", [40_000, 255])
@pytest.mark.parametrize("shift", [0, 1, 2])
def test_sign_flips_equal_brute_force(shift: int, resamples: int) -> None:
    """All 2^8 signs, enumerated or drawn. In thirds, equal sums differ by rounding; to miss them would halve p."""
    before = np.array([0, 1, 2, 3, 1, 0, 2, 1]) / 3
    after = np.array([1, 2, 3, 2, 0, shift, 2, 2]) / 3
    changes = np.rint(3 * (after - before)).astype(int)
    ways = [abs(np.dot(way, changes)) >= abs(changes.sum()) for way in itertools.product([-1, 1], repeat=8)]
    exact = float(np.mean(ways))
    spread = 0 if resamples >= 256 else 4 * math.sqrt(exact * (1 - exact) / resamples) + 1 / resamples
    assert 0 < exact < 1 or shift == 0
    assert paired_difference(before, after, resamples=resamples).p_value == pytest.approx(exact, abs=spread + 1e-12)


def test_no_p_value_of_sign_flips_is_zero() -> None:
    assert paired_difference(np.full(100, 0.25), np.full(100, 0.5), resamples=999).p_value == 1 / 1000
    assert paired_difference([0.5] * 9, [0.5] * 9, resamples=99).p_value == 1.0


def test_comparison_is_repeatable_and_blind_to_what_did_not_change() -> None:
    before, after = [True, False, False, False] * 10, [True, True, False, False] * 10
    assert paired_difference(before, after) == paired_difference(before, after)
    shares = [x / 2 for x in before], [x / 2 + 0.1 * (n % 3) for n, x in enumerate(after)]
    few = [paired_difference(*shares, resamples=99, seed=seed).high for seed in range(5)]
    assert len(set(few)) > 1, "the seed has no effect"
    same = paired_difference(before, before)
    half = 1.959964 / (len(before) + 2)  # Agresti and Min: half a question lost, half gained
    assert (same.difference, same.low, same.high, same.p_value) == pytest.approx((0.0, -half, half, 1.0))


def test_pairs_that_are_not_known_on_both_sides_are_left_out() -> None:
    nan = math.nan
    got = paired_difference([0.25, nan, 0.5, 0.0, nan], [0.5, 1.0, nan, 0.75, nan])
    assert got == paired_difference([0.25, 0.0], [0.5, 0.75])
    assert got.n == 2
    with pytest.raises(DataError, match="of 2 none"):
        paired_difference([nan, 1], [1, nan])


def test_a_comparison_can_be_written_as_json() -> None:
    for before, after in (([True, False], [True, True]), ([0.25, 0.5], [0.5, 0.5]), ([True], [False])):
        record = asdict(paired_difference(before, after))
        assert json.loads(json.dumps(record, allow_nan=False)) == record
        assert {type(value) for value in record.values()} <= {float, int, type(None)}
    assert record["deviation"] is None and record["n"] == 1


def test_comparison_of_different_questions_is_refused() -> None:
    for runs in (([True], [True, False]), ([0.5, 0.5], [0.5])):
        with pytest.raises(DataError, match="same questions"):
            paired_difference(*runs)
    with pytest.raises(DataError, match="at least one question"):
        paired_difference([], [])


# ---- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 1.0, 95.0])
@pytest.mark.parametrize(
    "call",
    [
        lambda share: proportion_interval([True], share),
        lambda share: estimate([0.5, 0.25], share),
        lambda share: paired_difference([True], [True], share),
        lambda share: gap_closed([0], [1], [1], share),
        lambda share: over_seeds([0.5, 0.6], share),
        lambda share: power_of(0.1, 0.4, 100, share),
        lambda share: questions_needed(0.1, 0.4, 0.8, share),
        lambda share: questions_needed(0.1, 0.4, share),
    ],
)
def test_an_impossible_confidence_is_refused(call: Callable[[float], object], share: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        call(share)


def test_an_interval_of_no_answers_is_refused() -> None:
    with pytest.raises(DataError, match="at least one"):
        proportion_interval([])
