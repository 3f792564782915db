"""Puts what runs gained on their task beside what they kept elsewhere: points, the Pareto front, the best values.

A point is an arm at one value of what is swept, with all its seeds. The best value of an arm is chosen on the selection
split, never on the test split; arms are then compared at those. Knows runs and their results; nothing of files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

import numpy as np

from opsd.evaluation.compare import Arm, Comparison, RunResult, arms_of, compare, is_same_arm, pair_of
from opsd.evaluation.sample_metrics import METRICS
from opsd.evaluation.statistics import (
    Estimate,
    PairedDifference,
    SeedSpread,
    adjusted,
    estimate,
    over_seeds,
    paired_difference,
)
from opsd.evaluation.summary import AFTER, BEFORE
from opsd.evaluation.sweep_folder import SHORT, as_label
from opsd.evaluation.verdict import Pairwise, with_verdict

RATE = "learning_rate"
ALL_SPLITS = "all splits"  # the mean over retention splits, each of which counts the same


@dataclass(frozen=True)
class Kept:
    """Accuracy on other tasks after training, mean over seeds.

    Args:
        after: with its interval over questions.
        change: after minus before, paired by question; None where nothing was measured before.
        spread: of the accuracy after training, over seeds.

    Example:
        >>> Kept(estimate([True] * 7 + [False] * 3), None, over_seeds([0.7])).after.value
        0.7
    """

    after: Estimate
    change: PairedDifference | None
    spread: SeedSpread


@dataclass(frozen=True)
class Point:
    """An arm at one value of what is swept.

    Args:
        name: of the arm, and its values where the arm has several.
        arm: name of the arm.
        values: what is swept beside the seed; for runs that no sweep made, the learning rate.
        task: the runs, the metric after training, the gain, the spread over seeds, the drift.
        retention: by the name of the split; ALL_SPLITS is their mean.
        selection: accuracy on the selection split, mean over the seeds that all points of the arm have; None without.
        length: tokens per answer on the test split.
        seconds: of training, wall clock, mean over runs; None where a run card has none.
        cpu_seconds: of training, processor time, likewise.
        rollouts: of a run, likewise.
        on_front: no other point is better on the task and keeps as much, or keeps more and is as good.
        is_best: its arm has its best accuracy on the selection split here, or no other value.

    Example:
        >>> [point.name for point in tradeoff_of(read_runs(["runs/sweep"])).points if point.on_front]  # doctest: +SKIP
        ['method, lr 1e-5', 'sft, lr 1e-5']
    """

    name: str
    arm: str
    values: Mapping[str, Any]
    task: Arm
    retention: Mapping[str, Kept] = field(default_factory=dict)
    selection: float | None = None
    length: float = 0.0
    seconds: float | None = None
    cpu_seconds: float | None = None
    rollouts: float | None = None
    on_front: bool = False
    is_best: bool = False

    @property
    def kept(self) -> Kept | None:
        """Mean accuracy over the retention splits; None without any."""
        return self.retention.get(ALL_SPLITS)


@dataclass(frozen=True)
class Tradeoff:
    """Points of runs, and their arms compared at each arm's best value.

    Args:
        metric: of the task.
        points: in the order of the arms, the method first.
        comparison: of the arms at their best values; of all points where no value could be chosen.
        retention: the first arm minus each other one on other tasks, by split, at the same values.
        remarks: why no value was chosen.

    Example:
        >>> tradeoff_of(read_runs(["runs/sweep"])).retention["general"][0].verdict  # doctest: +SKIP
        'method beat sft: +9.3 (+4.1 to +14.6 over 100 questions; …'
    """

    metric: str
    points: Sequence[Point]
    comparison: Comparison
    retention: Mapping[str, Sequence[Pairwise]]
    remarks: Sequence[str] = ()


def tradeoff_of(runs: Sequence[RunResult], metric: str = "accuracy") -> Tradeoff:
    """Return the points of runs, and the comparison of their arms at the best values.

    Args:
        runs: `read_runs` of a sweep's folder, or of folders of runs.
        metric: of the task; retention is always the accuracy.

    Raises:
        OPSDError: as `compare`.
    """
    if not runs:
        compare(runs)  # refuses it
    splits = _common_splits(runs)
    points = [_point(arm, splits, runs[0]) for arm in arms_of(runs, metric)]
    points = _named(points)
    is_front, chosen = front(points), _best(points)
    remarks = [f"no best value of {arm} was chosen: {why}" for arm, why in chosen.items() if isinstance(why, str)]
    is_chosen = [not remarks and chosen[point.arm] is point for point in points]
    points = [
        replace(point, on_front=on_front, is_best=is_best)
        for point, on_front, is_best in zip(points, is_front, is_chosen, strict=True)
    ]
    compared = [run for point in points if point.is_best or remarks for run in point.task.runs]
    return Tradeoff(metric, points, compare(compared, metric), _retention_pairs(compared, splits), remarks)


# ---- points ---------------------------------------------------------------------------------------------------------


def _common_splits(runs: Sequence[RunResult]) -> list[str]:
    """Return the retention splits that all runs have after training."""
    return [name for name in runs[0].retention if all(AFTER in run.retention.get(name, {}) for run in runs)]


def _point(arm: Arm, splits: Sequence[str], reference: RunResult) -> Point:
    first, names = arm.runs[0], [*splits, *([ALL_SPLITS] if splits else [])]
    rate = first.card.get("settings", {}).get(RATE)
    values = first.values if first.values is not None else {RATE: rate} if rate is not None else {}
    outcomes = [run.card.get("outcome", {}) for run in arm.runs]

    def mean(name: str) -> float | None:
        known = [each[name] for each in outcomes if name in each]
        return float(np.mean(known)) if len(known) == len(outcomes) else None

    return Point(
        name=arm.name,
        arm=first.arm,
        values=values,
        task=arm,
        retention={name: _kept(arm, [name] if name in splits else splits, reference) for name in names},
        length=float(np.mean([run.after.values("length").mean() for run in arm.runs])),
        seconds=mean("seconds"),
        cpu_seconds=mean("cpu_seconds"),
        rollouts=mean("rollouts"),
    )


def _kept(arm: Arm, splits: Sequence[str], reference: RunResult) -> Kept:
    after = [_retained(run, splits, AFTER, reference) for run in arm.runs]
    has_before = all(BEFORE in run.retention[name] for run in arm.runs for name in splits)
    before = [_retained(run, splits, BEFORE, reference) for run in arm.runs] if has_before else []
    mean = np.mean(after, axis=0)
    return Kept(
        # Of several splits the values are weighted: 1 is no right answer there.
        estimate(mean, is_share=len(splits) == 1),
        paired_difference(np.mean(before, axis=0), mean) if before else None,
        over_seeds([float(np.nanmean(each)) for each in after]),
    )


def _retained(run: RunResult, splits: Sequence[str], when: str, reference: RunResult) -> np.ndarray:
    """Return the accuracy per question of splits, weighted so that its mean is the mean over splits."""
    results = [run.retention[name][when].in_order_of(reference.retention[name][AFTER]) for name in splits]
    total = sum(result.n for result in results)
    return np.concatenate([r.graded_values("accuracy") * total / (len(splits) * r.n) for r in results])


def _named(points: Sequence[Point]) -> list[Point]:
    """Return points whose arms are known by name: those that differ in swept values are one arm."""
    groups: list[list[Point]] = []
    for point in points:
        group = next((g for g in groups if _differ_in_rate(g[0], point)), None)
        groups.append([point]) if group is None else group.append(point)
    arms = [group[0].arm for group in groups]
    named = []
    for group in groups:
        arm = group[0].arm if arms.count(group[0].arm) == 1 else group[0].name
        for point in group:
            named.append(replace(point, arm=arm, selection=_selection(point, group)))
    return [replace(p, name=_name(p, named)) for p in named]


def _differ_in_rate(point: Point, other: Point) -> bool:
    return is_same_arm(point.task.runs[0], other.task.runs[0], apart_from=(f"settings.{RATE}",))


def _name(point: Point, points: Sequence[Point]) -> str:
    others = [other.values for other in points if other.arm == point.arm]
    differing = [name for name, value in point.values.items() if any(each.get(name) != value for each in others)]
    return ", ".join([point.arm, *(f"{SHORT.get(name, name)} {as_label(point.values[name])}" for name in differing)])


def _selection(point: Point, group: Sequence[Point]) -> float | None:
    """Return the mean over the seeds of all points: a value that more seeds were trained at has no advantage."""
    seeds = set.intersection(*({run.seed for run in each.task.runs} for each in group))
    known = [run.selection for run in point.task.runs if run.seed in seeds]
    return float(np.mean([each for each in known if each is not None])) if known and None not in known else None


def front(points: Sequence[Point]) -> list[bool]:
    """Return for each point whether no other is at least as good on the task and on what is kept, and better on one."""
    places = [None if p.kept is None else (p.task.after.value, p.kept.after.value) for p in points]
    return [
        place is not None
        and not any(
            other is not None and other != place and other[0] >= place[0] and other[1] >= place[1] for other in places
        )
        for place in places
    ]


def _best(points: Sequence[Point]) -> dict[str, Point | str]:
    """Return the point of each arm with the best selection accuracy, the first of equal ones; or why there is none."""
    best: dict[str, Point | str] = {}
    for arm in dict.fromkeys(point.arm for point in points):
        group = [point for point in points if point.arm == arm]
        if len(group) == 1:
            best[arm] = group[0]
        elif any(point.selection is None for point in group):
            best[arm] = "its runs have no selection split, or no seed in common (`evaluation: {selection: …}`)"
        else:
            best[arm] = max(group, key=lambda point: point.selection or 0.0)
    return best


# ---- retention, arm against arm -------------------------------------------------------------------------------------


def _retention_pairs(runs: Sequence[RunResult], splits: Sequence[str]) -> dict[str, list[Pairwise]]:
    """Return the first arm minus every other one per split, paired by question and seed, adjusted per split (Holm)."""
    arms, pairs = arms_of(runs), dict[str, list[Pairwise]]()
    for name in [*splits, *([ALL_SPLITS] if len(splits) > 1 else [])] if len(arms) > 1 else []:
        of_split = splits if name == ALL_SPLITS else [name]
        values = {run.folder: _retained(run, of_split, AFTER, runs[0]) for run in runs}
        raw = [pair_of(arms[0], other, values) for other in arms[1:]]
        p_values = adjusted([pair.p_value for pair in raw])
        trained = bool(runs[0].card)
        pairs[name] = [
            with_verdict(replace(pair, p_value=p), arms[0].name, METRICS["accuracy"], trained=trained)
            for pair, p in zip(raw, p_values, strict=True)
        ]
    return pairs


def as_plain(tradeoff: Tradeoff) -> dict[str, Any]:
    """Return points and retention in plain values; `opsd.evaluation.compare.as_json` has the comparison."""

    def plain(value: Any) -> Any:
        if isinstance(value, Arm):
            runs = [{"folder": run.folder, "seed": run.seed, "accuracy": run.after.accuracy} for run in value.runs]
            return {**{k: plain(v) for k, v in vars(value).items()}, "runs": runs}
        if isinstance(value, Mapping):
            return {name: plain(each) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return [plain(each) for each in value]
        return {k: plain(v) for k, v in vars(value).items()} if is_dataclass(value) else value

    return {name: plain(getattr(tradeoff, name)) for name in ("points", "retention", "remarks")}
