"""Checkpoints: a run that was stopped, broken or killed goes on as the same run, and as no other."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
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
    make_args,
    make_trainer,
)
from safetensors.torch import load_file

from opsd import (
    EMATeacher,
    LiveTeacher,
    OPSDConfig,
    OPSDTrainer,
    SameCheckpointTeacher,
    sources,
)
from opsd.data.order import EpochSampler
from opsd.errors import CheckpointError, ConfigError, OPSDWarning
from opsd.evaluation.run_folder import read_card
from opsd.teachers.weight_copy import digest
from opsd.training import checkpoints, resume


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
        {"chat_template_kwargs": {"bos_token": "<|SECRET|>", "enable_thinking": True}},
        "chat_template_kwargs.enable_thinking: None in the checkpoint, True now",
    ),
    "a name that looks like a secret's": (
        {"chat_template_kwargs": {"bos_token": "<|other|>"}},
        r"chat_template_kwargs.bos_token: '\(hash \w+\)' in the checkpoint, '\(hash \w+\)' now",
    ),
    "student_system_prompt": ({"student_system_prompt": "Be kind."}, "student_system_prompt: None in the"),
    "batch size": ({"per_device_train_batch_size": 1}, "per_device_train_batch_size: 2 in the checkpoint, 1 now"),
    "accumulation": ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps: 2 in the checkpoint, 1 now"),
    "mask_tokens of the same number": ({"mask_tokens": ["="]}, r"left_out_ids: \[\d+\] in the checkpoint, \[\d+\] now"),
    "learning_rate": ({"learning_rate": 2e-2}, "learning_rate: 0.01 in the checkpoint, 0.02 now"),
    "more steps": ({"max_steps": 3}, "max_steps: 2 in the checkpoint, 3 now"),
    "beta": ({"beta": 0.5}, "beta: 1.0 in the checkpoint, 0.5 now"),
    "rewards": ({"reward_funcs": ["exact"]}, "rewards.exact: None in the checkpoint, 'of opsd' now"),
    "logging_steps": ({"logging_steps": 2}, "logging_steps: 1 in the checkpoint, 2 now"),
}
OF_THE_CHECKPOINT = {
    "save_strategy": "steps", "save_steps": 1, "mask_tokens": ["+"], "chat_template_kwargs": {"bos_token": "<|SECRET|>"}
}  # fmt: skip


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


@pytest.mark.filterwarnings("ignore:top_p")
@pytest.mark.parametrize(("changes", "named"), ANOTHER_RUN.values(), ids=ANOTHER_RUN)
def test_another_run_is_refused_by_name_and_value(finished: Path, changes: dict[str, object], named: str) -> None:
    """All of these resumed without a word, and the run's numbers were of neither run."""
    card = (finished / "run_card.json").read_bytes()
    with pytest.raises(CheckpointError, match=named) as raised:
        resuming(finished, **changes).train(resume_from_checkpoint=str(finished / "checkpoint-1"))
    assert "--allow-changes" in str(raised.value)
    assert (finished / "run_card.json").read_bytes() == card


def test_another_number_of_processes_is_refused(finished: Path, tmp_path: Path) -> None:
    """Its random states, batches and averages are others; transformers only warned."""
    shutil.copytree(finished / "checkpoint-1", tmp_path / "checkpoint-1")
    facts = json.loads((tmp_path / "checkpoint-1" / "opsd_teacher.json").read_text())
    facts["processes"] = 2
    (tmp_path / "checkpoint-1" / "opsd_teacher.json").write_text(json.dumps(facts))
    for rank in (0, 1):
        shutil.copy(finished / "checkpoint-1" / "rng_state.pth", tmp_path / "checkpoint-1" / f"rng_state_{rank}.pth")
    with pytest.raises(CheckpointError, match="processes: 2 in the checkpoint, 1 now"):
        resuming(tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_a_version_that_stored_no_settings_is_refused(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "checkpoint-1", tmp_path / "checkpoint-1")
    old = {"step": 1, "processes": 1, "pending": {}, "student": "abc", "objective": "reverse KL", "lmbda": 1.0}
    (tmp_path / "checkpoint-1" / "opsd_teacher.json").write_text(json.dumps(old))
    with pytest.raises(CheckpointError, match="written by an earlier version of opsd"):
        resuming(tmp_path).train(resume_from_checkpoint=True)


def test_no_secret_is_in_a_checkpoint(finished: Path) -> None:
    assert "SECRET" not in (finished / "checkpoint-1" / "opsd_teacher.json").read_text()


def test_every_setting_is_compared_or_listed_as_one_that_changes_no_number(finished: Path) -> None:
    """A setting that is added later, here or in TRL, is compared until it is listed."""
    listed = [name for names in resume.NOT_COMPARED.values() for name in names]
    stored = checkpoints.read_facts(finished / "checkpoint-1")
    settings = [field.name for field in fields(OPSDConfig)]
    assert len(set(listed)) == len(listed) and set(listed) <= set(settings)
    assert {*stored["settings"], *listed} == set(settings)
    for name in stored["settings"]:
        other = {**stored, "settings": {**stored["settings"], name: "another value"}}
        with pytest.raises(CheckpointError, match=rf"  {name}"):
            resume.changes(finished, stored, other, [])
        if name not in resume.FIXED:
            names = {change.name.partition(".")[0] for change in resume.changes(finished, stored, other, [name])}
            assert names == {name}


def test_a_later_setting_is_compared_too(finished: Path) -> None:
    stored = checkpoints.read_facts(finished / "checkpoint-1")
    later = {**stored, "settings": {**stored["settings"], "of_a_later_version": 0.5}}
    with pytest.raises(CheckpointError, match=r"of_a_later_version: None in the checkpoint, 0.5 now"):
        resume.changes(finished, stored, later, [])


@pytest.mark.parametrize("name", sorted(resume.COMPARED))
def test_everything_beside_the_settings_is_stored_and_compared(finished: Path, name: str) -> None:
    stored = checkpoints.read_facts(finished / "checkpoint-1")
    assert name in stored
    with pytest.raises(CheckpointError, match=rf"  {name}"):
        resume.changes(finished, stored, {**stored, name: "another value"}, [])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["learning_rte"], "Did you mean 'learning_rate'"),
        (["dataset"], "neither a setting nor something a resume compares"),
        (["student"], "cannot change it: the checkpoint's weights"),
        (["teacher.strategy"], "cannot change it: the teacher's state"),
        (["weight_decay"], "cannot change it: the optimizer's state"),
    ],
)
def test_names_that_cannot_be_allowed_are_refused_with_the_settings(
    tmp_path: Path, names: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_args(tmp_path, allow_changes=names)


def test_what_cannot_change_is_refused_whatever_is_allowed(finished: Path) -> None:
    """The checkpoint's optimizer holds its weight decay, so a new one would be ignored."""
    again = resuming(finished, weight_decay=0.1, seed=7, allow_changes=["seed"])
    with pytest.raises(
        CheckpointError, match=r"weight_decay: 0.0 in the checkpoint, 0.1 now; fixed: the opt"
    ) as raised:
        again.train(resume_from_checkpoint=str(finished / "checkpoint-1"))
    assert "seed" not in str(raised.value)


def test_a_switch_without_a_resume_is_named(tmp_path: Path) -> None:
    with pytest.warns(OPSDWarning, match="allow_changes has no effect"):
        make_trainer(tmp_path, None, max_steps=1, allow_changes=["seed"]).train()


# ---- what is allowed takes effect -----------------------------------------------------------------------------------


def resumed(start: Path, folder: Path, **changes: object) -> OPSDTrainer:
    """Resume from checkpoint-1 of another folder's run."""
    shutil.copytree(start / "checkpoint-1", folder / "checkpoint-1")
    shutil.copy(start / "run_card.json", folder)
    trainer = resuming(folder, **changes)
    trainer.train(resume_from_checkpoint=True)
    return trainer


def test_a_learning_rate_that_may_change_moves_the_weights_by_the_new_one(tmp_path: Path) -> None:
    """transformers restores the old rate with the optimizer; a new one was ignored. Plain SGD moves in proportion."""
    plain = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 1e9, "learning_rate": 1e-2}
    resuming(tmp_path / "start", **plain).train()
    start = load_file(tmp_path / "start" / "checkpoint-1" / "model.safetensors")
    moved = {}
    for rate in (1e-2, 3e-2):
        changes = {**plain, "learning_rate": rate, "allow_changes": ["learning_rate"]}
        trainer = resumed(tmp_path / "start", tmp_path / str(rate), **changes)
        moved[rate] = {name: p.detach() - start[name] for name, p in trainer.model.named_parameters()}
        assert logged(trainer, "learning_rate") == [1e-2, rate]
    for name, change in moved[1e-2].items():
        assert change.abs().max() > 0
        torch.testing.assert_close(moved[3e-2][name], 3 * change, rtol=1e-3, atol=1e-6)


def test_a_longer_run_follows_the_longer_schedule_from_its_first_step_on(finished: Path, tmp_path: Path) -> None:
    """The checkpoint's rate belonged to the shorter run, and was used for one step more."""
    trainer = resumed(finished, tmp_path / "longer", max_steps=4, allow_changes=["max_steps"])
    whole = resuming(tmp_path / "whole", max_steps=4)
    whole.train()
    assert logged(trainer, "learning_rate")[1:] == logged(whole, "learning_rate")[1:] == [0.0075, 0.005, 0.0025]


def test_intervals_that_change_are_in_force(finished: Path, tmp_path: Path) -> None:
    """transformers restores them from the checkpoint; where a run saves may change without being named."""
    changes = {"max_steps": 4, "save_steps": 3, "logging_steps": 2, "allow_changes": ["max_steps", "logging_steps"]}
    trainer = resumed(finished, tmp_path / "run", **changes)
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (1, 3, 4)]
    assert [entry["step"] for entry in trainer.state.log_history if "divergence" in entry] == [1, 2, 4]


def test_the_run_card_notes_each_change_with_its_step(finished: Path, tmp_path: Path) -> None:
    """It kept the old values, so another person would have repeated another run."""
    rows = [{**row, "answer": "7"} for row in sums()]
    changes = {"learning_rate": 2e-2, "rows": rows, "allow_changes": ["learning_rate", "data"]}
    resumed(finished, tmp_path / "run", **changes)
    card = read_card(str(tmp_path / "run"))
    assert card["settings"]["learning_rate"] == 2e-2
    noted = {entry["name"]: entry for entry in card["changes"]}
    assert noted["learning_rate"] == {"step": 1, "name": "learning_rate", "before": 1e-2, "after": 2e-2}
    assert noted["data"]["after"] == card["hashes"]["data"] != noted["data"]["before"]
    assert set(noted) == {"learning_rate", "data"}
    page = (tmp_path / "run" / "run_card.md").read_text()
    assert "| 1 | learning_rate | `0.01` | `0.02` |" in page
    # A resume from the same checkpoint replaces what came after it.
    resuming(tmp_path / "run", seed=7, allow_changes=["seed"]).train(
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1")
    )
    assert [entry["name"] for entry in read_card(str(tmp_path / "run"))["changes"]] == ["seed"]


def test_other_versions_are_warned_about_and_noted(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "checkpoint-1", tmp_path / "checkpoint-1")
    path = tmp_path / "checkpoint-1" / "opsd_teacher.json"
    facts = json.loads(path.read_text())
    facts["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(facts))
    with pytest.warns(OPSDWarning, match="versions.torch: '1.0' in the checkpoint"):
        resuming(tmp_path).train(resume_from_checkpoint=True)
    assert [entry["name"] for entry in read_card(str(tmp_path))["changes"]] == ["versions.torch"]
