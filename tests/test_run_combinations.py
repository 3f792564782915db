"""Whole runs of random combinations log what their slow twin computes from the same rollouts."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from run_combinations import draw
from run_twin import gaps

from opsd.errors import OPSDError

SEEDS_APART = 1000


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 4 * SEEDS_APART, SEEDS_APART))
def test_a_random_run_logs_what_a_float64_recomputation_gives(first: int, tmp_path: Path) -> None:
    """Five combinations; benchmarks/combinations.py runs 300 more."""
    compared = 0
    for seed in itertools.count(first):
        combination = draw(seed)
        try:
            found = gaps(combination, tmp_path / str(seed))
        except OPSDError:
            continue
        wrong = [gap for gap in found if not gap.within(combination.rounding)]
        assert not wrong, f"{combination}: {wrong}"
        compared += 1
        if compared == 5:
            return
