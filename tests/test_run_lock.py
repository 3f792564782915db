"""One run at a time in an output folder: a second is refused before a model loads; a killed run leaves no lock."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import make_rows
from helpers import make_trainer

from opsd.cli import main
from opsd.errors import CheckpointError
from opsd.training.run_lock import LOCK, only_run_in

pytestmark = pytest.mark.slow  # each starts a process

HOLD = """
import os, sys, time
from opsd.training.run_lock import only_run_in

with only_run_in(sys.argv[1]):
    if sys.argv[2] == "fork" and os.fork() == 0:  # as a worker of a data loader
        print(os.getpid(), flush=True)
        time.sleep(60)
        os._exit(0)
    if sys.argv[2] == "alone":
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


def holder(folder: Path, kind: str = "alone") -> tuple[subprocess.Popen[str], int]:
    """Start a process that holds the lock, and return it with the process id that it prints."""
    command = [sys.executable, "-c", HOLD, str(folder), kind]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def test_a_second_run_is_refused_while_the_first_lives_and_no_longer(tmp_path: Path) -> None:
    """Two runs in one folder both ended well, with checkpoints of two seeds under one card."""
    process, pid = holder(tmp_path)
    try:
        with pytest.raises(CheckpointError, match=rf"in use by another run \(process {pid} on .*, since 20"):
            make_trainer(tmp_path, None, max_steps=1).train()
        assert [path.name for path in tmp_path.iterdir()] == [LOCK], "the refused run wrote something"
    finally:
        process.kill()
        process.wait()
    make_trainer(tmp_path, None, max_steps=1).train()
    assert (tmp_path / LOCK).read_text() == ""


def test_the_lock_of_a_machine_that_died_can_be_deleted(tmp_path: Path) -> None:
    """On NFS 3 it stays with the server, and the message offered only to wait, or another folder."""
    process, _ = holder(tmp_path)
    try:
        with pytest.raises(CheckpointError, match=f"known to be gone, delete {tmp_path / LOCK}"), only_run_in(tmp_path):
            pass
        (tmp_path / LOCK).unlink()
        with only_run_in(tmp_path):
            pass
    finally:
        process.kill()
        process.wait()


def test_a_run_is_refused_before_its_model_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    process, _ = holder(tmp_path / "run")
    arguments = ["--model_name_or_path", "no/such-model", "--dataset_name", str(rows), "--use_cpu"]
    try:
        assert main(["train", *arguments, "--output_dir", str(tmp_path / "run")]) == 2
    finally:
        process.kill()
        process.wait()
    assert "in use by another run" in capsys.readouterr().err


def test_a_child_that_outlives_a_killed_run_does_not_keep_its_lock(tmp_path: Path) -> None:
    process, child = holder(tmp_path, "fork")
    process.kill()
    process.wait()
    try:
        with only_run_in(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_process_may_take_its_lock_again(tmp_path: Path) -> None:
    """`opsd train` holds it while a model loads and is saved, and `OPSDTrainer.train` within."""
    with only_run_in(tmp_path):
        with only_run_in(tmp_path):
            pass
        process = subprocess.run(
            [sys.executable, "-c", HOLD, str(tmp_path), "alone"], capture_output=True, text=True, timeout=60
        )
    assert "in use by another run" in process.stderr


def test_a_killed_run_can_be_resumed_at_once(tmp_path: Path, llama_folder: str) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    arguments = ["--model_name_or_path", llama_folder, "--dataset_name", str(rows), "--context", "answer_only"]
    arguments += ["--output_dir", str(tmp_path / "run"), "--max_completion_length", "4", "--report_to", "none"]
    arguments += ["--save_steps", "1", "--use_cpu", "--bf16", "false", "--per_device_train_batch_size", "2"]
    command = [sys.executable, "-m", "opsd", "train", *arguments, "--skip-doctor", "--max_steps", "500"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.time() + 120
        while not (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").exists() and time.time() < deadline:
            time.sleep(0.05)
        second = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert second.returncode == 2 and "in use by another run" in second.stderr
        process.kill()
    last = max(int(path.name.split("-")[1]) for path in (tmp_path / "run").glob("checkpoint-*"))
    resumed = [*command, "--resume_from_checkpoint", "true", "--max_steps", str(last + 1)]
    done = subprocess.run([*resumed, "--allow-changes", "max_steps"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
