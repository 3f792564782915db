"""A run as a report needs it: everything that its folder holds, and what is missing or damaged, in words.

A run that broke off, or one of an older version, is read as far as it goes. Knows files; nothing of pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from opsd.errors import CheckpointError
from opsd.evaluation.result import EvaluationResult
from opsd.evaluation.run_folder import CARD, read_card
from opsd.evaluation.summary import AFTER, BEFORE, FOLDER, SUMMARY, file_of, read_summary, results_of
from opsd.health.log import read_log
from opsd.health.rollout import TracedRollout
from opsd.health.traces import FOLDER as TRACES
from opsd.health.traces import files_in, read_file
from opsd.health.watch import Watch, replay
from opsd.report.missing import Missing


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"it holds {type(value).__name__} in place of a mapping")
    return value


def card_of(folder: Path) -> dict[str, Any]:
    """Return the card of a run.

    Raises:
        CheckpointError: it has none.
        ValueError: it is damaged.
    """
    if not (folder / CARD).is_file():
        raise CheckpointError("the folder has none, as that of another trainer")
    card = _mapping(read_card(str(folder)))
    for name in ("settings", "divergence", "teacher", "outcome"):
        _mapping(card.get(name, {}))
    int(card.get("settings", {}).get("max_steps") or 0)
    return card


def _read_summary(folder: Path) -> dict[str, Any]:
    summary = _mapping(read_summary(folder))
    for name in ("metrics", "retention", "gain"):
        _mapping(summary.get(name, {}))
    for look in summary.get("selection") or ():
        _mapping(look)
    return summary


@dataclass(frozen=True)
class ReportedRun:
    """What a run's folder holds.

    >>> run = read_run(Path("runs/first"))
    >>> run.logs[-1]["divergence"], run.missing
    (0.21, ['the evaluation: the run has none'])

    Args:
        folder: of the run.
        card: its run card; empty where it has none.
        logs: its log entries, each with `step`.
        rollouts: its traces.
        summary: `evaluation.json`; empty without an evaluation.
        results: of the test split, by time.
        watch: what the monitors of health say of the log and the traces.
        missing: what is not there, or damaged, a sentence each.
        traces: the files of the rollouts, and how many each has.
    """

    folder: Path
    card: Mapping[str, Any] = field(default_factory=dict)
    logs: Sequence[Mapping[str, Any]] = ()
    rollouts: Sequence[TracedRollout] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, EvaluationResult] = field(default_factory=dict)
    watch: Watch = field(default_factory=Watch)
    missing: Sequence[str] = ()
    traces: Sequence[tuple[Path, int]] = ()

    def whole(self, places: Sequence[int]) -> list[TracedRollout]:
        """Return some of the rollouts with the likeliest tokens, which the others do without: they take memory.

        Args:
            places: among `rollouts`, in their order.
        """
        wanted, start, found = set(places), 0, list[TracedRollout]()
        for path, count in self.traces:
            if wanted & set(range(start, start + count)):
                found += [each for n, each in enumerate(read_file(path, alternatives=True), start) if n in wanted]
            start += count
        return found or [self.rollouts[place] for place in places]

    @property
    def has_ended(self) -> bool:
        """Whether it came to its last step; a run that was stopped logs its seconds too."""
        ends = any("train_runtime" in entry for entry in self.logs) and self.steps >= self.planned_steps
        return "outcome" in self.card or ends

    @property
    def steps(self) -> int:
        """The last step that is known."""
        looks = [look["step"] for look in self.summary.get("selection") or () if isinstance(look.get("step"), int)]
        return max([*(entry["step"] for entry in self.logs), *looks, self.card.get("outcome", {}).get("steps") or 0])

    @property
    def has_evaluation(self) -> bool:
        """Whether it has a folder of results."""
        return (self.folder / FOLDER).is_dir()

    @property
    def planned_steps(self) -> int:
        """The steps that it was to make; 0 where that is unknown."""
        return max(int(self.card.get("settings", {}).get("max_steps") or 0), 0)

    @property
    def divergence(self) -> str:
        """The name of what is minimised, such as "reverse KL"."""
        return str(self.card.get("divergence", {}).get("description", "divergence")).partition("(")[0].strip()


def read_run(folder: Path) -> ReportedRun:
    """Read a run.

    Raises:
        CheckpointError: the folder holds nothing of a run.
    """
    lacks = Missing()
    tried, missing = lacks.tried, lacks.found
    card = tried(f"the run card ({CARD})", lambda: card_of(folder), dict[str, Any]())
    logs, damaged, _ = tried("the log", lambda: read_log(folder), (list[dict[str, Any]](), 0, folder))
    if not card and not logs:
        raise CheckpointError(
            f"{folder} holds no run: neither a run card nor a log. Give the output folder of `opsd train`, or of a "
            "transformers trainer that saved its state."
        )
    if damaged:
        missing.append(f"the log: {damaged} line(s) are damaged and left out")
    rollouts: list[TracedRollout] = []
    paths = [path for _, _, path in files_in(folder / TRACES)]
    traces: list[tuple[Path, int]] = []
    for path in paths:
        of_file = tried(f"the trace {path.name}", partial(read_file, path), list[TracedRollout]())
        traces += [(path, len(of_file))] if of_file else []
        rollouts += of_file
    if not paths:
        missing.append("traces: the run kept none (trace_rollouts), so that no tokens can be shown")
    evaluation = folder / FOLDER
    summary = tried(f"the evaluation ({FOLDER}/{SUMMARY})", lambda: _read_summary(evaluation), dict[str, Any]())
    results = tried("the answers of the evaluation", lambda: results_of(evaluation), dict[str, EvaluationResult]())
    if not evaluation.is_dir():
        missing.append("the evaluation: the run has none, so that nobody knows whether it helped (`evaluation:`)")
    watch = tried("health", lambda: replay(logs, rollouts), Watch())
    missing += [f"the monitor {name}: {reason}" for name, reason in watch.broken.items()]
    run = ReportedRun(folder, card, logs, rollouts, summary, results, watch, missing, traces)
    if BEFORE in results and AFTER not in results and run.has_ended:
        missing.append(f"the answers after training: {FOLDER}/{file_of('test', AFTER)} is not there")
    logged = max((entry["step"] for entry in logs), default=0)
    if "outcome" in card and logged + int(card.get("settings", {}).get("logging_steps") or 1) < run.steps:
        missing.append(f"the log: it ends at step {logged}, and the run made {run.steps}")
    if card and not run.has_ended:
        of_all = f" of {run.planned_steps}" if run.planned_steps else ""
        missing.append(f"the end: the run has not ended; its last log entry is of step {run.steps}{of_all}")
    return run
