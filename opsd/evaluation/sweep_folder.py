"""What `opsd sweep` writes into its folder, and into that of each run: which runs it has, and what each of them is.

Knows files; nothing of models or training.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from opsd.errors import CheckpointError
from opsd.evaluation.run_folder import write_json

SWEEP, RECORD = "sweep.json", "sweep_run.json"
SHORT = {"learning_rate": "lr"}  # in names of folders and points
BEGUN, DONE, FAILED = "begun", "done", "failed"


@dataclass(frozen=True)
class RunRecord:
    """What a run of a sweep is, as its folder holds it.

    Args:
        arm: the name of its arm.
        values: what is swept beside the seed, and the learning rate.
        seed: of training.
        settings: those of its run file that can change a number.
        files: digests of the files and folders that its settings name.
        status: BEGUN, DONE or FAILED.
        seconds: wall clock of its processes, all attempts together.

    Example:
        >>> RunRecord("method", {"learning_rate": 1e-5}, 0).status
        'begun'
    """

    arm: str
    values: Mapping[str, Any]
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    status: str = BEGUN
    seconds: float = 0.0

    def write(self, folder: Path) -> None:
        """Write the record into its run's folder."""
        write_json(folder / RECORD, asdict(self))

    def after(self, status: str, seconds: float) -> RunRecord:
        """Return the record of the run after a process of it has ended."""
        return replace(self, status=status, seconds=self.seconds + seconds)


def read_record(folder: str | Path) -> RunRecord | None:
    """Return the record of a sweep's run; None for other folders.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        return None
    try:
        return RunRecord(**json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}). Delete the folder, and the sweep trains it anew."
        ) from error


def write_sweep(folder: Path, values: Mapping[str, Any], runs: Iterable[str]) -> None:
    """Write what a sweep declares before its first run, and the names of its runs' folders."""
    write_json(folder / SWEEP, {**values, "runs": list(runs)})


def expanded(folders: Iterable[str]) -> list[str]:
    """Return folders of runs, with each sweep's folder replaced by those of its finished runs."""
    runs: list[str] = []
    for folder in folders:
        path = Path(folder) / SWEEP
        names = json.loads(path.read_text("utf-8"))["runs"] if path.is_file() else None
        runs += [folder] if names is None else [f"{folder}/{name}" for name in names if _is_done(Path(folder) / name)]
        if names is not None and not runs:
            raise CheckpointError(f"the sweep in {folder} has no finished run yet. Train them: `opsd sweep`.")
    return runs


def _is_done(folder: Path) -> bool:
    record = read_record(folder)
    return record is not None and record.status == DONE


def as_label(value: Any) -> str:
    """Return a value as names and tables show it: 3e-6, not 3e-06."""
    return re.sub(r"e([-+])0+", r"e\1", f"{value:g}") if isinstance(value, float) else str(value)
