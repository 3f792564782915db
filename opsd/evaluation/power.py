"""How many questions or seeds a comparison needs, and its power at a given size.

Normal approximations, as in E. Miller, "Adding Error Bars to Evals" (arXiv 2411.00640). Knows numbers only.
"""

from __future__ import annotations

import math
from statistics import NormalDist

from opsd.evaluation.statistics import check_rate

MAX_SEEDS = 999  # the search ends there


def power_of(difference: float, deviation: float, n: int, confidence: float = 0.95) -> float:
    """Return the power of a paired comparison on `n` questions for this difference: Φ(s - z) + Φ(-s - z).

    s = |difference|·sqrt(n) / deviation, z = Φ⁻¹((1 + confidence) / 2): a normal approximation, as in E. Miller,
    "Adding Error Bars to Evals" (arXiv 2411.00640). McNemar's exact test has slightly less power.

    Args:
        difference: the true difference, in the unit of the metric.
        deviation: of the differences per question, `PairedDifference.deviation`; specific to the k of avg@k.
        n: number of questions.
        confidence: 1 minus the level of the test.

    Raises:
        ConfigError: `confidence` is not between 0 and 1.
    """
    check_rate("confidence", confidence)
    normal = NormalDist()
    z = normal.inv_cdf((1 + confidence) / 2)
    if deviation == 0:
        return 1.0 if difference else 1 - confidence
    shift = abs(difference) * math.sqrt(n) / deviation
    return normal.cdf(shift - z) + normal.cdf(-shift - z)


def questions_needed(difference: float, deviation: float, power: float = 0.8, confidence: float = 0.95) -> int | None:
    """Return how many questions a paired comparison needs to find this difference, None where the difference is 0.

    n = ((z + Φ⁻¹(power)) · deviation / difference)², z = Φ⁻¹((1 + confidence) / 2), rounded up: `power_of` solved for n
    without its second term, the probability of a significant difference in the wrong direction. E. Miller, "Adding
    Error Bars to Evals" (arXiv 2411.00640), where deviation² is ω² + σ_A²/K_A + σ_B²/K_B.

    Args:
        difference: the true difference, in the unit of the metric.
        deviation: of the differences per question, `PairedDifference.deviation`; specific to the k of avg@k.
        power: probability with which the difference is found.
        confidence: 1 minus the level of the test.

    Raises:
        ConfigError: `power` or `confidence` is not between 0 and 1.
    """
    check_rate("confidence", confidence)
    check_rate("power", power)
    if difference == 0:
        return None
    normal = NormalDist()
    distance = max(0.0, normal.inv_cdf((1 + confidence) / 2) + normal.inv_cdf(power))
    return max(1, math.ceil((distance * deviation / difference) ** 2))


def seeds_needed(difference: float, deviation: float, power: float = 0.8, confidence: float = 0.95) -> int:
    """Return how many training seeds a paired comparison by Student's t needs to find this difference.

    By the noncentral t distribution: with few seeds the normal approximation overestimates the power twofold.

    Args:
        difference: the true mean difference over seeds; not 0.
        deviation: of the differences of paired seeds, `SeedSpread.deviation`.
        power: probability with which the difference is found.
        confidence: 1 minus the level of the test.

    Raises:
        ConfigError: `power` or `confidence` is not between 0 and 1.
    """
    from scipy import stats  # type: ignore[import-untyped]

    check_rate("confidence", confidence)
    check_rate("power", power)
    seeds = 2
    while deviation > 0:
        shift = abs(difference) * math.sqrt(seeds) / deviation
        critical = stats.t.ppf((1 + confidence) / 2, seeds - 1)
        if stats.nct.sf(critical, seeds - 1, shift) >= power or seeds >= MAX_SEEDS:
            break
        seeds += 1
    return seeds
