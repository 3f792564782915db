"""Intervals and paired tests: against closed forms, by hand and by simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from opsd.errors import ConfigError, DataError
from opsd.evaluation import (
    paired_difference,
    proportion_interval,
    share_of_gap,
)


def truth(rate: float, n: int, rng: np.random.Generator) -> list[bool]:
    return (rng.random(n) < rate).tolist()


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


@pytest.mark.parametrize("rate", [0.03, 0.3, 0.9])
def test_wilson_interval_covers_the_truth_at_its_stated_rate(rate: float) -> None:
    rng = np.random.default_rng(0)
    intervals = [proportion_interval(truth(rate, 200, rng)) for _ in range(1000)]
    assert np.mean([low <= rate <= high for low, high in intervals]) == pytest.approx(0.95, abs=0.02)


def test_bootstrap_interval_agrees_with_normal_theory() -> None:
    rng = np.random.default_rng(1)
    before, after = truth(0.4, 2000, rng), truth(0.5, 2000, rng)
    changes = np.array(after, dtype=float) - np.array(before, dtype=float)
    got = paired_difference(before, after)
    half = 1.96 * changes.std() / math.sqrt(2000)
    assert got.difference == pytest.approx(changes.mean())
    assert (got.low, got.high) == pytest.approx((changes.mean() - half, changes.mean() + half), abs=0.05 * half)
    narrower = paired_difference(before, after, confidence=0.5)
    assert narrower.high - narrower.low == pytest.approx(2 * half * 0.6745 / 1.96, rel=0.05)


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


def test_comparison_of_two_equal_models_rejects_at_its_stated_rate() -> None:
    rng = np.random.default_rng(2)
    results = [paired_difference(truth(0.5, 200, rng), truth(0.5, 200, rng), resamples=1000) for _ in range(1000)]
    # An exact test on counts stays below its level: at about 100 changed answers it rejects in 3.5 to 4.5 % of cases.
    assert 0.02 < np.mean([result.p_value < 0.05 for result in results]) < 0.05
    assert np.mean([not result.low <= 0 <= result.high for result in results]) == pytest.approx(0.05, abs=0.02)


def test_comparison_is_repeatable_and_blind_to_what_did_not_change() -> None:
    before, after = [True, False, False, False] * 10, [True, True, False, False] * 10
    assert paired_difference(before, after) == paired_difference(before, after)
    same = paired_difference(before, before)
    assert (same.difference, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("runs", [([True], [True, False]), ([], [])])
def test_comparison_of_different_questions_is_refused(runs: tuple[list[bool], list[bool]]) -> None:
    with pytest.raises(DataError, match="same questions"):
        paired_difference(*runs)


def test_interval_of_nothing_or_at_an_impossible_confidence_is_refused() -> None:
    with pytest.raises(DataError, match="at least one"):
        proportion_interval([])
    for confidence in (0.0, 1.0, 95.0):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            proportion_interval([True], confidence)
        with pytest.raises(ConfigError, match="between 0 and 1"):
            paired_difference([True], [True], confidence)


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
