"""What bounds a step: shares that add up, and advice on the largest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import MAKE_TEACHER, make_trainer

from opsd.health.bound import HELPS, bound_of_step, shares_of_step


def entry(rollouts: float, teacher: float, whole: float = 10.0) -> dict[str, float]:
    return {"step_time": whole, "seconds/rollouts": rollouts, "seconds/teacher": teacher}


@pytest.mark.parametrize(
    ("rollouts", "teacher", "largest"), [(6.0, 1.0, "rollouts"), (1.0, 7.0, "teacher"), (1.0, 1.0, "training")]
)
def test_the_largest_part_is_named_with_what_helps(rollouts: float, teacher: float, largest: str) -> None:
    logs = [entry(9.0, 0.5, 90.0), *[entry(rollouts, teacher)] * 3]  # the first step warms up
    shares = shares_of_step(logs)
    assert next(iter(shares)) == largest and sum(shares.values()) == pytest.approx(1.0)
    assert bound_of_step(logs).endswith(HELPS[largest])


def test_a_log_without_seconds_says_nothing() -> None:
    assert bound_of_step([{"loss": 1.0}]) == bound_of_step([]) == ""


def test_a_run_says_it_at_its_end(tmp_path: Path, capsys: Any) -> None:
    make_trainer(tmp_path, MAKE_TEACHER["same_checkpoint"](), max_steps=2).train()
    out = capsys.readouterr().out
    assert "\ntime        a step is " in out and "To shorten it: " in out
