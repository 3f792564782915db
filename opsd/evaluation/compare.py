"""Compares runs: did the method beat its controls, how sure is that, and what would settle it?

Runs that differ in nothing but seeds and training questions are one arm. Two kinds of chance stay apart: which
questions were asked (intervals over questions), and which seed trained the model (the spread over seeds). Knows run
folders and results; nothing of models or training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from opsd.errors import CheckpointError, ConfigError, DataError
from opsd.evaluation.result import EvaluationResult
from opsd.evaluation.run_folder import differences, read_card
from opsd.evaluation.sample_metrics import Metric, meaning_of
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
from opsd.evaluation.verdict import Pairwise, Verdict, beats

METHOD = "method"
# What may differ between runs of one arm: the seed and what follows from it, the place, and the machine.
_SAME_ARM = (
    "settings.seed", "settings.data_seed", "seeds.", "hashes.data", "hashes.questions", "rows", "prompts", "doctor",
    "hardware.", "versions.",
)  # fmt: skip
# What a control must share with its method: the budget.
_BUDGET = ("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
           "learning_rate", "lr_scheduler_type", "max_completion_length")  # fmt: skip


@dataclass(frozen=True)
class RunResult:
    """One run, measured.

    Args:
        folder: where it lies.
        arm: the control's name, or METHOD.
        seed: of training.
        card: its run card.
        results: what was measured of its test split, by time.
        drift: nats per token that the student moved on neutral prompts; None where that was not measured.
    """

    folder: str
    arm: str
    seed: int
    card: Mapping[str, Any]
    results: Mapping[str, EvaluationResult]
    drift: float | None = None

    @property
    def after(self) -> EvaluationResult:
        """What the trained student answered."""
        return self.results[AFTER]


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seeds only, and what they come to.

    Args:
        name: the control's name, METHOD, or the folders' where there are several methods.
        runs: in the order of their seeds.
        after: the metric after training, mean over seeds, with its interval over questions.
        gain: after minus before, likewise; None where nothing was measured before.
        spread: of the metric after training over seeds.
        drift: nats per token, mean over seeds; None where it was not measured in all of them.
    """

    name: str
    runs: Sequence[RunResult]
    after: Estimate
    gain: PairedDifference | None
    spread: SeedSpread
    drift: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Arms side by side; the first is compared with every other.

    Args:
        metric: what is compared.
        grader: under which grader.
        arms: in the order given, the method first.
        versus: one per other arm.
        before: the student before training; None where nothing was measured.
        ceiling: the teacher with its context, if it was measured.
        warnings: what makes the comparison less fair than it looks.
    """

    metric: str
    grader: str
    arms: Sequence[Arm]
    versus: Sequence[Pairwise]
    before: Estimate | None
    ceiling: Estimate | None
    warnings: Sequence[str] = field(default_factory=list)

    @property
    def kind(self) -> Metric:
        """What the metric means."""
        return meaning_of(self.metric)

    @property
    def words(self) -> str:
        """Whether the method beat the others, in a sentence."""
        if not self.versus:
            return "one arm: there is nothing to compare it with. Train a control: opsd train … --control wrong-context"
        if not self.arms[0].runs[0].card:
            return "these are models as they are: what another training run would give is not in the comparison"
        if not self.kind.more_is_better:
            return f"more {self.metric} is neither better nor worse by itself"
        beaten = [each.other for each in self.versus if beats(each)]
        rest = [each.other for each in self.versus if not beats(each)]
        first = self.arms[0].name
        if not rest:
            all_of = "its control" if len(beaten) == 1 else f"all of its {len(beaten)} controls"
            return f"{first} beat {all_of} ({', '.join(beaten)})"
        said = f"{first} beat {len(beaten)} of {len(self.versus)}"
        return f"{said}; it did not beat {', '.join(rest)}: what these reproduce is not its merit"


def read_runs(folders: Sequence[str]) -> list[RunResult]:
    """Return the runs in output folders; a file that `opsd eval --output` wrote stands for a run of its name.

    Raises:
        CheckpointError: a folder holds no run, or one that was not measured to its end.
    """
    found: list[RunResult] = []
    for folder in folders:
        if Path(folder).is_file():
            found.append(_of_a_file(Path(folder), {run.arm for run in found}))
            continue
        results = results_of(Path(folder) / FOLDER)
        if AFTER not in results:
            raise CheckpointError(
                f"{folder} was not measured after training: it has no {FOLDER}/{AFTER}.json. Train it with an "
                "`evaluation:` in its YAML; or compare files: `opsd eval RUN … --output RUN.json` of each."
            )
        card = read_card(folder)
        arm, seed = card["settings"].get("control") or METHOD, card["settings"].get("seed", 0)
        drift = read_summary(Path(folder) / FOLDER).get("drift")
        found.append(RunResult(folder, arm, seed, card, results, drift and drift["per_token"]["value"]))
    return found


def _of_a_file(path: Path, taken: set[str]) -> RunResult:
    arm = path.stem if path.stem not in taken else str(path.with_suffix(""))
    return RunResult(str(path), arm, 0, {}, {AFTER: EvaluationResult.load(path)})


def compare(runs: Sequence[RunResult], metric: str = "accuracy") -> Comparison:
    """Return a comparison of the runs' arms; the method's, or else the first, against all others.

    Raises:
        ConfigError: no runs, no such metric, or fewer samples than it needs.
        DataError: runs on different questions, or under different graders.
    """
    if not runs:
        raise ConfigError("there are no runs to compare. Name their output folders.")
    reference = runs[0].after
    _check_shown(runs)
    values = {run.folder: run.after.in_order_of(reference).graded_values(metric) for run in runs}
    arms = [_arm(name, each, metric, values, reference) for name, each in _grouped(runs).items()]
    versus = [_versus(arms[0], other, values) for other in arms[1:]]
    p_values = adjusted([each.p_value for each in versus]) if versus else []
    say = Verdict(arms[0].name, meaning_of(metric), trained=bool(runs[0].card))
    versus = [say.with_verdict(replace(each, p_value=p)) for each, p in zip(versus, p_values, strict=True)]
    ceiling = next((run.results[TEACHER] for run in runs if TEACHER in run.results), None)
    before = next((run.results[BEFORE] for run in runs if BEFORE in run.results), None)
    return Comparison(
        metric,
        reference.grader,
        arms,
        versus,
        None if before is None else before.estimate(metric),
        None if ceiling is None else ceiling.estimate(metric),
        [*_unequal_budgets(arms), *_unequal_seeds(arms), *_ungraded(runs)],
    )


def _check_shown(runs: Sequence[RunResult]) -> None:
    shown = {run.after.shown: run.folder for run in runs}
    if len(shown) > 1:
        said = "; ".join(f"{folder}: {what}" for what, folder in shown.items())
        raise DataError(
            f"models can be compared only if they were shown the same beside the question ({said}). A model that sees "
            "the answer has another task. Evaluate all without --context, or all with it."
        )


def _grouped(runs: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    """Return runs by arm, the method's first, each in the order of its seeds."""
    groups: list[list[RunResult]] = []
    for run in runs:
        same = next((group for group in groups if _is_same_arm(group[0], run)), None)
        if same is None:
            groups.append([run])
        elif any(run.seed == other.seed for other in same):
            raise DataError(
                f"{run.folder} has the seed {run.seed} of another run of its arm: nothing would be learned of chance "
                "from two runs of one seed. Name one of them."
            )
        else:
            same.append(run)
    groups.sort(key=lambda group: group[0].arm != METHOD)
    arms = [group[0].arm for group in groups]
    named = {}
    for group in groups:
        unique = arms.count(group[0].arm) == 1
        name = group[0].arm if unique else re.sub(r"[-_.]?(seed)?\d+$", "", Path(group[0].folder).name)
        while name in named:
            name += "'"
        named[name] = sorted(group, key=lambda run: run.seed)
    return named


def _is_same_arm(one: RunResult, other: RunResult) -> bool:
    if one.arm != other.arm:
        return False
    return bool(one.card) and all(name.startswith(_SAME_ARM) for name, _, _ in differences(one.card, other.card))


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


def _versus(first: Arm, other: Arm, values: Mapping[str, np.ndarray]) -> Pairwise:
    by_seed = [{run.seed: values[run.folder] for run in arm.runs} for arm in (first, other)]
    both = sorted(by_seed[0].keys() & by_seed[1].keys())
    if both:
        sides = [np.mean([each[seed] for seed in both], axis=0) for each in by_seed]
        spread = over_seeds([float(np.nanmean(by_seed[0][seed] - by_seed[1][seed])) for seed in both])
    else:
        sides = [np.mean(list(each.values()), axis=0) for each in by_seed]
        spread = over_seeds([float(np.nanmean(sides[0] - sides[1]))])
    found = paired_difference(sides[1], sides[0])
    return Pairwise(other.name, found, found.p_value, spread, "")


def _unequal_budgets(arms: Sequence[Arm]) -> list[str]:
    first = arms[0].runs[0].card.get("settings")
    if not first:  # a file says nothing of training
        return []
    return [
        f"not the same budget: {name} is {first.get(name)} in {arms[0].name} and {its.get(name)} in {arm.name}"
        for arm in arms[1:]
        for name in _BUDGET
        if (its := arm.runs[0].card.get("settings")) and its.get(name) != first.get(name)
    ]


def _unequal_seeds(arms: Sequence[Arm]) -> list[str]:
    first = {run.seed: run for run in arms[0].runs if run.card}
    found = []
    for arm in arms[1:]:
        own = {run.seed: run for run in arm.runs if run.card}
        alone = sorted(own.keys() - first.keys()) if first else []
        if alone and own.keys() & first.keys():
            found.append(f"{arm.name} has seed {alone[0]}, and {arms[0].name} has not: it is in no difference")
        elif alone:
            found.append(
                f"{arm.name} and {arms[0].name} have no seed in common: their difference is of other seeds too"
            )
        for seed in sorted(own.keys() & first.keys()):
            if len({run.card["hashes"].get("questions") for run in (own[seed], first[seed])}) > 1:
                found.append(f"seed {seed}: {arm.name} and {arms[0].name} were not trained on the same questions")
    return found + [
        f"{arm.name}: seed {run.seed} was trained on {run.card['rows']} rows, and seed {arm.runs[0].seed} on "
        f"{arm.runs[0].card['rows']}"
        for arm in arms
        for run in arm.runs
        if run.card.get("rows") != arm.runs[0].card.get("rows")
    ]


def _ungraded(runs: Sequence[RunResult]) -> list[str]:
    return [
        f"{run.folder}: {len(run.after.ungraded)} of {run.after.n} questions have answers that the grader failed on; "
        "they are left out"
        for run in runs
        if run.after.ungraded
    ]


def as_json(found: Comparison) -> dict[str, Any]:
    """Return a comparison in plain values."""

    def plain(value: Any) -> Any:
        if isinstance(value, RunResult):
            return {"folder": value.folder, "seed": value.seed, "after": value.after.estimate(found.metric).__dict__}
        if isinstance(value, list | tuple):
            return [plain(each) for each in value]
        return {k: plain(v) for k, v in vars(value).items()} if is_dataclass(value) else value

    return {"words": found.words, **plain(found)}
