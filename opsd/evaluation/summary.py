"""Summarises a run: gain, share of the teacher gap closed, retention, each with an interval and a verdict.

The results of a run are files of `evaluation/` in its output folder, and the summary is `evaluation.json` beside them.
Knows files and results; nothing of models or training.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opsd.evaluation.power import questions_needed
from opsd.evaluation.result import EvaluationResult
from opsd.evaluation.statistics import Estimate, PairedDifference, gap_closed, paired_difference

FOLDER, SUMMARY = "evaluation", "evaluation.json"
BEFORE, AFTER, LAST = "before", "after", "last"
TEACHER, PLAIN_TEACHER = "teacher", "teacher_without_context"
NAMES = {
    BEFORE: "student before",
    PLAIN_TEACHER: "teacher without context",
    TEACHER: "teacher (ceiling)",
    LAST: "student at the last step",
    AFTER: "student after",
}
LEVEL = 0.05  # of the tests
# Share by which a student may be behind its teacher and still count as having reached it.
MARGIN = 0.03
WIDTH = max(map(len, NAMES.values()))  # of the first column of a printed summary


# ---- results and their files ------------------------------------------------------------------------------------


def file_of(split: str, when: str) -> str:
    """Return the name of a result's file in FOLDER; files of the test split carry no name of a split."""
    name = re.sub(r"[^\w-]+", "_", split)
    return f"{when}.json" if split == "test" else f"{name}.{when}.json"


def results_of(folder: Path, split: str = "test") -> dict[str, EvaluationResult]:
    """Return the results of a split by time, in the order of NAMES."""
    paths = {when: folder / file_of(split, when) for when in NAMES}
    return {when: EvaluationResult.load(path) for when, path in paths.items() if path.is_file()}


def read_summary(folder: Path) -> dict[str, Any]:
    """Return the summary in an evaluation folder, empty if there is none."""
    path = folder / SUMMARY
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def is_evaluated(folder: Path) -> bool:
    """Return whether an evaluation folder has all results of its run, of which the summary is the last."""
    return "chosen" in read_summary(folder)


# ---- summarising ------------------------------------------------------------------------------------------------


def summarise(folder: Path, retention: Sequence[str]) -> dict[str, Any]:
    """Return metrics, gain, gap and retention of the results in a folder, in plain values.

    Args:
        folder: the evaluation folder of a run.
        retention: names of the retention splits.
    """
    known = results_of(folder)
    before, after, teacher = known.get(BEFORE), known.get(AFTER), known.get(TEACHER)
    summary: dict[str, Any] = {"metrics": {when: metrics_with_intervals(each) for when, each in known.items()}}
    if before is not None and after is not None:
        gain = difference(before, after)
        summary["gain"] = asdict(gain) | {"verdict": gain_verdict(gain)}
        if teacher is not None:
            summary["gap"] = gap(before, after, teacher)
    summary["retention"] = {name: values for name in retention if (values := _retention(folder, name))}
    return summary


def metrics_with_intervals(result: EvaluationResult) -> dict[str, Any]:
    """Return a result's usual metrics with their intervals, in plain values."""
    return {
        "n": result.n,
        "grader": result.grader,
        "context": result.context,
        "ungraded": len(result.ungraded),
        **{name: asdict(result.estimate(name)) for name in result.usual_metrics},
    }


def difference(before: EvaluationResult, after: EvaluationResult, metric: str = "accuracy") -> PairedDifference:
    """Return the change of a metric between two results on the same questions, those graded in both."""
    return paired_difference(before.graded_values(metric), after.in_order_of(before).graded_values(metric))


def gap(before: EvaluationResult, after: EvaluationResult, teacher: EvaluationResult) -> dict[str, Any]:
    """Return the share of the gap between student and teacher that training closed, and what is left of it."""
    left, lead = difference(after, teacher), difference(before, teacher)
    closed = gap_closed(before.values("accuracy"), after.values("accuracy"), teacher.values("accuracy"))
    return {
        "closed": None if closed is None else asdict(closed),
        "left": asdict(left),
        "verdict": gap_verdict(left) if lead.low > 0 else "the teacher was not clearly better: no gap to close",
    }


def _retention(folder: Path, name: str) -> dict[str, Any] | None:
    known = results_of(folder, f"retention {name}")
    if not {BEFORE, AFTER} <= set(known):
        return None
    change = difference(known[BEFORE], known[AFTER])
    metrics = {when: metrics_with_intervals(known[when]) for when in (BEFORE, AFTER)}
    return {**metrics, "difference": asdict(change), "verdict": retention_verdict(name, change)}


# ---- verdicts ---------------------------------------------------------------------------------------------------


def gain_verdict(gain: PairedDifference) -> str:
    """Return what a gain shows, and how many questions would settle it if it shows nothing."""
    if gain.p_value < LEVEL and gain.low > 0:
        return f"{_points(gain)}: the student improved"
    if gain.p_value < LEVEL and gain.high < 0:
        return f"{_points(gain)}: the student got WORSE"
    needed = None if gain.deviation is None else questions_needed(gain.difference, gain.deviation)
    more = f"; {needed:,} questions would settle a difference of this size" if needed and needed > gain.n else ""
    return f"{_points(gain)}: no significant difference on {gain.n} questions{more}"


def gap_verdict(left: PairedDifference) -> str:
    """Return whether the student has reached its teacher, from the teacher's lead over it."""
    if left.high <= MARGIN:
        return "the student has reached its teacher: continue with a stronger teacher or reinforcement learning"
    if left.low > 0:
        return f"the teacher is still ahead by {_points(left)}"
    return f"the teacher's lead is {_points(left)}: too few questions ({left.n}) to say whether the student reached it"


def retention_verdict(name: str, change: PairedDifference) -> str:
    """Return whether the accuracy of a retention split fell, and how large a loss is possible."""
    if change.p_value < LEVEL and change.high < 0:
        return f"{name} got WORSE by {_points(change)}"
    possible = f"; a loss of up to {-100 * change.low:.1f} is possible" if change.low < -MARGIN else ""
    return f"{name}: {_points(change)}{possible}"


# ---- printing ---------------------------------------------------------------------------------------------------


def lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield a summary as lines to print."""
    metrics = summary.get("metrics", {})
    if metrics:
        yield _line("", f"{'accuracy':<9} {'95 % interval':<17} right")
    for when, name in NAMES.items():
        if when in metrics:
            yield from _result_lines(name, metrics[when])
    if "gain" in summary:
        yield _line("gain", summary["gain"]["verdict"])
    if "gap" in summary:
        closed = summary["gap"]["closed"]
        yield _line("share of the gap closed", _share(closed) if closed else "there is no gap to close")
        yield _line("", summary["gap"]["verdict"])
    if summary.get("traces"):
        yield _line("likelihood", _likelihood(summary["traces"]))
    for split in summary.get("retention", {}).values():
        yield _line("retention", split["verdict"])
    if summary.get("drift"):
        drift = summary["drift"]["per_token"]
        ends = "" if drift["low"] is None else f" ({drift['low']:.3f} to {drift['high']:.3f})"
        kl = f"KL(before ‖ now) {drift['value']:.3f} nats per token{ends}"
        yield _line("drift", f"{kl}, {drift['n']} neutral prompts")
    yield _line("checkpoint", summary.get("chosen", "not chosen yet"))
    if metrics:
        yield _line("", f"greedy answers, grader {next(iter(metrics.values()))['grader']}")


def _line(name: str, text: str) -> str:
    return f"{name:<{WIDTH}}  {text}"


def _result_lines(name: str, metrics: Mapping[str, Any]) -> Iterator[str]:
    value, ends = as_text(Estimate(**metrics["accuracy"]))
    right = round(metrics["accuracy"]["value"] * metrics["n"])
    yield _line(name, f"{value:<9} {ends:<17} {right} of {metrics['n']}")
    sampled = [f"{metric} {_share(values)}" for metric, values in metrics.items() if "@" in metric]
    if sampled:
        yield _line("", ", ".join(sampled))
    if metrics["ungraded"]:
        yield _line("", f"the grader failed on {metrics['ungraded']} of {metrics['n']}, which count as wrong")


def _likelihood(traces: Mapping[str, Any]) -> str:
    before = f"{traces['before']['student']:.2f} before, " if traces.get("before") else ""
    behind = traces["behind"]
    cut = f", {traces['shortened']} cut at the longest answer" if traces["shortened"] else ""
    return (
        f"NLL of {traces['column']!r} in nats per token: student {before}{traces['student']:.2f} now, teacher "
        f"{traces['teacher']:.2f}; behind by {behind['difference']:+.2f} ({behind['low']:+.2f} to "
        f"{behind['high']:+.2f}), {traces['n']} rows{cut}"
    )


def as_text(estimate: Estimate, is_share: bool = True) -> tuple[str, str]:
    """Return an estimate as a table shows it: its value, and its interval or an empty text."""
    form = ".1%" if is_share else ".1f"
    ends = "" if estimate.low is None else f"{estimate.low:{form}} to {estimate.high:{form}}"
    return f"{estimate.value:{form}}", ends


def _share(values: Mapping[str, Any]) -> str:
    value, ends = as_text(Estimate(**values))
    return f"{value} ({ends})" if ends else value


def _points(change: PairedDifference) -> str:
    return f"{100 * change.difference:+.1f} points ({100 * change.low:+.1f} to {100 * change.high:+.1f})"
