"""Sweeps: real runs in child processes, stopped in the middle and gone on with; nothing of two kinds is mixed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from evaluation_runs import DEV, GRADER, KEPT, TEST, TRAIN
from test_cli import SMALL

from opsd.cli import main
from opsd.commands.sweep import Sweep
from opsd.commands.sweep_plan import SweepPlan, SweepRun, read_sweep
from opsd.commands.sweep_runs import (
    LOG,
    NEW,
    REPEATED,
    RESUMED,
    begin,
    digest,
    end,
    files_of,
    job_of,
    record_of,
    state_of,
)
from opsd.errors import CheckpointError
from opsd.evaluation.run_folder import read_card
from opsd.evaluation.selection import selection_accuracy
from opsd.evaluation.summary import read_summary
from opsd.evaluation.sweep_folder import BEGUN, DONE, FAILED, read_record

STEPS = 12


@pytest.fixture
def run_file(tmp_path: Path, llama_folder: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    digest.cache_clear()
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(here.parent), str(here)]))
    for name, rows in {"train-0": TRAIN, "train-1": TRAIN[::-1], "test": TEST, "dev": DEV, "kept": KEPT}.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation: dict[str, Any] = {"test": "test.jsonl", "grader": GRADER, "selection": "dev.jsonl", "every": 6}
    evaluation["retention"] = {"kept": {"rows": "kept.jsonl", "grader": GRADER}}
    settings = {
        **SMALL,
        "model_name_or_path": llama_folder,
        "teacher": "same_checkpoint",
        "dataset_name": "train-{seed}.jsonl",
        "output_dir": "sweep",
        "max_steps": STEPS,
        "evaluation": evaluation,
    }
    arms = {"method": {}, "broken": {"context": "document"}, "sft": {"control": "sft", "seed": [0]}}
    sweep = {"arms": arms, "learning_rate": [1.0e-3], "seed": [0], "jobs": 3}
    Path("run.yaml").write_text(yaml.safe_dump({**settings, "sweep": sweep}, sort_keys=False))
    return "run.yaml"


def stop_after(sign: Path) -> threading.Thread:
    """Send SIGTERM to this process once a file exists."""

    def wait() -> None:
        while not sign.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_was_stopped_and_ends_in_a_comparison(run_file: str, capsys) -> None:
    """Stopped in its first runs; then every run of the first seed, one arm that fails, and the other seed."""
    arguments = ["sweep", run_file, "--seed", "0", "1", "--seeds-at", "best", "--skip-doctor", "--keep", "none"]
    method, sft = Path("sweep/method-lr0.001-seed0"), Path("sweep/sft-lr0.001-seed0")
    thread = stop_after(method / "checkpoint-1")
    assert main([*arguments, "--jobs", "1"]) == 128 + signal.SIGTERM
    thread.join()
    out = capsys.readouterr().out
    assert "stopped by SIGTERM: 0 of 5 runs are done" in out and f"opsd {' '.join(arguments)} --jobs 1" in out
    record = read_record(method)
    assert record is not None and record.status == BEGUN and record.seconds > 0
    assert read_record("sweep/broken-lr0.001-seed0") is None, "a run began after the signal"

    assert main(arguments) == 1
    out = capsys.readouterr().out
    assert "started     method-lr0.001-seed0: goes on from its checkpoint" in out
    assert "FAILED      broken-lr0.001-seed0" in out and "needs the column" in out
    assert "best        broken: no run at the first seed was finished" in out
    assert "best        method: learning_rate 0.001, " in out and "4 of 4 runs done" not in out
    assert "method minus it" in out and "failed      broken-lr0.001-seed0" in out
    runs = [method, sft, Path("sweep/method-lr0.001-seed1")]
    for folder in runs:
        assert read_card(str(folder))["outcome"]["steps"] == STEPS
        assert not [*folder.glob("checkpoint-*"), *folder.glob("*.safetensors")]
    assert read_card(str(method))["outcome"]["seconds"] > 0
    assert len(read_summary(runs[2] / "evaluation")["taken"]) == 5
    comparison = json.loads(Path("sweep/comparison.json").read_text())
    assert [(p["name"], len(p["task"]["runs"])) for p in comparison["points"]] == [("method", 2), ("sft", 1)]
    assert "| method |" in Path("sweep/comparison.md").read_text() and Path("sweep/pareto.svg").is_file()

    first = (method / "train.log").stat().st_mtime_ns
    assert main([*arguments, "--arms", "method", "sft"]) == 0
    assert "started" not in capsys.readouterr().out and (method / "train.log").stat().st_mtime_ns == first
    assert main([*arguments, "--temperature", "0.7"]) == 2
    assert "method-lr0.001-seed0 was made with other settings or files:\n  temperature: None there, 0.7 now" in (
        capsys.readouterr().err
    )


def test_a_dry_run_prints_the_runs_and_trains_none(run_file: str, capsys) -> None:
    assert main(["sweep", run_file, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "3 runs: 3 arm(s), 3 points, 1 seed(s), 3 at a time" in out and "sft-lr0.001-seed0: new" in out
    assert not Path("sweep").exists()


def test_train_says_that_it_does_not_read_the_sweep(run_file: str, capsys) -> None:
    """It would train one run, and the user would wait for the others."""
    assert main(["train", run_file, "--dataset_name", "nowhere.jsonl"]) == 2
    assert "sweep       not read" in capsys.readouterr().out


# ---- runs on disk, without a process --------------------------------------------------------------------------------


@pytest.fixture
def one(run_file: str) -> SweepRun:
    return read_sweep([run_file]).runs[0]


def evaluated(run: SweepRun, accuracy: float = 0.5) -> None:
    look = {"step": STEPS, "accuracy": {"value": accuracy}}
    folder = run.folder / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps({"chosen": f"step {STEPS}: the last", "selection": [look]}))


def test_only_a_run_that_ended_with_its_results_is_done(one: SweepRun) -> None:
    assert state_of(one) == NEW
    begin(one)
    written = yaml.safe_load((one.folder / "run.yaml").read_text())
    assert written["evaluation"].pop("baselines") == "sweep/baselines" and written == one.settings
    assert state_of(one) == REPEATED and end(one, 0, 5.0) == FAILED, "no results"
    (one.folder / "checkpoint-1").mkdir()
    begin(one)
    assert not (one.folder / "checkpoint-1").exists(), "what a run that begins anew left is in its way"
    evaluated(one)
    assert end(one, -signal.SIGTERM, 5.0, stopped=True) == BEGUN and state_of(one) == REPEATED
    assert end(one, -signal.SIGKILL, 5.0) == FAILED, "killed by the system, as for memory"
    assert end(one, 0, 5.0) == DONE == state_of(one)
    record = read_record(one.folder)
    assert record is not None and (record.arm, record.seed, record.seconds) == ("method", 0, 20.0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda run: run.settings.update(max_steps=7), "max_steps: 12 there, 7 now"),
        (lambda run: run.settings["evaluation"].update(grader="exact"), "evaluation.grader"),
        (lambda run: Path("train-0.jsonl").write_text("{}"), "files.train-0.jsonl"),
        (lambda run: Path("kept.jsonl").write_text("{}"), "files.kept.jsonl"),
        (lambda run: run.settings.update(report_to="none", save_steps=5), None),  # change no number
        (lambda run: run.settings["evaluation"].update(baselines="elsewhere"), None),
    ],
)
def test_runs_of_two_kinds_are_not_mixed(one: SweepRun, change: Any, named: str | None) -> None:
    """A changed file of rows has the same name in the settings."""
    begin(one)
    evaluated(one)
    end(one, 0, 5.0)
    change(one)
    digest.cache_clear()
    if named is None:
        assert state_of(one) == DONE
    else:
        with pytest.raises(CheckpointError, match=f"other settings or files:\n  {named}"):
            state_of(one)


@pytest.mark.parametrize(("chosen", "accuracy"), [(None, None), (0, 0.1), (4, 0.6), (5, 0.6), (8, 0.5)])
def test_the_selection_accuracy_is_that_of_the_checkpoint_the_run_ended_with(
    tmp_path: Path, chosen: int | None, accuracy: float | None
) -> None:
    """With the best checkpoint kept, the last look is of another model."""
    looks = [{"step": step, "accuracy": {"value": value}} for step, value in ((0, 0.1), (4, 0.6), (8, 0.5))]
    summary = {"selection": looks} | ({} if chosen is None else {"chosen": f"step {chosen}: the best"})
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "evaluation.json").write_text(json.dumps(summary))
    assert selection_accuracy(tmp_path) == accuracy


def test_a_folder_of_something_else_is_not_written_over(one: SweepRun) -> None:
    one.folder.mkdir(parents=True)
    (one.folder / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match="holds no run of a sweep"):
        state_of(one)


def test_a_models_weights_are_among_the_files_of_a_run(one: SweepRun, tmp_path: Path) -> None:
    """The folder of a model that was trained again has the same name and size."""
    assert set(record_of(one).files) > {one.settings["model_name_or_path"], "train-0.jsonl", "test.jsonl", "kept.jsonl"}
    model = tmp_path / "model"
    model.mkdir()
    weights = bytearray(8 * 2**20)
    (model / "model.safetensors").write_bytes(weights)
    before = files_of({"model": str(model)})
    weights[-1] = 1
    (model / "model.safetensors").write_bytes(weights)
    digest.cache_clear()
    assert files_of({"model": str(model)}) != before


def test_only_the_first_run_of_the_method_is_examined(run_file: str) -> None:
    sweep = Sweep(read_sweep([run_file, "--seed", "0", "1"]), [])
    assert sweep._examined is sweep.plan.runs[0]
    commands = [job_of(run, examined=run is sweep._examined).command for run in sweep.plan.runs]
    assert [("--skip-doctor" in command) for command in commands] == [False, True, True, True, True]
    assert not any("--resume_from_checkpoint" in command for command in commands)


def test_the_best_value_of_an_arm_is_that_of_the_selection_split(run_file: str, capsys) -> None:
    given = [run_file, "--learning_rate", "1e-3", "1e-2", "1e-1", "--seed", "0", "1", "--seeds-at", "best"]
    sweep = Sweep(read_sweep([*given, "--arms", "method", "sft"]), [])
    accuracies = {"method": (0.4, 0.6, 0.5), "sft": (0.7, 0.7, None)}  # equal: the first; None: its run failed
    for run in sweep.plan.first_runs:
        accuracy = accuracies[run.arm][(1e-3, 1e-2, 1e-1).index(run.values["learning_rate"])]
        sweep.states[run.name] = "failed" if accuracy is None else DONE
        if accuracy is not None:
            evaluated(run, accuracy)
    best = sweep._best()
    assert best == {"method": {"learning_rate": 1e-2}, "sft": {"learning_rate": 1e-3}}
    assert [run.name for run in sweep.plan.later_runs(best)] == ["method-lr0.01-seed1"]  # sft has one seed
    assert sweep.plan.later_count == 1
    assert sweep.plan.choice == ["each arm at its best accuracy on the selection split; the test split chooses nothing"]
    assert "best        method: learning_rate 0.01, 60.0% on the selection split" in capsys.readouterr().out


def test_the_time_left_counts_runs_that_go_on_from_a_checkpoint_whole(one: SweepRun) -> None:
    sweep = Sweep(SweepPlan(Path("sweep"), [one], jobs=1), [])
    begin(one)
    evaluated(one)
    sweep.states[one.name] = end(one, 0, 120.0)
    assert sweep._progress() == "1 of 1 runs done"
    sweep._missing = 2
    assert sweep._progress() == "1 of 3 runs done, about 4 minutes left"
    assert RESUMED not in sweep.states.values()


def test_a_sweep_whose_first_runs_all_fail_is_stopped(run_file: str, capsys) -> None:
    rates = ["1e-4", "1e-3", "1e-2", "1e-1"]
    sweep = Sweep(read_sweep([run_file, "--learning_rate", *rates, "--arms", "method", "--skip-doctor"]), [])
    sweep._goes_on = True
    goes_on = []
    for run in sweep.plan.runs:
        begin(run)
        (run.folder / LOG).write_text("no memory\n")
        goes_on.append(sweep._ended(job_of(run, examined=False), 1, 5.0))
    assert goes_on == [True, True, False, False]
    assert "the first 3 runs failed, and the sweep was stopped" in capsys.readouterr().out
