"""The runs of a sweep on disk: which are done, which go on from a checkpoint, which begin anew, and what differs.

Knows folders and records; starts no process.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from opsd.commands.processes import Job
from opsd.commands.sweep_plan import SweepRun
from opsd.errors import CheckpointError
from opsd.evaluation.run_folder import differences
from opsd.evaluation.summary import AFTER, BEFORE, FOLDER, is_evaluated, results_of
from opsd.evaluation.sweep_folder import BEGUN, DONE, FAILED, RECORD, RunRecord, read_record
from opsd.training import checkpoints
from opsd.training.resume import NOT_COMPARED
from opsd.training.run_lock import holder_of

BASELINES = "baselines"  # folder in the sweep's: what every run would measure before training
RUN_FILE, LOG = "run.yaml", "train.log"
NEW, RESUMED, REPEATED = "new", "goes on from its checkpoint", "begins anew"  # what is next to do, beside DONE
SAMPLE = 2**20  # bytes that are read at the start, in the middle and at the end of a large file
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "training_args.bin")


# ---- what a run is --------------------------------------------------------------------------------------------------


def record_of(run: SweepRun) -> RunRecord:
    """Return what a run is now: its settings, and digests of the files that they name."""
    settings = compared(run.settings)
    return RunRecord(run.arm, dict(run.values), run.seed, settings, files_of(settings))


def compared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run file that can change a number."""
    left_out = {*chain(*NOT_COMPARED.values()), "evaluation"}
    evaluation = {name: value for name, value in settings["evaluation"].items() if name != BASELINES}
    return {**{name: value for name, value in settings.items() if name not in left_out}, "evaluation": evaluation}


def files_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return a digest of each file or folder that a setting names."""
    texts = set(_texts(settings))
    return {text: digest(text) for text in sorted(texts) if _exists(text)}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from chain.from_iterable(map(_texts, value.values()))
    elif isinstance(value, list):
        yield from chain.from_iterable(map(_texts, value))


def _exists(text: str) -> bool:
    try:
        return bool(text.strip(". ")) and Path(text).exists()
    except (OSError, ValueError):  # too long for a path, or with a zero byte
        return False


@cache
def digest(path: str) -> str:
    """Return a hash of a file's content, or of all files in a folder; of large files their size and three samples."""
    root, hashed = Path(path), hashlib.sha256()
    for file in [root] if root.is_file() else sorted(each for each in root.rglob("*") if each.is_file()):
        size = file.stat().st_size
        hashed.update(f"{file.relative_to(root)} {size}\n".encode())
        with file.open("rb") as stream:
            for start in (0,) if size <= 3 * SAMPLE else (0, size // 2, size - SAMPLE):
                stream.seek(start)
                hashed.update(stream.read(3 * SAMPLE if size <= 3 * SAMPLE else SAMPLE))
    return hashed.hexdigest()[:16]


# ---- what is to do --------------------------------------------------------------------------------------------------


def state_of(run: SweepRun) -> str:
    """Return what is to do with a run: DONE, NEW, RESUMED or REPEATED.

    Raises:
        CheckpointError: its folder holds something else, or a run with other settings.
    """
    folder, record = run.folder, read_record(run.folder)
    if record is None:
        if folder.is_dir() and any(folder.iterdir()):
            raise CheckpointError(
                f"{folder} holds no run of a sweep (no {RECORD}), and would be written over. Choose another "
                "output_dir, or move it."
            )
        return NEW
    has_checkpoint = any(checkpoints.problem(each) is None for each in checkpoints.saved(folder))
    is_done = record.status == DONE and is_evaluated(folder / FOLDER)
    if is_done or has_checkpoint:
        _check_same(run, record)
    return DONE if is_done else RESUMED if has_checkpoint else REPEATED


def _check_same(run: SweepRun, record: RunRecord) -> None:
    """Refuse a run that was made by other settings or files than those asked for."""
    now = record_of(run)
    # A file that only the record has is one that a setting no longer names.
    files = {name: record.files.get(name) for name in now.files}
    sides = {"settings": compared(record.settings), "files": files}, {"settings": now.settings, "files": now.files}
    changes = [
        f"  {name.removeprefix('settings.')}: {before!r} there, {after!r} now"
        for name, before, after in differences(*sides)
    ]
    if changes:
        raise CheckpointError(
            f"{run.folder} was made with other settings or files:\n" + "\n".join(changes) + "\nA sweep compares runs "
            "of one kind, and this one would mix two. Restore them, choose another output_dir, or delete that folder."
        )


def wait_until_free(runs: Sequence[SweepRun], say: Any) -> None:
    """Wait for runs of an earlier sweep that still save their last step."""
    for run in runs:
        holder = holder_of(run.folder)
        if holder:
            say(f"waiting     {run.name} is still in use by {holder}")
        while holder_of(run.folder):
            time.sleep(1)


# ---- before and after a process -------------------------------------------------------------------------------------


def job_of(run: SweepRun, examined: bool) -> Job:
    """Return the command that trains a run."""
    command = [sys.executable, "-m", "opsd", "train", str(run.folder / RUN_FILE)]
    if "disable_tqdm" not in run.settings:  # bars have no place in a log file
        command += ["--disable_tqdm", "true"]
    if state_of(run) == RESUMED:
        command += ["--resume_from_checkpoint", "true"]
    return Job(run.name, [*command, *([] if examined else ["--skip-doctor"])], run.folder / LOG)


def begin(run: SweepRun) -> None:
    """Ready the folder of a run: its run file and its record; what a run without a checkpoint left is removed."""
    earlier, folder = read_record(run.folder), run.folder
    if earlier is not None and state_of(run) == REPEATED:
        for path in folder.iterdir():
            if path.name not in (LOG, RECORD):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    evaluation = {BASELINES: str(folder.parent / BASELINES), **run.settings["evaluation"]}
    content = yaml.safe_dump({**run.settings, "evaluation": evaluation}, sort_keys=False)
    (folder / RUN_FILE).write_text(content, "utf-8")
    record = record_of(run)
    record.after(BEGUN, earlier.seconds if earlier else 0.0).write(folder)


def end(run: SweepRun, exit_status: int, seconds: float, *, keep: str = "all", stopped: bool = False) -> str:
    """Write down how a process of a run ended, and remove weights that are not kept; returns the run's status.

    Args:
        run: the run.
        exit_status: of its process.
        seconds: that it took.
        keep: "all" or "none".
        stopped: whether the sweep stopped it, which is no failure.
    """
    is_done = exit_status == 0 and is_evaluated(run.folder / FOLDER)
    status = DONE if is_done else BEGUN if stopped else FAILED
    record = read_record(run.folder)
    assert record is not None
    record.after(status, seconds).write(run.folder)
    if is_done and keep == "none":
        for path in chain(checkpoints.saved(run.folder), *(run.folder.glob(pattern) for pattern in WEIGHTS)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return status


def last_lines(run: SweepRun, count: int = 8) -> list[str]:
    """Return the end of a run's log."""
    return (run.folder / LOG).read_text("utf-8", errors="replace").splitlines()[-count:]


def seconds_of(run: SweepRun) -> float:
    """Return how long a run took, all attempts together."""
    record = read_record(run.folder)
    return record.seconds if record else 0.0


def outcome(run: SweepRun) -> str:
    """Return the accuracy of a finished run, before and after training."""
    results = results_of(run.folder / FOLDER)
    before = f" (before {results[BEFORE].accuracy:.1%})" if BEFORE in results else ""
    return f"accuracy {results[AFTER].accuracy:.1%}{before}"
