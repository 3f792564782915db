"""What the experiments have in common: run files, splits, and models that other experiments trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.learning import tasks
from opsd.commands.demo_tasks import packaged_model, write_rows
from opsd.evaluation.compare import read_runs
from opsd.evaluation.pareto import tradeoff_of

ROLLOUTS = 16  # per step
SENTENCE = "benchmarks.learning.graders:sentence"
Arms = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    Args:
        asks: the question that it answers.
        prepare: (folder, seeds) -> the run file, with its `sweep:`; writes rows into the folder.
        keep: "all" where other experiments need its models.
        form: whether an answer has the form that was asked for, counted on every split.
        measure: (folder, run file, seed) -> arm -> figures from before training; a table sets them beside its gains.
    """

    asks: str
    prepare: Callable[[Path, Sequence[int]], dict[str, Any]]
    keep: str = "none"
    form: Callable[[str], bool] | None = None
    measure: Callable[[Path, Mapping[str, Any], int], dict[str, dict[str, Any]]] | None = None


def run_file(folder: Path, seeds: Sequence[int], rates: Sequence[float], arms: Arms, **settings: Any) -> dict[str, Any]:
    """Return the run file of a sweep over learning rates, seeds and arms."""
    sweep = {"learning_rate": list(rates), "seed": list(seeds), "arms": arms}
    return {**common_settings(folder, **settings), "sweep": sweep}


def common_settings(folder: Path, **settings: Any) -> dict[str, Any]:
    """Return a run file with what all experiments have in common."""
    return {
        "model_name_or_path": packaged_model(),
        "dataset_name": str(folder / "train-{seed}.jsonl"),
        "output_dir": str(folder / "sweep"),
        "per_device_train_batch_size": ROLLOUTS,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 2,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        **settings,
    }


def evaluation(folder: Path, steps: int, selection: Any, test: Any, grader: str, **retention: Any) -> dict[str, Any]:
    """Write the splits of an experiment and return its `evaluation:`; retention is name=(rows, grader).

    The selection split is evaluated after the last step only: it chooses learning rates, not checkpoints.
    """
    chosen = {}
    if selection is not None:
        write_rows(folder / "selection.jsonl", selection)
        chosen = {"selection": str(folder / "selection.jsonl"), "every": steps}
    write_rows(folder / "test.jsonl", test)
    others = {}
    for name, (rows, its_grader) in retention.items():
        write_rows(folder / f"{name}.jsonl", rows)
        others[name] = {"rows": str(folder / f"{name}.jsonl"), "grader": its_grader}
    return {
        "test": str(folder / "test.jsonl"),
        **chosen,
        "grader": grader,
        "retention": others,
        "batch_size": 100,
    }


def write_training(folder: Path, seeds: Sequence[int], rows_of: Callable[[int], list[tasks.Row]]) -> None:
    """Write the training rows of every seed."""
    for seed in seeds:
        write_rows(folder / f"train-{seed}.jsonl", rows_of(seed))


def models_of(folder: Path, experiment: str, arm: str) -> str:
    """Return the path of an arm's models at its best learning rate, {seed} for the seed."""
    runs = read_runs([str(folder.parent / experiment / "sweep")])
    best = next(point for point in tradeoff_of(runs).points if point.arm == arm and point.is_best)
    return best.task.runs[0].folder.removesuffix(f"seed{best.task.runs[0].seed}") + "seed{seed}"


def with_controls(*names: str) -> Arms:
    """Return the method's arm and controls."""
    return {"method": {}, **{name: {"control": name} for name in names}}


def in_sentences(rows: Sequence[tasks.Row]) -> list[tasks.Row]:
    """Return sums with their answers as `completion`, in the model's own kind of sentence."""
    return [{**row, "completion": f"The answer is {row['answer']}."} for row in rows]
