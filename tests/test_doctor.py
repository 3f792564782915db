"""The doctor: changes nothing, judges a real teacher, predicts a step, and speaks to people and machines."""

from __future__ import annotations

import json
import random
import shutil
import tomllib
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_rows
from datasets import Dataset
from helpers import MAKE_TEACHER, STUDENTS, make_trainer, snapshot

from opsd import SameCheckpointTeacher
from opsd.cli import main
from opsd.commands.doctor import TITLES
from opsd.doctor import CHECKS, examine
from opsd.doctor.environment import DISTRIBUTION
from opsd.errors import ConfigError
from opsd.findings import Examination, Finding
from opsd.rollouts import PaddedBatch, Rollouts

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def of(examination: Examination, check: str) -> list[Finding]:
    return [finding for finding in examination.findings if finding.check == check]


# ---------------------------------------------------------------- it changes nothing


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("name", MAKE_TEACHER)
def test_every_teacher_can_be_examined_and_nothing_is_changed(name: str, student: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, MAKE_TEACHER[name](), student)
    before = snapshot(trainer.model)
    trainer.model.eval()  # as a model that was loaded
    modes = {name: module.training for name, module in trainer.model.named_modules()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    examination = examine(trainer)
    assert not examination.failed, [finding.saw for finding in examination.with_status("fail")]
    assert {finding.check for finding in examination.findings} == set(CHECKS)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())
    assert all(p.grad is None for p in trainer.model.parameters())
    assert {name: module.training for name, module in trainer.model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert all(context.counts.rendered == 0 for context in trainer.scorer.contexts)
    assert not any(trainer._metrics["train"].values())


@pytest.mark.slow
def test_a_run_is_the_same_with_and_without_the_doctor(tmp_path: Path) -> None:
    ends = []
    for asked in (False, True):
        trainer = make_trainer(tmp_path / str(asked), MAKE_TEACHER["ema"](), max_steps=3)
        if asked:
            examine(trainer)
        trainer.train()
        ends.append(snapshot(trainer.model))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_positions_that_slipped_by_one_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """siyan-zhao/OPSD: completions sliced behind another prompt's length lose as many tokens as it has special ones."""
    trainer, pad = make_trainer(tmp_path, SameCheckpointTeacher(context="answer_only")), Rollouts.pad

    def slipped(self: Rollouts, device: torch.device, prompts: Any = None) -> PaddedBatch:
        batch = pad(self, device, prompts)
        return replace(batch, position_N=batch.position_N - 1) if prompts else batch

    monkeypatch.setattr(Rollouts, "pad", slipped)
    found = of(examine(trainer, only=["alignment"]), "alignment")
    assert found[0].status == "fail" and "scores other tokens than the student sampled" in found[0].saw


# ---------------------------------------------------------------- cost and environment


def test_rows_and_steps_are_counted(tmp_path: Path) -> None:
    few = of(examine(make_trainer(tmp_path, max_steps=2), only=["cost"]), "cost")
    assert few[0].figures["steps"] == 2 and few[1].saw == "8 of 12 rows will be used."
    all_of_them = make_trainer(tmp_path, max_steps=-1, num_train_epochs=3)
    found = of(examine(all_of_them, only=["cost"]), "cost")
    assert found[0].figures["steps"] == 9 and "all 12 rows will be used, 3.0 times each" in found[1].saw
    stream = Dataset.from_list(make_rows(12)).to_iterable_dataset()
    found = of(examine(make_trainer(tmp_path, rows=stream), only=["cost"]), "cost")
    assert len(found) == 1 and "2 steps" in found[0].saw


def test_a_disk_too_small_for_the_checkpoints_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path / "new" / "run", MAKE_TEACHER["ema"](), save_strategy="steps", save_steps=1)
    found = of(examine(trainer, only=["environment"]), "environment")
    space = next(f for f in found if "disk space is enough" in f.saw)
    trainer.train()
    written = sum(f.stat().st_size for f in (tmp_path / "new" / "run" / "checkpoint-2").rglob("*")) / 2**20
    assert space.figures["checkpoints"] == 2 and 0.5 < space.figures["megabytes_each"] / written < 1.5
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    found = of(examine(trainer, only=["environment"]), "environment")
    assert any(f.status == "fail" and "disk space is too small" in f.saw for f in found)


def test_versions_outside_the_tested_range_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, dependencies = metadata.version, tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]
    monkeypatch.setattr(metadata, "requires", lambda name: dependencies)
    monkeypatch.setattr(metadata, "version", lambda name: "1.17.2" if name == "trl" else real(name))
    found = of(examine(make_trainer(tmp_path), only=["environment"]), "environment")
    assert found[0].status == "warn" and "trl 1.17.2 (tested: <1.17,>=1.16)" in found[0].saw


def test_versions_are_those_that_the_distribution_of_this_project_asks_for() -> None:
    assert tomllib.loads(PYPROJECT.read_text())["project"]["name"] == DISTRIBUTION


def test_without_an_installation_versions_are_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    found = of(examine(make_trainer(tmp_path), only=["environment"]), "environment")
    assert found[0].status == "skip" and "tested versions are unknown" in found[0].saw


# ---------------------------------------------------------------- from the command line


@pytest.fixture
def run_yaml(tmp_path: Path, llama_folder: str) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    lines = [
        f"model_name_or_path: {llama_folder}", f"dataset_name: {tmp_path}/rows.jsonl", f"output_dir: {tmp_path}/out",
        "context: answer_only", "max_steps: 2", "per_device_train_batch_size: 4", "max_completion_length: 4",
        "use_cpu: true", "bf16: false", "report_to: none", "disable_tqdm: true", "logging_steps: 1",
    ]  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_doctor_prints_every_check_and_leaves_no_output_folder(
    run_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(run_yaml), "--verbose"]) == 0
    out = capsys.readouterr().out
    assert all(title in out for name, title in TITLES.items() if name != "settings")
    assert "▏▏" in out and "12 rows" in out
    assert not (tmp_path / "out").exists()
    assert set(TITLES) == {"settings", *CHECKS}


def test_a_check_that_is_content_takes_one_line(
    run_yaml: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    checks = [name for name in CHECKS if name != "lift"]
    assert main(["doctor", str(run_yaml), "--only", ",".join(checks)]) == 0
    *lines, more, verdict = capsys.readouterr().out.split("Σ_v s(v)·[log s(v) − log t(v)]\n")[-1].splitlines()
    assert [line[:1] for line in lines] == ["✓"] * len(checks) and all(len(line) <= 80 for line in lines)
    assert "--verbose" in more and "pass" in verdict
    assert main(["doctor", str(run_yaml), "--only", "lift"]) == 0
    assert "→ Give its context more" in capsys.readouterr().out, "what is to be done is printed whole"


def test_json_is_for_machines_and_the_exit_status_is_1_on_a_failure(
    run_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(run_yaml), "--json", "-", "--rows", "4", "--only", "prompts,leaks"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["rows"] == 4
        and not found["failed"]
        and {each["check"] for each in found["findings"]} == {"prompts", "leaks"}
    )
    leaky = [{**row, "prompt": [{"role": "user", "content": row["solution"]}]} for row in make_rows()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in leaky))
    assert main(["doctor", str(run_yaml), "--context", "worked_solution", "--json", str(tmp_path / "found.json")]) == 1
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["failed"] and any("contains all of 'solution'" in f["saw"] for f in found["findings"])


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--context", "hint"], "needs the column 'hint'"),
        (["--teacher", "emma"], "Did you mean 'ema'"),
        (["--max_completion_length", "600"], "together more than the 512 tokens"),
    ],
)
def test_a_run_that_is_refused_is_a_failed_examination(
    extra: list[str], words: str, run_yaml: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["doctor", str(run_yaml), *extra]) == 1
    assert words in capsys.readouterr().out


def test_a_check_that_nobody_knows_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'promts', and must be one of.*Did you mean 'prompts'"):
        examine(make_trainer(tmp_path), only=["promts"])


def test_train_asks_the_doctor_first_and_trains_nothing_where_it_fails(
    run_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leaky = [{**row, "prompt": [{"role": "user", "content": row["solution"]}]} for row in make_rows()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in leaky))
    arguments = ["train", str(run_yaml), "--context", "worked_solution"]
    assert main(arguments) == 1
    assert "training did not start" in capsys.readouterr().out
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert main([*arguments, "--skip-doctor"]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "out" / "run_card.json").read_text())["doctor"] == "not examined"


@pytest.mark.slow
def test_a_healthy_run_is_trained_after_the_doctors_word_which_stands_in_the_card(
    run_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(run_yaml), "--save_steps", "1"]) == 0
    assert "Does the teacher help?" in capsys.readouterr().out
    card = json.loads((tmp_path / "out" / "run_card.json").read_text())
    assert {f["check"] for f in card["doctor"]["findings"]} == set(CHECKS)
    longer = ["--save_steps", "1", "--max_steps", "3", "--allow-changes", "max_steps"]
    assert main(["train", str(run_yaml), *longer, "--resume_from_checkpoint", "true"]) == 0
    assert "Does the teacher help?" not in capsys.readouterr().out
    resumed = json.loads((tmp_path / "out" / "run_card.json").read_text())
    assert resumed["doctor"] == card["doctor"]
    assert card["outcome"]["steps"] < resumed["outcome"]["steps"] == 3


def test_a_check_that_stumbles_loses_nothing_of_the_others(tmp_path: Path) -> None:
    def offline(**columns: Any) -> list[float]:
        random.random(), np.random.rand(), torch.rand(1)
        raise RuntimeError("judge offline")

    trainer = make_trainer(tmp_path, SameCheckpointTeacher(context="answer_only"), reward_funcs=offline)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    examination = examine(trainer)
    (found,) = of(examination, "lift")
    assert found.status == "fail" and "could not finish: RuntimeError: judge offline" in found.saw
    assert {f.check for f in examination.findings} == set(CHECKS)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert all(context.counts.rendered == 0 for context in trainer.scorer.contexts)


def test_no_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1 row at least"):
        examine(make_trainer(tmp_path), rows=0)


def test_the_probe_of_costs_trains_as_training_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, gradient_checkpointing=True)
    seen = []
    layer = trainer.model.model.layers[0]
    hook = layer.register_forward_pre_hook(
        lambda m, _: seen.append((m.training, trainer.model.is_gradient_checkpointing))
    )
    examine(trainer, only=["cost"])
    hook.remove()
    assert (True, True) in seen
    assert not trainer.model.is_gradient_checkpointing


def test_a_siblings_weights_are_in_no_checkpoint(tmp_path: Path) -> None:
    each = []
    for teacher in ("sibling", "same_checkpoint"):
        trainer = make_trainer(tmp_path, MAKE_TEACHER[teacher](), save_strategy="steps")
        found = of(examine(trainer, only=["environment"]), "environment")
        each.append(next(f for f in found if "disk space" in f.saw).figures["megabytes_each"])
    assert each[0] <= each[1]


def test_checkpoints_of_epochs_are_counted(tmp_path: Path) -> None:
    def count(**settings: Any) -> int:
        trainer = make_trainer(tmp_path, max_steps=-1, num_train_epochs=5, **settings)
        found = of(examine(trainer, only=["environment"]), "environment")
        return next(f for f in found if "disk space" in f.saw).figures["checkpoints"]

    assert count(save_strategy="epoch") == 5
    assert count(save_strategy="steps", save_steps=1) == 15
    assert count(save_strategy="steps", save_steps=1, save_total_limit=2) == 2


@pytest.mark.parametrize(
    ("answers", "grader"),
    [
        (["1 + 1 = 2 #### 2"] * 12, "last_number"),
        (["Paris"] * 12, "contains"),
        (["First one thing and then another thing and then the next."] * 12, None),
    ],
)
def test_the_grader_is_chosen_by_what_answers_look_like(answers: list[str], grader: str | None, tmp_path: Path) -> None:
    rows = Dataset.from_list([{**row, "answer": answer} for row, answer in zip(make_rows(), answers, strict=True)])
    (found,) = of(examine(make_trainer(tmp_path, rows=rows), only=["lift"]), "lift")
    assert found.figures.get("grader") == grader and (found.status == "skip") == (grader is None)


def test_options_may_stand_for_the_file(run_yaml: Path, llama_folder: str, tmp_path: Path) -> None:
    rows, output = str(tmp_path / "rows.jsonl"), str(tmp_path / "o")
    words = ["--model_name_or_path", llama_folder, "--dataset_name", rows, "--context", "answer_only", "--output_dir"]
    words += [output, "--max_steps", "1", "--per_device_train_batch_size", "4", "--use_cpu", "true", "--bf16", "false"]
    assert main(["doctor", *words, "--max_completion_length", "4", "--only", "prompts"]) == 0
