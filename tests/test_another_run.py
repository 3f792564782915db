"""A resumed run is compared with its checkpoint by value; what a user allows to change takes effect."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import make_rows
from datasets import Dataset
from helpers import (
    MAKE_TEACHER,
    logged,
    make_args,
    make_trainer,
)
from safetensors.torch import load_file

from opsd import (
    OPSDConfig,
    OPSDTrainer,
)
from opsd.errors import CheckpointError, ConfigError, OPSDWarning
from opsd.evaluation.run_folder import read_card
from opsd.training import checkpoints, resume

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
