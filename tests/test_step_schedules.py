"""Settings by step: the share of on-policy rows, and the length of rollouts."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows
from datasets import Dataset
from helpers import MAKE_TEACHER, make_args, make_trainer

from opsd import OPSDConfig
from opsd.commands.run_file import read_run
from opsd.errors import CheckpointError, ConfigError, DataError, OPSDWarning
from opsd.training.schedules import StepSchedule

LONG = "It is nineteen, as far as one can tell from here."
SHARE, LENGTH = "lmbda_schedule", "completion_length_schedule"


def with_completions() -> Dataset:
    return Dataset.from_list([{**row, "completion": LONG} for row in make_rows(24)])


@pytest.mark.parametrize("given", [{0: 0.0, 8: 1.0}, {"0": "0", "8": 1}, {8: 1.0, 0: 0.0}])
def test_a_value_holds_from_its_step_on(given: Any) -> None:
    schedule = StepSchedule.parse(SHARE, given)
    assert [schedule.at(step) for step in (0, 7, 8, 9, 500)] == [0.0, 0.0, 1.0, 1.0, 1.0]
    assert (schedule.least, schedule.most, schedule.last) == (0.0, 1.0, 1.0)
    assert schedule.describe() == "0 from step 0, 1 from step 8"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no mapping": ({SHARE: "0.5"}, "must be a mapping of steps to values"),
    "a text that is no YAML": ({SHARE: "{0: 1"}, "lmbda_schedule begins as a mapping, and is none"),
    "no step": ({SHARE: {"early": 0.0}}, "must be a mapping of steps to values"),
    "no value at the first step": ({SHARE: {4: 1.0}}, "must begin at step 0"),
    "a step before the first": ({SHARE: {-1: 0.0, 0: 1.0}}, "must begin at step 0"),
    "no steps": ({SHARE: {}}, "must begin at step 0"),
    "a share above 1": ({SHARE: {0: 0.0, 8: 2.0}}, "lmbda_schedule must lie between 0 and 1"),
    "a share that is no number": ({SHARE: {0: float("nan")}}, "lmbda_schedule must lie between 0 and 1"),
    "two settings of one share": ({SHARE: {0: 0.0, 8: 1.0}, "lmbda": 0.5}, "two settings of one share"),
    "longer than the longest": (
        {LENGTH: {0: 4, 8: 99}, "max_completion_length": 16},
        "from 1 to max_completion_length",
    ),
    "half a token": ({LENGTH: {0: 1.5}}, "whole numbers of tokens"),
    "no token": ({LENGTH: {0: 0}}, "from 1 to max_completion_length"),
    "a policy gradient on others' tokens": (
        {SHARE: {0: 0.0, 8: 1.0}, "support": "sampled"},
        "need tokens that the student sampled",
    ),
    "groups of one completion": (
        {SHARE: {0: 0.0, 8: 1.0}, "num_generations": 2},
        "rows have one completion",
    ),
    "skipping all that the first steps have": ({LENGTH: {0: 2, 8: 9}, "skip_first_tokens": 3}, "skip_first_tokens"),
}


@pytest.mark.parametrize(("settings", "says"), REFUSED.values(), ids=REFUSED)
def test_a_schedule_that_cannot_be_is_refused_before_a_model_loads(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        OPSDConfig("runs/none", use_cpu=True, **settings)


def test_rows_need_completions_where_a_step_is_off_policy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"lmbda_schedule .0 from step 0, 1 from step 8. needs the column"):
        make_trainer(tmp_path, None, lmbda_schedule={0: 0.0, 8: 1.0})


def test_a_run_file_and_a_command_line_give_schedules(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model_name_or_path: m\ndataset_name: rows.jsonl\nlmbda_schedule: {0: 0.0, 8: 1.0}\n")
    assert read_run(path).args.on_policy_share.values == {0: 0.0, 8: 1.0}
    changed = read_run(path, ["--lmbda_schedule", "{0: 0.5, 2: 1.0}", "--completion_length_schedule", "{0: 4, 5: 8}"])
    assert changed.args.on_policy_share.values == {0: 0.5, 2: 1.0}
    assert changed.args.completion_length.values == {0: 4, 5: 8}


def test_a_schedule_that_ends_off_policy_is_named(tmp_path: Path) -> None:
    with pytest.warns(OPSDWarning, match="exposure bias"):
        make_args(tmp_path, lmbda_schedule={0: 1.0, 8: 0.0})
    make_args(tmp_path, lmbda_schedule={0: 0.0, 8: 1.0})  # the suite fails on a warning


def test_steps_are_off_policy_and_then_on_policy_and_rollouts_grow(tmp_path: Path) -> None:
    rows = with_completions()
    schedules = {"lmbda_schedule": {0: 0.0, 2: 1.0}, "completion_length_schedule": {0: 3, 3: 6}}
    trainer = make_trainer(tmp_path, "same_checkpoint", rows=rows, max_steps=4, max_completion_length=6, **schedules)
    lengths, sample = [], trainer._sample

    def recorded(batch: Any, count: int) -> Any:
        rollouts = sample(batch, count)
        lengths.append((trainer.state.global_step, count, max(map(len, rollouts.completion_ids))))
        return rollouts

    trainer._sample = recorded  # type: ignore[method-assign]
    trainer.train()
    size = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    assert [(step, count) for step, count, _ in lengths] == [(0, 0), (1, 0), (2, size), (3, size)]
    assert [longest for *_, longest in lengths] == [3, 3, 3, 6]
    logged = [entry for entry in trainer.state.log_history if "divergence" in entry]
    assert [entry["lmbda"] for entry in logged] == [0.0, 0.0, 1.0, 1.0]
    assert [entry["completions/limit"] for entry in logged] == [3, 3, 3, 6]


def test_a_resumed_run_goes_on_with_the_schedule_and_refuses_another(tmp_path: Path) -> None:
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    settings = {"rows": with_completions(), "lmbda_schedule": {0: 0.0, 2: 1.0}, **saving}
    whole = make_trainer(tmp_path / "whole", MAKE_TEACHER["ema"](), **settings)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "again" / "checkpoint-1")
    other = {**settings, "lmbda_schedule": {0: 0.0, 3: 1.0}}
    with pytest.raises(CheckpointError, match="lmbda_schedule"):
        make_trainer(tmp_path / "again", MAKE_TEACHER["ema"](), **other).train(resume_from_checkpoint=True)
    again = make_trainer(tmp_path / "again", MAKE_TEACHER["ema"](), **settings)
    again.train(resume_from_checkpoint=True)
    for (name, a), (_, b) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert a.equal(b), name
