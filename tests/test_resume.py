"""Checkpoints: a run that was stopped, broken or killed goes on as the same run, and as no other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama, make_rows
from datasets import Dataset
from helpers import (
    MAKE_TEACHER,
    RUNS,
    logged,
    make_trainer,
)
from safetensors.torch import load_file

from opsd import (
    EMATeacher,
    LiveTeacher,
    SameCheckpointTeacher,
    sources,
)
from opsd.data.order import EpochSampler
from opsd.errors import CheckpointError
from opsd.teachers.weight_copy import digest


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 5])  # in epoch 0 and in epoch 1: three steps make an epoch of twelve rows
@pytest.mark.parametrize(("teacher", "student"), RUNS)
def test_a_resumed_run_is_the_run_without_the_stop(tmp_path: Path, teacher: str, student: str, stop: int) -> None:
    """Invariant 6: weights, teacher, random state and log, to the last bit."""
    settings = {"max_steps": 7, "save_strategy": "steps", "save_steps": 1, "learning_rate": 5e-3}
    whole = make_trainer(tmp_path / "whole", MAKE_TEACHER[teacher](), student, **settings)
    whole.train()
    random_state = torch.get_rng_state()
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{stop}", tmp_path / "again" / f"checkpoint-{stop}")
    torch.manual_seed(123)
    again = make_trainer(tmp_path / "again", MAKE_TEACHER[teacher](), student, **settings)
    again.train(resume_from_checkpoint=True)
    for (name, a), (_, b) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    for name, value in whole.teacher.state_dict().items():
        assert torch.equal(value, again.teacher.state_dict()[name]), name
    assert logged(whole, "divergence") == logged(again, "divergence")
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_average_follows_every_step_of_a_run_and_is_in_that_steps_checkpoint(tmp_path: Path) -> None:
    """A teacher that is never told of a step, or told after the save, fails here."""
    trainer = make_trainer(tmp_path, MAKE_TEACHER["ema"](), max_steps=3, save_strategy="steps", save_steps=1)
    average = {name: value.clone() for name, value in trainer.teacher.weight_copy.values.items()}
    trainer.train()
    for step in (1, 2, 3):
        student = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        saved = load_file(tmp_path / f"checkpoint-{step}" / "opsd_teacher.safetensors")
        for name in average:
            average[name] = 0.8 * average[name] + 0.2 * student[name]
            assert torch.allclose(saved[name], average[name], atol=1e-7), (step, name)
    assert any(not torch.equal(average[name], student[name]) for name in average)


def test_epochs_have_orders_of_their_own_and_repeat_batches_for_accumulation() -> None:
    epoch = 0
    sampler = EpochSampler(10, batch_size=4, repeats=2, shuffle=True, seed=3, epoch=lambda: epoch)
    first = list(sampler)
    assert first == list(sampler) and len(first) == len(sampler) == 16
    assert first[:4] == first[4:8] and len(set(first)) == 8
    epoch = 1
    assert list(sampler) != first


def test_the_teacher_stays_out_of_the_final_model(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, EMATeacher(0.9, context="answer_only"), "lora", save_strategy="steps", save_steps=1
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert not list((tmp_path / "final").glob("**/*teacher*"))
    assert [p.name for p in (tmp_path / "final").rglob("adapter_model.safetensors")] == ["adapter_model.safetensors"]
    assert (tmp_path / "checkpoint-1" / "opsd_teacher.safetensors").is_file()


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, capsys) -> None:
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, MAKE_TEACHER["ema"](), **settings).train()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text("{")
    again = make_trainer(tmp_path, MAKE_TEACHER["ema"](), **settings)
    again.train(resume_from_checkpoint=True)
    assert "checkpoint-3 was passed over: its trainer_state.json is cut short" in capsys.readouterr().out


def test_a_foreign_checkpoint_or_other_settings_are_refused_on_resume(tmp_path: Path) -> None:
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, EMATeacher(0.9, context="answer_only"), **settings).train()
    for other in (EMATeacher(0.99, context="answer_only"), EMATeacher(0.9, context="hint"), LiveTeacher()):
        rows = Dataset.from_list([{**r, "hint": "x"} for r in make_rows()])
        with pytest.raises(CheckpointError, match="made by a run with other settings"):
            make_trainer(tmp_path, other, rows=rows, **settings).train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-1" / "opsd_teacher.json").unlink()
    with pytest.raises(CheckpointError, match="not a checkpoint of opsd"):
        make_trainer(tmp_path, EMATeacher(0.9, context="answer_only"), **settings).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-1")
        )


def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path, None, max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(CheckpointError, match="already holds a run"):
        make_trainer(tmp_path, None).train()


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written to"):
        make_trainer(tmp_path / "file" / "run", None).train()


def test_resuming_from_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        make_trainer(tmp_path, None).train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_a_run_that_broke_in_mid_step_can_be_trained_again(tmp_path: Path) -> None:
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    trainer = make_trainer(tmp_path, MAKE_TEACHER["same_checkpoint"](), **settings)
    original, calls = trainer.teacher.score, iter(range(99))
    trainer.teacher.score = lambda r: original(r) if next(calls) != 3 else _raise(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.teacher.score = original
    trainer.train(resume_from_checkpoint=True)
    whole = make_trainer(tmp_path / "whole", MAKE_TEACHER["same_checkpoint"](), **settings)
    whole.train()
    for (name, a), (_, b) in zip(whole.model.named_parameters(), trainer.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def _raise(error: BaseException) -> None:
    raise error


def test_another_base_model_or_template_text_is_refused_on_resume(tmp_path: Path) -> None:
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    template = tmp_path / "mine.jinja"
    source = (sources.folder("templates") / "answer_only.jinja").read_text()
    template.write_text(source)
    teacher = lambda: SameCheckpointTeacher(context=str(template))  # noqa: E731
    make_trainer(tmp_path / "run", teacher(), **settings).train()
    with pytest.raises(CheckpointError, match="student: "):
        make_trainer(tmp_path / "run", teacher(), make_llama(9), **settings).train(resume_from_checkpoint=True)
    template.write_text(source.replace("correct", "right"))
    with pytest.raises(CheckpointError, match="digest"):
        make_trainer(tmp_path / "run", teacher(), **settings).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("place", [slice(0, 1), slice(-1, None), slice(None)])
def test_the_hash_of_weights_reads_all_of_a_matrix(place: slice) -> None:
    """It read the first 64 values: a model with another last row of every matrix was taken as the same."""
    one = torch.arange(400.0 * 64).view(400, 64)
    other = one.clone()
    other[place] += 1.0
    assert digest({"a": one}) == digest({"a": one.clone()}) != digest({"a": other})
    columns = one.clone()
    columns[:, 17] += 1.0  # read in steps of an even number it would be missed
    assert digest({"a": columns}) != digest({"a": one})
    for small in (torch.ones(()), torch.ones(0), torch.ones(3)):
        assert digest({"a": small}) == digest({"a": small.clone()}) != digest({"b": small})


def test_another_last_row_of_every_matrix_is_refused_on_resume(tmp_path: Path) -> None:
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, MAKE_TEACHER["ema"](), **settings).train()
    other = make_llama()
    with torch.no_grad():
        for p in other.parameters():
            if p.ndim == 2:
                p[-1] += 0.01
    with pytest.raises(CheckpointError, match="student: "):
        make_trainer(tmp_path, MAKE_TEACHER["ema"](), other, **settings).train(resume_from_checkpoint=True)


def test_another_reward_function_of_the_same_name_is_refused_on_resume(tmp_path: Path) -> None:
    def right() -> Any:
        def graded(completion_ids: Any, **kwargs: Any) -> list[float]:
            return [1.0 for _ in completion_ids]

        return graded

    def wrong() -> Any:
        def graded(completion_ids: Any, **kwargs: Any) -> list[float]:
            return [0.5 for _ in completion_ids]

        return graded

    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, MAKE_TEACHER["ema"](), reward_funcs=right(), **settings).train()
    make_trainer(tmp_path, MAKE_TEACHER["ema"](), reward_funcs=right(), **settings).train(resume_from_checkpoint=True)
    with pytest.raises(
        CheckpointError, match=r"rewards\.graded: '\w+' in the checkpoint, '\w+' now \(reward functions"
    ):
        make_trainer(tmp_path, MAKE_TEACHER["ema"](), reward_funcs=wrong(), **settings).train(
            resume_from_checkpoint=True
        )


def test_a_folder_that_holds_a_model_is_refused(tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="already holds a model"):
        make_trainer(tmp_path, None).train()


@pytest.mark.parametrize("steps", [2, 3])  # within an epoch of three steps, and at its end
def test_a_finished_run_that_is_resumed_trains_nothing(tmp_path: Path, steps: int) -> None:
    """Within an epoch transformers trained one step more than max_steps, and wrote a checkpoint of it."""
    settings = {"max_steps": steps, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    first = make_trainer(tmp_path, MAKE_TEACHER["ema"](), "lora", **settings)
    first.train()
    again = make_trainer(tmp_path, MAKE_TEACHER["ema"](), "lora", **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == steps and not (tmp_path / f"checkpoint-{steps + 1}").exists()
    weights = dict(first.model.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in again.model.named_parameters())
    states = (trainer.teacher.state_dict() for trainer in (first, again))
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))
