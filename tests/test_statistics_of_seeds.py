"""Statistics over seeds, the share of a gap, and many comparisons: by hand, against closed forms and by simulation.

Shares counted in 1,000 simulated repeats may be 0.02 off, see tests/test_statistics.py.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
import pytest

from opsd.errors import DataError
from opsd.evaluation.statistics import adjusted, gap_closed, over_seeds, share_of_gap

REPEATS, NOISE = 1000, 0.02


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """Warnings of scipy and numpy about a sample do not reach the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# ---- over seeds --------------------------------------------------------------------------------------------------


def test_interval_over_seeds_by_hand() -> None:
    """Student's quantile at 2 degrees of freedom is 4.3027; the deviation of 1, 2, 3 is 1."""
    got = over_seeds([1.0, 2.0, 3.0])
    assert (got.mean, got.deviation, got.seeds) == (2.0, 1.0, 3)
    assert (got.low, got.high) == pytest.approx((2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), abs=1e-4)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_interval_over_seeds_covers_the_truth_at_its_stated_rate(seeds: int) -> None:
    rng = np.random.default_rng(10)
    found = [over_seeds(rng.normal(0.6, 0.02, size=seeds)) for _ in range(REPEATS)]
    assert np.mean([s.low <= 0.6 <= s.high for s in found]) == pytest.approx(0.95, abs=NOISE)  # type: ignore[operator]


def test_one_seed_shows_no_spread_and_equal_seeds_no_interval() -> None:
    assert asdict(over_seeds([0.5])) == {"mean": 0.5, "deviation": None, "low": None, "high": None, "seeds": 1}
    same = over_seeds([0.5, 0.5])
    assert (same.deviation, same.low, same.high) == (0.0, None, None)


@pytest.mark.parametrize("values", [[], [0.5, math.nan], [0.5, math.inf], [[0.5, 0.6]]])
def test_a_seed_without_a_figure_is_refused(values: list[float]) -> None:
    with pytest.raises(DataError, match="one finite number per seed"):
        over_seeds(values)


# ---- the share of a gap ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "ceiling", "share"),
    [
        (0.25, 0.5, 0.75, 0.5),
        (0.5, 0.25, 0.75, -1.0),
        (0.5, 1.0, 0.75, 2.0),
        (0.5, 0.6, 0.5, None),
        (0.5, 0.6, 0.4, None),
    ],
)
def test_share_of_the_gap_is_none_where_there_is_no_gap(
    before: float, after: float, ceiling: float, share: float | None
) -> None:
    assert share_of_gap(before, after, ceiling) == share


def three_runs(n: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Rates 0.3, 0.45 and 0.7 on questions that are hard for all three alike: 0.375 of the gap is closed."""
    hard = rng.beta(0.6, 0.6, size=n) - 0.5
    return tuple(rng.random(n) < rate + 0.6 * hard for rate in (0.3, 0.45, 0.7))


def test_the_share_of_a_gap_is_repeatable_and_follows_its_seed() -> None:
    runs = three_runs(100, np.random.default_rng(17))
    assert gap_closed(*runs) == gap_closed(*runs)
    assert len({gap_closed(*runs, seed=seed, resamples=200).high for seed in range(5)}) > 1  # type: ignore[union-attr]


@pytest.mark.slow
def test_share_of_the_gap_covers_the_truth_at_its_stated_rate() -> None:
    rng = np.random.default_rng(11)
    found = [gap_closed(*three_runs(200, rng), seed=i, resamples=1000) for i in range(REPEATS)]
    inside = [share is not None and share.low <= 0.375 <= share.high for share in found]  # type: ignore[operator]
    assert np.mean(inside) == pytest.approx(0.95, abs=NOISE)


def test_interval_of_the_share_is_that_of_fieller() -> None:
    """E. C. Fieller (1954): the shares s at which gain - s·gap is not told from 0, question by question."""
    before, after, ceiling = (run.astype(float) for run in three_runs(2000, np.random.default_rng(12)))
    for confidence, z in ((0.95, 1.95996), (0.5, 0.67449)):
        got = gap_closed(before, after, ceiling, confidence)
        assert got is not None
        assert got.value == share_of_gap(before.mean(), after.mean(), ceiling.mean())
        shares = np.linspace(0, 1, 4001)
        rest = (after - before)[:, None] - shares * (ceiling - before)[:, None]
        inside = shares[abs(rest.mean(axis=0)) <= z * rest.std(axis=0) / math.sqrt(2000)]
        width = inside.max() - inside.min()
        assert (got.low, got.high) == pytest.approx((inside.min(), inside.max()), abs=0.04 * width)


def test_a_gap_that_chance_could_have_made_has_no_share() -> None:
    """Seven questions in 100 against three: resamples without a gap are a tenth of all, against 2.5 % of a tail."""
    before = np.arange(100) < 3
    for gap, told in ((4, False), (30, True)):
        ceiling = (np.arange(100) >= 3) & (np.arange(100) < 6 + gap)
        after = np.arange(100) < 10
        assert (gap_closed(before, after, ceiling, resamples=2000) is not None) == told
    assert gap_closed(before, after, before) is None
    assert gap_closed(ceiling, after, before) is None


def test_resamples_without_a_gap_count_beyond_the_end_that_the_gain_points_to() -> None:
    """A gap of 38 questions, 2.14 deviations of 17.8: 1.8 % of resamples have none, 2.44 % lie beyond each end.

    The far end is the gain over the gap's own end, 100 / (38 - 1.968 · 17.8) = 33, counts being whole 25, 33 or 50.
    Were those resamples dropped, or put at the other end, it would be 14.
    """
    before, ceiling = np.zeros(400), np.zeros(400)
    before[:141], ceiling[141:320] = 1, 1
    for gain in (0.25, -0.25):
        got = gap_closed(before, before + gain, ceiling)
        assert got is not None and got.low is not None and got.high is not None
        assert got.value == pytest.approx(gain * 400 / 38)
        far, near = (got.high, got.low) if gain > 0 else (-got.low, -got.high)
        assert 24 < far < 51
        assert near == pytest.approx(100 / (38 + 1.968 * 17.8), rel=0.05)
    # With 82 resamples two may lie beyond an end, which is then the last finite one.
    few = [gap_closed(before, before + 0.25, ceiling, seed=seed, resamples=82) for seed in range(50)]
    assert 0 < sum(share is None for share in few) < 50
    assert all(math.isfinite(share.high) for share in few if share)  # type: ignore[arg-type]


def test_a_share_without_spread_has_no_interval_and_unknown_questions_are_left_out() -> None:
    got = gap_closed([0.0] * 5, [0.5] * 5, [1.0] * 5)
    assert got is not None and (got.value, got.low, got.high, got.n) == (0.5, None, None, 5)
    nan, rng = math.nan, np.random.default_rng(13)
    before, after, ceiling = (run.astype(float) for run in three_runs(100, rng))
    less = gap_closed(before[3:], after[3:], ceiling[3:])
    before[0], after[1], ceiling[2] = nan, nan, nan
    assert gap_closed(before, after, ceiling) == less
    with pytest.raises(DataError, match="same questions"):
        gap_closed([0.0, 1.0], [1.0, 1.0], [1.0])


# ---- many comparisons --------------------------------------------------------------------------------------------


def test_adjusted_p_values_are_those_of_the_closed_test() -> None:
    """The definition behind Holm: p of i is the largest, over all sets with i, of the set's own Bonferroni p-value."""
    rng = np.random.default_rng(14)
    for m in (1, 2, 3, 5, 7):
        raw = rng.choice([0.001, 0.004, 0.01, 0.02, 0.3, 0.6, 0.9], size=m)
        sets = [set(s) for size in range(1, m + 1) for s in itertools.combinations(range(m), size)]
        for i, got in enumerate(adjusted(raw.tolist())):
            assert got == pytest.approx(max(min(1.0, len(s) * min(raw[j] for j in s)) for s in sets if i in s))
    assert adjusted([]) == []
    assert adjusted([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])


def test_holm_errs_in_all_as_often_as_stated() -> None:
    """Ten comparisons without any difference: the smallest of them is below 0.05 in 40 % of cases."""
    raw = np.random.default_rng(15).random((REPEATS, 10))
    assert np.mean(raw.min(axis=1) < 0.05) == pytest.approx(0.40, abs=0.05)
    assert np.mean([min(adjusted(row)) < 0.05 for row in raw]) == pytest.approx(0.05, abs=NOISE)
