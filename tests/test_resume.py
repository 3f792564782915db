"""Checkpoints: a run that was stopped, broken or killed goes on as the same run, and as no other."""

from __future__ import annotations

import shutil
from pathlib import Path

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
    OPSDTrainer,
    SameCheckpointTeacher,
    sources,
)
from opsd.data.order import EpochSampler
from opsd.errors import CheckpointError


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


def test_a_folder_that_holds_a_model_is_refused(tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="already holds a model"):
        make_trainer(tmp_path, None).train()


# ---- another run ----------------------------------------------------------------------------------------------------


def sums(count: int = 12, first: int = 0) -> list[dict[str, object]]:
    return make_rows(first + count)[first:]


# What changes between the run of the checkpoint and the resuming one, and the name under which it is refused.
ANOTHER_RUN: dict[str, tuple[dict[str, object], str]] = {
    "content of the rows": ({"rows": [{**row, "answer": "7"} for row in sums()]}, "data"),
    "order of the rows": ({"rows": sums()[::-1]}, "data"),
    "number of rows": ({"rows": sums(11)}, "rows: 12 in the checkpoint, 11 now"),
    "evaluation rows": ({"eval_rows": sums(2, 20)}, "eval_data"),
    "seed": ({"seed": 7}, "seed: 42 in the checkpoint, 7 now"),
    "max_completion_length": ({"max_completion_length": 5}, "max_completion_length: 6 in the checkpoint, 5 now"),
    "top_p": ({"top_p": 0.9}, "top_p: 1.0 in the checkpoint, 0.9 now"),
    "temperature": ({"temperature": 0.7}, "temperature: 1.0 in the checkpoint, 0.7 now"),
    "chat_template_kwargs": (
        {"chat_template_kwargs": {"enable_thinking": True}},
        "chat_template_kwargs.enable_thinking: None in the checkpoint, True now",
    ),
    "student_system_prompt": ({"student_system_prompt": "Be kind."}, "student_system_prompt: None in the"),
    "batch size": ({"per_device_train_batch_size": 1}, "per_device_train_batch_size: 2 in the checkpoint, 1 now"),
    "accumulation": ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps: 2 in the checkpoint, 1 now"),
    "mask_tokens of the same number": ({"mask_tokens": ["="]}, r"left_out_ids: \[\d+\] in the checkpoint, \[\d+\] now"),
    "learning_rate": ({"learning_rate": 2e-2}, "learning_rate: 0.01 in the checkpoint, 0.02 now"),
    "more steps": ({"max_steps": 3}, "max_steps: 2 in the checkpoint, 3 now"),
    "beta": ({"beta": 0.5}, "beta: 1.0 in the checkpoint, 0.5 now"),
    "rewards": ({"reward_funcs": ["exact"]}, r"rewards: \[\] in the checkpoint, \['exact'\] now"),
    "logging_steps": ({"logging_steps": 2}, "logging_steps: 1 in the checkpoint, 2 now"),
}
OF_THE_CHECKPOINT = {"save_strategy": "steps", "save_steps": 1, "mask_tokens": ["+"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    make_trainer(folder, MAKE_TEACHER["same_checkpoint"](), **OF_THE_CHECKPOINT).train()
    return folder


def resuming(folder: Path, teacher: str = "same_checkpoint", **changes: object) -> OPSDTrainer:
    changes = {**OF_THE_CHECKPOINT, **changes}
    for name in ("rows", "eval_rows"):
        if name in changes:
            changes[name] = Dataset.from_list(changes[name])
    return make_trainer(folder, MAKE_TEACHER[teacher](), **changes)


@pytest.mark.parametrize(("changes", "named"), ANOTHER_RUN.values(), ids=ANOTHER_RUN)
def test_another_run_is_refused_by_name_and_value(finished: Path, changes: dict[str, object], named: str) -> None:
    """All of these resumed without a word, and the run's numbers were of neither run."""
    card = (finished / "run_card.json").read_bytes()
    with pytest.raises(CheckpointError, match=named) as raised:
        resuming(finished, **changes).train(resume_from_checkpoint=str(finished / "checkpoint-1"))
    assert "--allow-changes" in str(raised.value)
    assert (finished / "run_card.json").read_bytes() == card
