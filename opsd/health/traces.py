"""Traces: a bounded sample of each step's rollouts, as Parquet in `traces/` of a run's folder.

Written by training, read by health and reports. Knows records and files; nothing of models.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pyarrow as pa  # of datasets, which stands on it
import pyarrow.parquet as pq

from opsd.errors import CheckpointError
from opsd.evaluation.run_folder import check_output
from opsd.health.rollout import Alternatives, TracedRollout

FOLDER = "traces"
NAME = re.compile(r"steps-(\d+)-(\d+)\.parquet")
MEBIBYTE = 2**20
_FLOATS = pa.list_(pa.float32())
_TEXTS = pa.list_(pa.string())
_ALTERNATIVES = pa.struct(
    [
        ("student_tokens", _TEXTS), ("student_logprobs", _FLOATS), ("teacher_tokens", _TEXTS),
        ("teacher_logprobs", _FLOATS), ("student_rank", pa.int32()), ("teacher_rank", pa.int32()),
    ]
)  # fmt: skip
ALTERNATIVES = "alternatives"
LATER = (ALTERNATIVES, "teacher_entropy")  # columns that traces of older versions do not have
SCHEMA = pa.schema(
    [
        ("step", pa.int32()), ("prompt", pa.string()), ("context", pa.string()), ("ids", pa.list_(pa.int32())),
        ("tokens", pa.list_(pa.string())), ("text", pa.string()), ("divergence", _FLOATS), ("entropy", _FLOATS),
        ("logprob", _FLOATS), ("teacher_logprob", _FLOATS), ("reward", pa.float32()), ("ended", pa.bool_()),
        ("on_policy", pa.bool_()), ("teacher_entropy", _FLOATS), ("alternatives", pa.list_(_ALTERNATIVES)),
    ]
)  # fmt: skip


class TraceFiles:
    """The trace files of a run: one per stretch of steps between two saves or log entries.

    >>> files = TraceFiles(Path("runs/first"), megabytes=64)
    >>> files.write(rollouts)
    >>> files.megabytes
    0.4

    Args:
        run: the run's folder.
        megabytes: what all files may take; above it every second one is removed.
    """

    def __init__(self, run: Path, megabytes: float):
        self.folder, self._most = run / FOLDER, megabytes

    def begin(self, step: int) -> None:
        """Remove what a new run, or one that is resumed after `step`, would write again."""
        for first, last, path in files_in(self.folder):
            if last <= step:
                continue
            kept = []
            with contextlib.suppress(CheckpointError):  # a damaged file is of a run that was killed: it comes again
                kept = read_file(path, alternatives=True) if first <= step else []
            path.unlink()
            if kept := [rollout for rollout in kept if rollout.step <= step]:
                self._write(kept)

    @property
    def megabytes(self) -> float:
        """What the files take, in MiB."""
        return sum(path.stat().st_size for _, _, path in files_in(self.folder)) / MEBIBYTE

    def write(self, rollouts: Sequence[TracedRollout]) -> bool:
        """Write rollouts of consecutive steps into a file of their own.

        Returns:
            Whether files became too large, so that every second one was removed, but for the first and the last.
        """
        if rollouts:
            self._write(rollouts)
        if self.megabytes <= self._most:
            return False
        for _, _, path in files_in(self.folder)[1:-1:2]:
            path.unlink()
        return True

    def _write(self, rollouts: Sequence[TracedRollout]) -> None:
        path = self.folder / f"steps-{rollouts[0].step:06d}-{rollouts[-1].step:06d}.parquet"
        write_rollouts(path, [(rollout, {}) for rollout in rollouts])


def write_rollouts(path: Path, rollouts: Sequence[tuple[TracedRollout, Mapping[str, str | int]]]) -> None:
    """Write rollouts into a Parquet file, each with more columns of its own, whole or not at all."""
    schema = SCHEMA
    for name, value in rollouts[0][1].items() if rollouts else ():
        schema = schema.append(pa.field(name, pa.int32() if isinstance(value, int) else pa.string()))
    table = pa.Table.from_pylist([{**asdict(rollout), **columns} for rollout, columns in rollouts], schema=schema)
    check_output(path)
    temporary = path.with_name(f".{path.name}")
    try:
        pq.write_table(table, temporary, compression="zstd")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def files_in(folder: Path) -> list[tuple[int, int, Path]]:
    """Return (first step, last step, path) of the files in a folder, in the order of steps."""
    found = [(NAME.fullmatch(path.name), path) for path in folder.glob("*.parquet")]
    return sorted((int(match[1]), int(match[2]), path) for match, path in found if match)


def read_traces(run: Path, *, alternatives: bool = False) -> Iterator[TracedRollout]:
    """Yield the traced rollouts of a run, in the order of steps; nothing where it kept none.

    Args:
        run: its folder.
        alternatives: whether they come with the likeliest tokens, which take most of the memory.

    Raises:
        CheckpointError: a file is damaged.
    """
    for _, _, path in files_in(run / FOLDER):
        yield from read_file(path, alternatives=alternatives)


def read_file(path: Path, *, alternatives: bool = False) -> list[TracedRollout]:
    """Return the rollouts of a trace file; arguments as of `read_traces`.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        stored = pq.read_schema(path).names
        names = [each.name for each in fields(TracedRollout) if alternatives or each.name != ALTERNATIVES]
        rows = pq.read_table(path, columns=[name for name in names if name in stored or name not in LATER]).to_pylist()
        read = [TracedRollout(**{name: _value(name, value) for name, value in row.items()}) for row in rows]
        for rollout in read:
            if any(value is None for value in vars(rollout).values()) or len(rollout.ids) != len(rollout.divergence):
                raise ValueError("a rollout lacks values")
        return read
    except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the trace {path} is damaged ({error}). Remove it; the others can be read.") from error


def _value(name: str, value: Any) -> Any:
    if name != ALTERNATIVES:
        return value
    return [None if each is None else Alternatives(**each) for each in value or ()]
