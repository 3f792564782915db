"""What the results of a run come to: gains with intervals, the share of the gap that was closed, and words for it.

The results of a run lie in `evaluation/` of its output folder, a file each, and `evaluation.json` beside them says what
they come to. Knows files and results; nothing of models or training.
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
    PLAIN_TEACHER: "teacher without its context",
    TEACHER: "teacher with its context",
    LAST: "student at the last step",
    AFTER: "student after",
}
SURE = 0.05  # level of the tests
# By how much a student may stay behind its teacher and still have reached it.
MARGIN = 0.03


def metrics_with_intervals(result: EvaluationResult) -> dict[str, Any]:
    """Return a result's usual metrics with their intervals, in plain values."""
    return {
        "n": result.n,
        "grader": result.grader,
        "shown": result.shown,
        "ungraded": len(result.ungraded),
        **{name: asdict(result.estimate(name)) for name in result.usual_metrics},
    }


def difference(before: EvaluationResult, after: EvaluationResult, metric: str = "accuracy") -> PairedDifference:
    """Return by how much a metric changed between two results on the same questions, those graded in both."""
    return paired_difference(before.graded_values(metric), after.in_order_of(before).graded_values(metric))


def gap(before: EvaluationResult, after: EvaluationResult, teacher: EvaluationResult) -> dict[str, Any]:
    """Return how much of the way from the student to its teacher was gone, and how much is left, in plain values."""
    behind, lead = difference(after, teacher), difference(before, teacher)
    closed = gap_closed(before.values("accuracy"), after.values("accuracy"), teacher.values("accuracy"))
    return {
        "closed": None if closed is None else asdict(closed),
        "left": asdict(behind),
        "words": reached(behind) if lead.low > 0 else "the teacher was not surely ahead: there was no gap to speak of",
    }


def reached(behind: PairedDifference) -> str:
    """Say whether the student has reached its teacher, from the teacher's lead over it."""
    if behind.high <= MARGIN:
        return "the student has reached its teacher: a stronger teacher or reinforcement learning comes next"
    if behind.low > 0:
        return f"the teacher is still ahead by {_points(behind)}: there is more to learn from it"
    return (
        f"the teacher's lead is {_points(behind)}: {behind.n} questions cannot tell whether the student has reached it"
    )


def gain_words(found: PairedDifference) -> str:
    """Say what the student's gain comes to, and how many questions would settle it."""
    if found.p_value < SURE and found.low > 0:
        return f"the student got better by {_points(found)}"
    if found.p_value < SURE and found.high < 0:
        return f"the student got worse by {_points(found)}"
    needed = None if found.deviation is None else questions_needed(found.difference, found.deviation)
    more = f"; {needed:,} questions would settle a difference of this size" if needed and needed > found.n else ""
    return f"no difference that {found.n} questions can tell from chance: {_points(found)}{more}"


def kept_words(name: str, found: PairedDifference) -> str:
    """Say whether something that must not get worse did."""
    if found.p_value < SURE and found.high < 0:
        return f"{name} got WORSE by {_points(found)}"
    possible = f"; a loss of up to {-100 * found.low:.1f} is possible" if found.low < -MARGIN else ""
    return f"{name}: {_points(found)}{possible}"


def _points(found: PairedDifference) -> str:
    return f"{100 * found.difference:+.1f} points ({100 * found.low:+.1f} to {100 * found.high:+.1f})"


def as_words(found: Estimate, is_share: bool = True) -> tuple[str, str]:
    """Return an estimate as a table shows it: its value, and its interval where there is one."""
    form = ".1%" if is_share else ".1f"
    ends = "" if found.low is None else f"{found.low:{form}} to {found.high:{form}}"
    return f"{found.value:{form}}", ends


def _share(value: Mapping[str, Any]) -> str:
    number, ends = as_words(Estimate(**value))
    return f"{number} ({ends})" if ends else number


def file_of(split: str, when: str) -> str:
    """Return the name of a result's file in FOLDER; the test split's have no more than their time in it."""
    name = re.sub(r"[^\w-]+", "_", split)
    return f"{when}.json" if split == "test" else f"{name}.{when}.json"


def results_of(folder: Path, split: str = "test") -> dict[str, EvaluationResult]:
    """Return what was measured of a split, by time, in the order of NAMES."""
    paths = {when: folder / file_of(split, when) for when in NAMES}
    return {when: EvaluationResult.load(path) for when, path in paths.items() if path.is_file()}


def read_summary(folder: Path) -> dict[str, Any]:
    """Return what `evaluation.json` says, nothing if there is none."""
    path = folder / SUMMARY
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def summarise(folder: Path, retention: Sequence[str]) -> dict[str, Any]:
    """Return figures, gain, gap and what was kept, in plain values, of the results in a folder.

    Args:
        folder: the evaluation folder of a run.
        retention: names of what must not get worse.
    """
    known = results_of(folder)
    before, after, teacher = known.get(BEFORE), known.get(AFTER), known.get(TEACHER)
    summary: dict[str, Any] = {"figures": {when: metrics_with_intervals(each) for when, each in known.items()}}
    if before is not None and after is not None:
        found = difference(before, after)
        summary["gain"] = asdict(found) | {"words": gain_words(found)}
        if teacher is not None:
            summary["gap"] = gap(before, after, teacher)
    summary["retention"] = {name: kept for name in retention if (kept := _kept(folder, name))}
    return summary


def _kept(folder: Path, name: str) -> dict[str, Any] | None:
    known = results_of(folder, f"retention {name}")
    if not {BEFORE, AFTER} <= set(known):
        return None
    found = difference(known[BEFORE], known[AFTER])
    figs = {when: metrics_with_intervals(known[when]) for when in (BEFORE, AFTER)}
    return {**figs, "difference": asdict(found), "words": kept_words(name, found)}


def lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield a summary as lines to read."""
    for when, name in NAMES.items():
        found = summary.get("figures", {}).get(when)
        if found is not None:
            yield f"{name:<28} {_share(found['accuracy'])}, n {found['n']}, grader {found['grader']}, greedy"
            sampled = [f"{metric} {_share(value)}" for metric, value in found.items() if "@" in metric]
            if sampled:
                yield f"{'':<28} {', '.join(sampled)}"
            if found["ungraded"]:
                yield f"{'':<28} the grader failed on {found['ungraded']} of {found['n']}, which count as wrong"
    if "gain" in summary:
        yield f"gain                         {summary['gain']['words']}"
    if "gap" in summary:
        closed = summary["gap"]["closed"]
        yield f"gap closed                   {_share(closed) if closed else 'there is no gap to close'}"
        yield f"                             {summary['gap']['words']}"
    if summary.get("traces"):
        found = summary["traces"]
        was = f"{found['before']['student']:.2f} before, " if found.get("before") else ""
        behind = found["behind"]
        cut = f", {found['shortened']} cut at the longest answer" if found["shortened"] else ""
        yield (
            f"likelihood                   NLL of {found['column']!r} in nats per token: student {was}"
            f"{found['student']:.2f} now, teacher {found['teacher']:.2f}; behind by {behind['difference']:+.2f} "
            f"({behind['low']:+.2f} to {behind['high']:+.2f}), {found['n']} rows{cut}"
        )
    for kept in summary.get("retention", {}).values():
        yield f"retention                    {kept['words']}"
    if summary.get("drift"):
        found = summary["drift"]["per_token"]
        ends = "" if found["low"] is None else f" ({found['low']:.3f} to {found['high']:.3f})"
        yield (
            f"drift                        KL(before ‖ now) {found['value']:.3f} nats per token{ends}, "
            f"{found['n']} neutral prompts"
        )
    yield f"checkpoint                   {summary.get('chosen', 'not chosen yet')}"
