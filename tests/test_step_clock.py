"""Where a step's time goes: parts add up, an evaluation is none of them, and what broke off is forgotten."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from evaluation_runs import DEV, PLAN, make

from opsd.health.bound import ROLLOUTS, TEACHER
from opsd.training.step_clock import StepClock


def test_parts_of_a_step_add_up_and_begin_anew() -> None:
    clock = StepClock()
    for name in (ROLLOUTS, TEACHER, ROLLOUTS):
        with clock.part(name):
            time.sleep(0.02)
    tallies = clock.tallies(torch.device("cpu"))
    assert 0.04 <= tallies[ROLLOUTS].result < 1 and 0.02 <= tallies[TEACHER].result < 0.5
    assert tallies["memory_gib"].result > 0.05
    assert set(clock.tallies(torch.device("cpu"))) == {"memory_gib"}
    with clock.part(ROLLOUTS):
        pass
    clock.forget()
    assert ROLLOUTS not in clock.tallies(torch.device("cpu"))


def test_a_block_that_breaks_off_is_not_counted() -> None:
    clock = StepClock()
    with pytest.raises(KeyboardInterrupt), clock.part(ROLLOUTS):
        raise KeyboardInterrupt
    assert ROLLOUTS not in clock.tallies(torch.device("cpu"))


def test_rollouts_and_teacher_take_less_than_their_step(tmp_path: Path) -> None:
    rows = [{**row} for row in DEV]
    trainer = make(tmp_path, max_steps=3, logging_steps=1, evaluation={**PLAN, "selection": rows, "every": 1})
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "divergence" in entry]
    for entry in entries[1:]:  # TRL times from the second step on what is between two steps
        assert entry[ROLLOUTS] > 0 and entry[TEACHER] > 0
        assert entry[ROLLOUTS] + entry[TEACHER] <= entry["step_time"] * 1.05
