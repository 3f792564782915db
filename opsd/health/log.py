"""The log of a run, and files that get a line per entry: `log.jsonl`, `health.jsonl`.

Each line has `step`. A line is written when it is known, so that a run that broke off leaves what it had. Knows files
and plain values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opsd.errors import CheckpointError
from opsd.evaluation.run_folder import write_whole

FILE = "log.jsonl"
STATE = "trainer_state.json"  # transformers' own, at the end and in checkpoints
CHECKPOINT = re.compile(r"checkpoint-\d+")


class Lines:
    """A file with a line per entry; what cannot be written ends no run.

    >>> lines = Lines(Path("runs/first/log.jsonl"))
    >>> lines.append([{"step": 1, "divergence": 0.4}])

    Args:
        path: the file; its folder is made.
    """

    def __init__(self, path: Path):
        self.path = path
        self.damage = ""  # why it is not complete

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps that come again, in a run that begins anew or is resumed."""
        try:
            lines = self.path.read_text("utf-8").splitlines(keepends=True) if self.path.is_file() else []
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            if kept != lines:
                write_whole(self.path, "".join(kept))
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.damage = f"{type(error).__name__}: {error}"

    def begin(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Write the file anew."""
        try:
            write_whole(self.path, "".join(map(_line, entries)))
        except (OSError, TypeError, ValueError) as error:
            self.damage = f"not written: {error}"

    def append(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Add entries, a line each."""
        try:
            lines = [_line(entry) for entry in entries]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(lines)
        except (OSError, TypeError, ValueError) as error:
            self.damage = f"not written: {error}"


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, default=float) + "\n"


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the entries of a file of lines, and the number of lines that are damaged: a kill may cut the last one.

    Args:
        path: the file; a missing one has no entries.
    """
    entries, damaged = list[dict[str, Any]](), 0
    for line in path.read_text("utf-8", errors="replace").split("\n") if path.is_file() else ():
        if not line:
            continue
        try:
            entry = json.loads(line)
            entries.append({**entry, "step": int(entry["step"])})
        except (ValueError, KeyError, TypeError, OverflowError):
            damaged += 1
    return entries, damaged


def read_log(run: Path) -> tuple[list[dict[str, Any]], int, Path]:
    """Return the log of a run of opsd or of any transformers trainer.

    Args:
        run: an output folder, a checkpoint, or a trainer_state.json.

    Returns:
        The entries, each with `step`; the number of damaged lines; the run's folder.

    Raises:
        CheckpointError: there is no log, or it is damaged.
    """
    entries, damaged = read_lines(run / FILE)
    if entries:
        return entries, damaged, run
    path = _find_state(run)
    folder = path.parent.parent if CHECKPOINT.fullmatch(path.parent.name) else path.parent
    return _read_state(path), damaged, folder


def _find_state(run: Path) -> Path:
    """Return the newest trainer_state.json of a run: its own, or a checkpoint's."""
    if run.is_file():
        return run
    checkpoints = [path for path in run.glob(f"checkpoint-*/{STATE}") if CHECKPOINT.fullmatch(path.parent.name)]
    found = [path for path in (run / STATE, *checkpoints) if path.is_file()]
    if not found:
        raise CheckpointError(
            f"{run} holds no {FILE} or {STATE}, in which the log of a run is kept. Give the output folder of a run "
            "that has begun to log or saved a checkpoint; of another trainer, call trainer.save_state() at its end."
        )

    def last_step(path: Path) -> tuple[int, bool]:
        return max((entry["step"] for entry in _read_state(path)), default=0), path.parent == run

    return found[0] if len(found) == 1 else max(found, key=last_step)


def _read_state(path: Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads(path.read_text("utf-8"))["log_history"]
        return [{**entry, "step": int(entry["step"])} for entry in entries]
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path} is no log of a trainer ({type(error).__name__}: {error}).") from error
