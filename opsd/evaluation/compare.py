"""Compares runs: whether the method beat its controls, with intervals over questions and over seeds.

Runs that differ only in seeds and training questions are one arm. Two sources of chance stay separate: which questions
were asked (intervals over questions), and which seed trained the model (spread over seeds). Knows run folders and
results; nothing of models or training.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from opsd.errors import CheckpointError, ConfigError, DataError
from opsd.evaluation.result import EvaluationResult
from opsd.evaluation.run_folder import differences, read_card
from opsd.evaluation.sample_metrics import Metric, meaning_of
from opsd.evaluation.selection import selection_accuracy
from opsd.evaluation.statistics import (
    Estimate,
    PairedDifference,
    SeedSpread,
    adjusted,
    estimate,
    over_seeds,
    paired_difference,
)
from opsd.evaluation.summary import AFTER, BEFORE, FOLDER, TEACHER, read_summary, results_of
from opsd.evaluation.sweep_folder import expanded, read_record
from opsd.evaluation.verdict import Pairwise, over_all, with_verdict

METHOD = "method"
# What may differ between runs of one arm: the seed and what follows from it, paths, and the machine.
_SAME_ARM = (
    "settings.seed", "settings.data_seed", "seeds.", "hashes.data", "hashes.questions", "rows", "prompts", "doctor",
    "hardware.", "versions.",
)  # fmt: skip
# What a control must share with its method.
_BUDGET = ("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
           "steps_per_generation", "learning_rate", "lr_scheduler_type", "max_completion_length",
           "completion_length_schedule")  # fmt: skip


@dataclass(frozen=True)
class RunResult:
    """One run and its results on the test split.

    Args:
        folder: its output folder.
        arm: the control's name, or METHOD.
        seed: of training.
        card: its run card; empty for a file of `opsd eval`.
        results: results of the test split by time.
        drift: nats per token that the student moved on neutral prompts; None if not measured.
        values: of a sweep: what is swept beside the seed.
        selection: accuracy on the selection split; None without one.
        retention: results of other tasks, by their names and by time.

    Example:
        >>> from opsd.evaluation import Answer
        >>> answers = [Answer("19", True, 2, True), Answer("8", False, 2, True)]
        >>> result = EvaluationResult(["12 + 7", "3 + 4"], "last_number", answers, [])
        >>> RunResult("runs/first", METHOD, 0, {}, {AFTER: result}).after.accuracy
        0.5
    """

    folder: str
    arm: str
    seed: int
    card: Mapping[str, Any]
    results: Mapping[str, EvaluationResult]
    drift: float | None = None
    values: Mapping[str, Any] | None = None
    selection: float | None = None
    retention: Mapping[str, Mapping[str, EvaluationResult]] = field(default_factory=dict)

    @property
    def after(self) -> EvaluationResult:
        """The result of the trained student."""
        return self.results[AFTER]


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seeds only.

    Args:
        name: the control's name, METHOD, or the folders' name where there are several methods.
        runs: in the order of their seeds.
        after: the metric after training, mean over seeds, with its interval over questions.
        gain: after minus before, likewise; None where nothing was measured before training.
        spread: of the metric after training, over seeds.
        drift: nats per token, mean over seeds; None unless measured in all runs.

    Example:
        >>> comparison = compare(read_runs(["runs/first", "runs/second"]))  # doctest: +SKIP
        >>> comparison.arms[0].spread.deviation  # doctest: +SKIP
        0.02
    """

    name: str
    runs: Sequence[RunResult]
    after: Estimate
    gain: PairedDifference | None
    spread: SeedSpread
    drift: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Arms side by side; the first is compared with every other one.

    Args:
        metric: name of the metric.
        grader: name of the grader.
        arms: in the order given, the method first.
        pairwise: one comparison per other arm.
        before: the student before training; None if not measured.
        ceiling: the teacher with its context; None if not measured.
        warnings: what makes the comparison unfair.

    Example:
        >>> comparison = compare(read_runs(["runs/method-0", "runs/sft-0"]))  # doctest: +SKIP
        >>> comparison.verdict  # doctest: +SKIP
        'method beat its control (sft)'
    """

    metric: str
    grader: str
    arms: Sequence[Arm]
    pairwise: Sequence[Pairwise]
    before: Estimate | None
    ceiling: Estimate | None
    warnings: Sequence[str] = field(default_factory=list)

    @property
    def kind(self) -> Metric:
        """The metric's line of the table of metrics."""
        return meaning_of(self.metric)

    @property
    def verdict(self) -> str:
        """Whether the method beat the others, in a sentence."""
        if not self.pairwise:
            return "one arm only: nothing to compare with. Train a control: opsd train … --control wrong-context"
        if not self.arms[0].runs[0].card:
            return "these are single models: the spread between training runs is not part of the comparison"
        if not self.kind.more_is_better:
            return f"more {self.metric} is neither better nor worse by itself"
        return over_all(self.arms[0].name, self.pairwise)


# ---- reading ----------------------------------------------------------------------------------------------------


def read_runs(folders: Sequence[str]) -> list[RunResult]:
    """Return the runs in output folders; a file that `opsd eval --output` wrote counts as a run of its name.

    Raises:
        CheckpointError: a folder holds no run, or one without a result after training.
    """
    runs: list[RunResult] = []
    for folder in expanded(folders):
        if Path(folder).is_file():
            runs.append(_from_file(Path(folder), {run.arm for run in runs}))
            continue
        results = results_of(Path(folder) / FOLDER)
        if AFTER not in results:
            raise CheckpointError(
                f"{folder} was not measured after training: it has no {FOLDER}/{AFTER}.json. Train it with an "
                "`evaluation:` in its YAML; or compare files: `opsd eval RUN … --output RUN.json` of each."
            )
        runs.append(_from_folder(Path(folder), results))
    return runs


def _from_folder(folder: Path, results: Mapping[str, EvaluationResult]) -> RunResult:
    card, record, summary = read_card(str(folder)), read_record(folder), read_summary(folder / FOLDER)
    settings, drift = card["settings"], summary.get("drift")
    return RunResult(
        str(folder),
        record.arm if record else settings.get("control") or METHOD,
        settings.get("seed", 0),
        card,
        results,
        drift and drift["per_token"]["value"],
        record.values if record else None,
        selection_accuracy(folder),
        {name: results_of(folder / FOLDER, f"retention {name}") for name in summary.get("retention", {})},
    )


def _from_file(path: Path, taken: set[str]) -> RunResult:
    arm = path.stem if path.stem not in taken else str(path.with_suffix(""))
    return RunResult(str(path), arm, 0, {}, {AFTER: EvaluationResult.load(path)})


# ---- comparing --------------------------------------------------------------------------------------------------


def compare(runs: Sequence[RunResult], metric: str = "accuracy") -> Comparison:
    """Return a comparison of the runs' arms: the method's, or else the first, against all others.

    Raises:
        ConfigError: there are no runs, the metric is unknown, or it needs more samples than there are.
        DataError: the runs differ in questions, grader, or context of the evaluation.
    """
    if not runs:
        raise ConfigError("there are no runs to compare. Name their output folders.")
    reference = runs[0].after
    _check_contexts(runs)
    values = values_of(runs, metric)
    arms = arms_of(runs, metric)
    pairs = [pair_of(arms[0], other, values) for other in arms[1:]]
    p_values = adjusted([pair.p_value for pair in pairs]) if pairs else []
    first, kind, trained = arms[0].name, meaning_of(metric), bool(runs[0].card)
    ceiling = next((run.results[TEACHER] for run in runs if TEACHER in run.results), None)
    before = next((run.results[BEFORE] for run in runs if BEFORE in run.results), None)
    return Comparison(
        metric,
        reference.grader,
        arms,
        [
            with_verdict(replace(pair, p_value=p), first, kind, trained=trained)
            for pair, p in zip(pairs, p_values, strict=True)
        ],
        None if before is None else before.estimate(metric),
        None if ceiling is None else ceiling.estimate(metric),
        [*_unequal_budgets(arms), *_unequal_seeds(arms), *_unequal_rows(arms), *_ungraded(runs)],
    )


def values_of(runs: Sequence[RunResult], metric: str) -> dict[str, np.ndarray]:
    """Return a metric per question after training by run, the questions in the order of the first run's."""
    return {run.folder: run.after.in_order_of(runs[0].after).graded_values(metric) for run in runs}


def arms_of(runs: Sequence[RunResult], metric: str = "accuracy") -> list[Arm]:
    """Return the arms of runs, the method's first; runs of a sweep that differ in values are arms of their own."""
    values = values_of(runs, metric)
    return [_arm(name, each, metric, values, runs[0].after) for name, each in _by_arm(runs).items()]


def _check_contexts(runs: Sequence[RunResult]) -> None:
    contexts = {run.after.context: run.folder for run in runs}
    if len(contexts) > 1:
        listed = "; ".join(f"{folder}: {context}" for context, folder in contexts.items())
        raise DataError(
            f"models can be compared only with the same context in their prompts ({listed}). A model that sees the "
            "answer has another task. Evaluate all without --context, or all with it."
        )


def _by_arm(runs: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    """Return the runs of each arm in the order of their seeds, the method's arm first."""
    groups: list[list[RunResult]] = []
    for run in runs:
        group = next((group for group in groups if is_same_arm(group[0], run)), None)
        if group is None:
            groups.append([run])
        elif any(run.seed == other.seed for other in group):
            raise DataError(
                f"{run.folder} has the seed {run.seed} of another run of its arm: two runs of one seed say nothing "
                "about the spread over seeds. Name one of them."
            )
        else:
            group.append(run)
    groups.sort(key=lambda group: group[0].arm != METHOD)
    arms = [group[0].arm for group in groups]
    named: dict[str, list[RunResult]] = {}
    for group in groups:
        is_unique = arms.count(group[0].arm) == 1
        name = group[0].arm if is_unique else re.sub(r"[-_.]?(seed)?\d+$", "", Path(group[0].folder).name)
        while name in named:
            name += "'"
        named[name] = sorted(group, key=lambda run: run.seed)
    return named


def is_same_arm(run: RunResult, other: RunResult, apart_from: tuple[str, ...] = ()) -> bool:
    """Tell whether runs differ in nothing but their seeds, and settings that may differ: `settings.NAME`."""
    if run.arm != other.arm:
        return False
    if run.values is not None and other.values is not None:  # a sweep says what differs
        return bool(apart_from) or run.values == other.values
    may_differ = (*_SAME_ARM, *apart_from)
    return bool(run.card) and all(name.startswith(may_differ) for name, _, _ in differences(run.card, other.card))


def _arm(
    name: str, runs: Sequence[RunResult], metric: str, values: Mapping[str, np.ndarray], reference: EvaluationResult
) -> Arm:
    after = np.mean([values[run.folder] for run in runs], axis=0)
    befores = [
        run.results[BEFORE].in_order_of(reference).graded_values(metric) for run in runs if BEFORE in run.results
    ]
    gain = paired_difference(np.mean(befores, axis=0), after) if len(befores) == len(runs) else None
    spread = over_seeds([float(np.nanmean(values[run.folder])) for run in runs])
    drifts = [run.drift for run in runs if run.drift is not None]
    drift = float(np.mean(drifts)) if len(drifts) == len(runs) else None
    return Arm(name, runs, estimate(after, is_share=meaning_of(metric).is_share), gain, spread, drift)


def pair_of(first: Arm, other: Arm, values: Mapping[str, np.ndarray]) -> Pairwise:
    """Return the first arm minus another one, paired by question and seed.

    Args:
        first: an arm.
        other: another arm.
        values: one number per question, by the folder of the run.
    """
    by_seed = [{run.seed: values[run.folder] for run in arm.runs} for arm in (first, other)]
    both = sorted(by_seed[0].keys() & by_seed[1].keys())
    if both:
        sides = [np.mean([each[seed] for seed in both], axis=0) for each in by_seed]
        each_seed = [float(np.nanmean(by_seed[0][seed] - by_seed[1][seed])) for seed in both]
    else:
        sides = [np.mean(list(each.values()), axis=0) for each in by_seed]
        each_seed = [float(np.nanmean(sides[0] - sides[1]))]
    difference = paired_difference(sides[1], sides[0])
    return Pairwise(other.name, difference, difference.p_value, over_seeds(each_seed), by_seed=each_seed)


# ---- warnings ---------------------------------------------------------------------------------------------------


def _unequal_budgets(arms: Sequence[Arm]) -> Iterator[str]:
    first, swept = arms[0].runs[0].card.get("settings", {}), arms[0].runs[0].values or {}
    for arm in arms[1:]:
        settings = arm.runs[0].card.get("settings", {})
        for name in _BUDGET if first and settings else ():  # a file of `opsd eval` has no settings
            if name in swept and name in (arm.runs[0].values or {}):
                continue
            if settings.get(name) != first.get(name):
                values = f"{first.get(name)} in {arms[0].name} and {settings.get(name)} in {arm.name}"
                yield f"not the same budget: {name} is {values}"


def _unequal_seeds(arms: Sequence[Arm]) -> Iterator[str]:
    first = {run.seed: run for run in arms[0].runs if run.card}
    for arm in arms[1:]:
        runs = {run.seed: run for run in arm.runs if run.card}
        both, alone = sorted(runs.keys() & first.keys()), sorted(runs.keys() - first.keys()) if first else []
        if alone and both:
            yield f"{arm.name} has seed {alone[0]}, and {arms[0].name} has not: it is in no difference"
        elif alone:
            yield f"{arm.name} and {arms[0].name} have no seed in common: their difference includes that of the seeds"
        for seed in both:
            if len({run.card["hashes"].get("questions") for run in (runs[seed], first[seed])}) > 1:
                yield f"seed {seed}: {arm.name} and {arms[0].name} were not trained on the same questions"


def _unequal_rows(arms: Sequence[Arm]) -> Iterator[str]:
    for arm in arms:
        first = arm.runs[0]
        for run in arm.runs:
            if run.card.get("rows") != first.card.get("rows"):
                counts = f"{run.card['rows']} rows, and seed {first.seed} on {first.card['rows']}"
                yield f"{arm.name}: seed {run.seed} was trained on {counts}"


def _ungraded(runs: Sequence[RunResult]) -> Iterator[str]:
    for run in runs:
        if count := len(run.after.ungraded):
            questions = f"{count} of {run.after.n} questions have answers that the grader failed on"
            yield f"{run.folder}: {questions}; they are left out"


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison in plain values."""

    def plain(value: Any) -> Any:
        if isinstance(value, RunResult):
            after = vars(value.after.estimate(comparison.metric))
            return {"folder": value.folder, "seed": value.seed, "after": after}
        if isinstance(value, list | tuple):
            return [plain(each) for each in value]
        return {k: plain(v) for k, v in vars(value).items()} if is_dataclass(value) else value

    return {"verdict": comparison.verdict, **plain(comparison)}
