"""The three sentences on top of a report: did it get better, did it beat its controls, is it healthy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from opsd.evaluation.compare import Comparison
from opsd.evaluation.summary import AFTER, BEFORE, LEVEL
from opsd.evaluation.verdict import beats, loses
from opsd.health.monitor import LEVELS
from opsd.health.monitors import MONITORS
from opsd.report.run import ReportedRun

Tone = Literal["good", "open", "bad"]
FEW = 4  # monitors: fewer prove nothing


@dataclass(frozen=True)
class Sentence:
    """One of the three.

    >>> better(run).text
    'Yes: right answers went from 22.5 % to 50.0 % of 200 held-out questions, +27.5 points (+20.3 to +34.6).'

    Args:
        asks: the question.
        text: the answer.
        tone: good, open (nobody knows), or bad.
    """

    asks: str
    text: str
    tone: Tone


def better(run: ReportedRun) -> Sentence:
    """Return whether the student improved, by how much and how sure that is."""
    asks = "Did it get better?"
    gain = run.summary.get("gain")
    if not gain:
        looks = list(run.summary.get("selection") or ())
        if len(looks) > 1:
            (first, start), (last, end) = ((look["accuracy"]["value"], look["step"]) for look in (looks[0], looks[-1]))
            text = (
                f"Not known yet: {first:.1%} of the selection split were right at step {start}, {last:.1%} at step "
                f"{end}. The test split is asked at the end."
            )
            return Sentence(asks, text, "open")
        why = "its evaluation is damaged or broke off" if run.has_evaluation else "nothing was evaluated after training"
        return Sentence(asks, f"Nobody knows: {why}.", "open")
    before, after = (run.summary["metrics"][when]["accuracy"]["value"] for when in (BEFORE, AFTER))
    change = f"{100 * gain['difference']:+.1f} points ({100 * gain['low']:+.1f} to {100 * gain['high']:+.1f})"
    tone = tone_of(gain)
    word = {"good": "Yes", "bad": "No, it got worse", "open": "Not shown"}[tone]
    text = f"{word}: right answers went from {before:.1%} to {after:.1%} of {gain['n']} held-out questions, {change}."
    lost = [name for name, split in run.summary.get("retention", {}).items() if tone_of(split["difference"]) == "bad"]
    if lost:
        text += f" But it lost on {', '.join(lost)}."
    return Sentence(asks, text, "open" if lost and tone == "good" else tone)


def beats_controls(comparison: Comparison | None, folder: str = "", why_not: str = "") -> Sentence:
    """Return whether the method beat the controls that it was compared with.

    Args:
        comparison: of the runs.
        folder: of the run that the page is about; of a control the page says that it is one.
        why_not: why it was not compared, where controls were given.
    """
    asks = "Did it beat its controls?"
    if comparison is not None and not comparison.pairwise:
        return Sentence(asks, f"Nobody knows: {comparison.verdict}.", "open")
    if comparison is None:
        why = why_not or (
            "no control was given. Train one, such as by opsd train run.yaml --control sft, and write the report with "
            "--against and its folder."
        )
        return Sentence(asks, f"Nobody knows: {why}", "open")
    own = next((arm.name for arm in comparison.arms if folder in [run.folder for run in arm.runs]), "")
    if own and own != comparison.arms[0].name:
        return Sentence(asks, f"This run is one: {own}. {_capitalised(comparison.verdict)}.", "open")
    pairs = comparison.pairwise
    tone: Tone = "good" if all(map(beats, pairs)) else "bad" if any(map(loses, pairs)) else "open"
    return Sentence(asks, f"{_capitalised(comparison.verdict)}.", tone)


def healthy(run: ReportedRun) -> Sentence:
    """Return what the monitors of health say at the end."""
    asks = "Is it healthy?"
    watch = run.watch
    if not watch.verdicts:
        return Sentence(asks, "Nobody knows: the log has nothing that a monitor reads.", "open")
    worst, recorded = LEVELS[watch.level], _recorded(run, watch.level)
    spoken = [(name, verdict) for name, verdict in watch.verdicts.items() if verdict.level == worst]
    acted = sorted({change.monitor for change in watch.history if change.verdict.level == "act"})
    if worst == "fine":
        before = f" ({', '.join(acted)} said act, and is fine again)" if acted else ""
        count = len(watch.verdicts)
        if count < FEW:
            text = f"Not shown: only {count} of {len(MONITORS)} monitors could look; what they saw is fine{before}."
            return Sentence(asks, f"{text}{recorded}", "open")
        text = f"Yes: {count} monitors could look, and all are content{before}.{recorded}"
        return Sentence(asks, text, "open" if recorded else "good")
    others = len(watch.verdicts) - sum(verdict.level != "fine" for verdict in watch.verdicts.values())
    content = f"{others} other monitors are content.{recorded}"
    if worst == "watch":
        return Sentence(asks, f"Mostly: {', '.join(name for name, _ in spoken)} to watch; {content}", "open")
    saw = "; ".join(f"{name}: {verdict.saw}" for name, verdict in spoken)
    return Sentence(asks, f"No: {saw}. {content}", "bad")


def _recorded(run: ReportedRun, level: int) -> str:
    """Return what the run's own monitors said at its end, where today's say something else."""
    now = run.card.get("outcome", {}).get("health", {}).get("now", {})
    of_run = max((LEVELS.index(each["level"]) for each in now.values()), default=level)
    if of_run == level:
        return ""
    names = ", ".join(name for name, each in now.items() if each["level"] == LEVELS[of_run])
    return f" When it ended, its own monitors said {LEVELS[of_run]} ({names}): their thresholds were others."


def tone_of(change: Mapping[str, Any]) -> Tone:
    """Return whether a change is for the better, for the worse, or chance; as `gain_verdict` does."""
    if change["p_value"] >= LEVEL:
        return "open"
    return "good" if change["low"] > 0 else "bad" if change["high"] < 0 else "open"


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]
