"""How often tests reject: at their level where models are equal, with the power of theory where they differ.

Shares counted in 1,000 simulated repeats may be 0.02 off, see tests/test_statistics.py.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from opsd.evaluation.power import power_of, questions_needed
from opsd.evaluation.statistics import paired_difference

REPEATS, NOISE = 1000, 0.02


def truth(rate: float, n: int, rng: np.random.Generator) -> list[bool]:
    return (rng.random(n) < rate).tolist()


# ---- level --------------------------------------------------------------------------------------------------------


def mcnemar_rejects(n: int, lost: float, gained: float) -> float:
    """How often McNemar's exact test rejects at 5 %, by enumeration of all counts of lost and gained answers."""
    changed = np.arange(n + 1)[:, None]
    ups = np.arange(n + 1)[None, :]
    p_values = np.minimum(1, 2 * stats.binom.cdf(np.minimum(ups, changed - ups), changed, 0.5))
    chances = stats.binom.pmf(changed, n, lost + gained) * stats.binom.pmf(ups, changed, gained / (lost + gained))
    return float(chances[(p_values < 0.05) & (ups <= changed)].sum())


def test_mcnemar_rejects_equal_models_as_often_as_enumeration_says() -> None:
    rng = np.random.default_rng(2)
    results = [paired_difference(truth(0.5, 200, rng), truth(0.5, 200, rng), resamples=500) for _ in range(REPEATS)]
    exact = mcnemar_rejects(200, 0.25, 0.25)
    assert 0.03 < exact < 0.045, "an exact test on counts stays below its level"
    assert np.mean([result.p_value < 0.05 for result in results]) == pytest.approx(exact, abs=NOISE)
    assert np.mean([not result.low <= 0 <= result.high for result in results]) == pytest.approx(0.05, abs=NOISE)


@pytest.mark.slow
@pytest.mark.parametrize("n", [30, 200])
def test_sign_flips_reject_equal_models_in_one_of_twenty_cases(n: int) -> None:
    rng, rejected = np.random.default_rng(7), 0
    for i in range(REPEATS):
        hard = rng.random(n)
        before, after = rng.binomial(4, hard) / 4, rng.binomial(4, hard) / 4
        rejected += paired_difference(before, after, resamples=199, seed=i).p_value <= 0.05
    assert rejected / REPEATS == pytest.approx(0.05, abs=NOISE)


# ---- power --------------------------------------------------------------------------------------------------------


def test_questions_needed_for_half_a_deviation_is_32() -> None:
    """(1.96 + 0.8416)² / 0.25 = 31.4; the sign of the difference is of no matter."""
    assert questions_needed(0.5, 1.0) == questions_needed(-0.5, 1.0) == 32
    assert questions_needed(0.05, 0.4) == 503  # 2.8016² · 64 = 502.3
    assert questions_needed(0.0, 0.4) is None
    assert questions_needed(0.5, 0.0) == 1


@pytest.mark.parametrize("difference", [0.01, -0.05, 0.3])
@pytest.mark.parametrize("power", [0.5, 0.8, 0.99])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.999])
def test_questions_needed_is_the_smallest_number_with_the_power(
    difference: float, power: float, confidence: float
) -> None:
    """Apart from the chance to find it on the wrong side, at a power of 0.5 and a confidence of 0.9 that is Φ(-3.3)."""
    n = questions_needed(difference, 0.4, power, confidence)
    assert n is not None
    assert power_of(difference, 0.4, n, confidence) >= power
    assert power_of(difference, 0.4, n - 1, confidence) < power + 0.0005


def test_power_ends_at_the_level_of_the_test_and_at_certainty() -> None:
    assert power_of(0.0, 0.4, 400) == pytest.approx(0.05)
    assert power_of(0.0, 0.0, 400) == pytest.approx(0.05)
    assert power_of(0.1, 0.0, 1) == 1.0
    assert power_of(0.2, 0.4, 4000) == pytest.approx(1.0)


@pytest.mark.slow
def test_a_gain_of_five_points_is_found_as_often_as_theory_says() -> None:
    """avg@4 on 400 questions, sign flips; 0.045 is three times the binomial spread at this power."""
    rng, p_values = np.random.default_rng(8), []
    # Difficulties uniform on 0 to 0.95: of four answers each, a difference has the variance 2·E[p(1-p)]/4 and a bit.
    hard = 0.95 * (np.arange(200_000) + 0.5) / 200_000
    variance = np.mean(hard * (1 - hard) + (hard + 0.05) * (0.95 - hard)) / 4
    for i in range(REPEATS):
        rates = rng.choice(hard, 400)
        before, after = rng.binomial(4, rates) / 4, rng.binomial(4, rates + 0.05) / 4
        p_values.append(paired_difference(before, after, resamples=299, seed=i).p_value)
    theory = power_of(0.05, math.sqrt(variance), 400)
    assert 0.5 < theory < 0.97, "a power at which a wrong formula shows"
    assert np.mean(np.array(p_values) <= 0.05) == pytest.approx(theory, abs=0.045)


def test_mcnemar_finds_a_gain_of_five_points_a_little_less_often_than_theory_says() -> None:
    lost, gained, n = 0.05, 0.10, 400
    theory = power_of(0.05, math.sqrt(lost + gained - 0.05**2), n)
    exact = mcnemar_rejects(n, lost, gained)
    assert theory - 0.06 < exact < theory
    rng, found = np.random.default_rng(9), 0
    for _ in range(REPEATS):
        where = rng.random(n)
        found += paired_difference(where < lost, (where >= lost) & (where < lost + gained), resamples=10).p_value < 0.05
    assert found / REPEATS == pytest.approx(exact, abs=0.045)
