"""The selection split during training, the checkpoint that the rule picks, and `trainer.evaluate()`."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama, make_tokenizer
from datasets import Dataset
from evaluation_runs import DEV, GRADER, KEPT, PLAN, TRAIN, make, results
from helpers import LORA, make_args, snapshot
from peft import LoraConfig
from transformers import TrainerCallback

from opsd import OPSDTrainer, SameCheckpointTeacher
from opsd.errors import CheckpointError, ConfigError, OPSDWarning
from opsd.evaluation.summary import read_summary

# ---- while it goes on, and the rule ---------------------------------------------------------------------------------


def test_the_selection_split_is_looked_at_every_few_steps_and_logged(tmp_path: Path) -> None:
    trainer = make(tmp_path, evaluation={**PLAN, "selection": DEV, "every": 2}, max_steps=4, logging_steps=3)
    trainer.train()
    looks = read_summary(tmp_path / "evaluation")["selection"]
    assert [look["step"] for look in looks] == [0, 2, 4]
    assert not list((tmp_path / "evaluation").glob("selection.*")), "it is looked at on the way, not before and after"
    entries = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert [entry["step"] for entry in entries] == [0, 2, 4]
    assert [entry["eval_accuracy"] for entry in entries] == [look["accuracy"]["value"] for look in looks]
    assert all("divergence" not in entry for entry in entries), "what training has not logged yet is not evaluation's"


@pytest.mark.parametrize("lora", [False, True])
def test_rule_best_ends_with_the_checkpoint_that_the_selection_split_chose(tmp_path: Path, lora: bool) -> None:
    peft = LoraConfig(**LORA) if lora else None
    plan = {**PLAN, "selection": DEV, "every": 1, "rule": "best"}
    trainer = make(tmp_path, evaluation=plan, max_steps=5, learning_rate=3e-2, peft_config=peft)
    seen: dict[int, dict[str, torch.Tensor]] = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen[state.global_step] = snapshot(trainer.student.model)

    trainer.add_callback(Keep())
    trainer.train()
    summary, found = read_summary(tmp_path / "evaluation"), results(tmp_path)
    looks = {look["step"]: look["accuracy"]["value"] for look in summary["selection"] if look["step"]}
    best = max(looks, key=lambda step: (looks[step], -step))
    assert 1 <= best < 5, "this case must be one where the last step is not the best"
    assert summary["chosen"] == f"step {best}: the best on the selection split"
    final = snapshot(trainer.student.model)
    assert all(torch.equal(final[name], seen[best][name]) for name in final)
    assert list(found)[-2:] == ["last", "after"] and found["last"].greedy != found["after"].greedy


def test_rule_last_ends_with_the_last_step_and_says_so(tmp_path: Path) -> None:
    make(tmp_path).train()
    assert read_summary(tmp_path / "evaluation")["chosen"] == "step 2: the last step's"


def test_a_gate_may_read_how_the_selection_split_is_answered(tmp_path: Path) -> None:
    teacher = {"strategy": "snapshot", "every": 2, "gate": {"metric": "eval_accuracy"}}
    plan = {**PLAN, "selection": DEV, "every": 2}
    trainer = make(tmp_path, {**teacher, "context": "worked_solution"}, plan, max_steps=4)
    trainer.train()
    with pytest.raises(ConfigError, match="every is 3"):
        make(tmp_path / "b", {**teacher, "context": "worked_solution"}, {**plan, "every": 3})
    with pytest.raises(ConfigError, match="eval_accuracy"):
        make(tmp_path / "c", {**teacher, "context": "worked_solution"}, PLAN)


@pytest.mark.slow
def test_a_resumed_run_keeps_what_was_measured_before_it_stopped(tmp_path: Path) -> None:
    plan = {**PLAN, "selection": DEV, "every": 1, "neutral": KEPT}
    often = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "lr_scheduler_type": "constant"}

    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    first = make(tmp_path / "parts", evaluation=plan, **often)
    first.add_callback(Stop())
    first.train()
    folder = tmp_path / "parts" / "evaluation"
    assert not (folder / "after.json").exists(), "a run that was stopped has not been measured to its end"
    before = (folder / "before.json").read_bytes()
    make(tmp_path / "parts", evaluation=plan, **often).train(resume_from_checkpoint=True)
    make(tmp_path / "whole", evaluation=plan, **often).train()
    assert (folder / "before.json").read_bytes() == before
    parts, whole = (read_summary(tmp_path / name / "evaluation") for name in ("parts", "whole"))
    assert parts == whole and [look["step"] for look in parts["selection"]] == [0, 1, 2, 3, 4]


def test_figures_are_finite_and_name_their_grader(tmp_path: Path) -> None:
    make(tmp_path).train()
    for found in read_summary(tmp_path / "evaluation")["metrics"].values():
        assert found["grader"] == GRADER
        assert math.isfinite(found["accuracy"]["value"]) and found["accuracy"]["low"] <= found["accuracy"]["high"]


# ---- evaluate() of the trainer --------------------------------------------------------------------------------------


def test_a_look_after_training_keeps_what_the_run_came_to(tmp_path: Path) -> None:
    trainer = make(tmp_path, evaluation={**PLAN, "selection": DEV, "every": 1})
    trainer.train()
    before = read_summary(tmp_path / "evaluation")
    found = trainer.evaluate()
    after = read_summary(tmp_path / "evaluation")
    assert (
        set(found) == {"eval_accuracy", "eval_length", "eval_questions", "eval_p_value"}
        and after["gain"] == before["gain"]
    )
    assert [look["step"] for look in after["selection"]] == [0, 1, 2]


def test_rows_that_are_named_are_the_ones_evaluated(tmp_path: Path) -> None:
    trainer = make(tmp_path, evaluation={**PLAN, "selection": DEV, "every": 1})
    found = trainer.evaluate(Dataset.from_list(KEPT))
    assert "eval_loss" in found and "eval_accuracy" not in found


def test_several_evaluation_sets_are_one_look(tmp_path: Path) -> None:
    sets = {"one": Dataset.from_list(KEPT[:4]), "two": Dataset.from_list(KEPT[4:])}
    trainer = OPSDTrainer(
        make_llama(0),
        SameCheckpointTeacher(context="worked_solution"),
        args=make_args(tmp_path),
        train_dataset=Dataset.from_list(TRAIN),
        eval_dataset=sets,
        processing_class=make_tokenizer(),
        evaluation={**PLAN, "selection": DEV, "every": 2},
    )
    trainer.train()
    entries = trainer.state.log_history
    assert [entry["step"] for entry in entries if "eval_accuracy" in entry] == [0, 2]
    assert sum("eval_one_loss" in entry or "eval_two_loss" in entry for entry in entries) == 2


def test_a_resume_must_follow_the_plan_that_was_declared(tmp_path: Path) -> None:
    often = {"save_strategy": "steps", "save_steps": 1}
    make(tmp_path, max_steps=1, **often).train()
    for change in ({"test": KEPT}, {"grader": "exact"}, {"samples": 1}):
        with pytest.raises(CheckpointError, match="evaluation"):
            make(tmp_path, evaluation={**PLAN, **change}, max_steps=2, **often).train(resume_from_checkpoint=True)


def test_another_interval_of_evaluation_is_said_to_give_way(tmp_path: Path) -> None:
    with pytest.warns(OPSDWarning, match="every 2 steps, and eval_steps is 1"):
        make(tmp_path, evaluation={**PLAN, "selection": DEV, "every": 2}, eval_strategy="steps", eval_steps=1)
