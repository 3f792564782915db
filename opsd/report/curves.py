"""The charts of a run: loss, entropy, length, accuracy, position and class of tokens, health, time and memory.

Knows logged metrics by name; draws nothing itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opsd.evaluation.summary import TEACHER as CEILING
from opsd.health.bound import ROLLOUTS, TEACHER, WHOLE, bound_of_step
from opsd.health.monitor import LEVELS
from opsd.health.tokens import CLASSES
from opsd.report import charts
from opsd.report.charts import Series
from opsd.report.run import ReportedRun

QUARTERS = ("first", "second", "third", "last")


@dataclass(frozen=True)
class Chart:
    """A chart of a page.

    >>> [chart.title for chart in charts_of(run)]
    ['reverse KL', 'entropy', …]

    Args:
        title: what it shows.
        says: one sentence on how to read it; also what a screen reader says.
        svg: the drawing.
    """

    title: str
    says: str
    svg: str


def charts_of(run: ReportedRun) -> list[Chart]:
    """Return the charts that a run has numbers for."""
    return list(_charts(run))


def _charts(run: ReportedRun) -> Iterator[Chart]:
    log, steps = run.logs, (0.0, float(max(run.steps, 1)))

    def series(names: Mapping[str, str]) -> Series:
        found = {shown: of_metric(log, name) for shown, name in names.items()}
        return {shown: values for shown, values in found.items() if values}

    accuracy = _accuracy(run, steps)
    if accuracy is not None:
        yield accuracy
    loss = series({run.divergence: "divergence"}) or series({"loss": "loss"})
    if loss:
        is_ours = "loss" not in loss
        says = "How far the student is from its teacher, on average over the tokens it was trained on."
        says = says if is_ours else "What is minimised, as its trainer logs it."
        yield Chart(next(iter(loss)), says, charts.lines(loss, "nats per token" if is_ours else "loss", steps=steps))
    if spoken := stretches_of(run):
        says = "What each monitor of health said; a row that changes colour changed its mind at that step."
        yield Chart("health", says, charts.levels(spoken, steps=(0.0, steps[1] + 1)))
    if entropy := series({"student": "entropy", "teacher": "teacher_entropy"}):
        says = "How open the next token is. Near 0 the student is certain of everything, and its samples are all alike."
        yield Chart("entropy", says, charts.lines(entropy, "nats per token", steps=steps))
    if lengths := series(
        {"rollouts": "completions/mean_length", "limit": "completions/limit", "evaluation": "eval_length"}
    ):
        says = "Tokens per rollout, and per answer at the looks."
        yield Chart("length", says, charts.lines(lengths, "tokens", steps=steps))
    shares = series(
        {
            "cut": "completions/clipped_ratio",
            "right": "group/right",
            "repetition": "repetition",
            "leaks": "leak/phrases",
        }
    )
    if shares:
        says = "Shares of rollouts that are cut at the limit, right, or name a solution; and of stretches that repeat."
        yield Chart("rollouts", says, charts.lines(shares, "share", steps=steps, share=True))
    if reward := series({"reward": "reward"}):
        yield Chart("reward", "Mean over rollouts.", charts.lines(reward, "reward", steps=steps))
    quarters = series({f"{name} quarter": f"kl/quarter_{n}" for n, name in enumerate(QUARTERS, 1)})
    if quarters:
        says = "The divergence by position: the mean over each quarter of the traced rollouts."
        yield Chart("divergence by position", says, charts.lines(quarters, "nats per token", steps=steps))
    if classes := series({name: f"kl/{name}" for name in CLASSES}):
        says = "Which tokens carry the divergence. Much of it at punctuation, space and hedges is a signal of style."
        yield Chart("divergence by class of token", says, charts.stack(classes, "share of the divergence", steps=steps))
    if norm := series({"gradient": "grad_norm"}):
        says = "The gradient's norm before clipping. At 0 no step changes the model."
        yield Chart("gradient", says, charts.lines(norm, "norm", steps=steps))
    if rate := series({"learning rate": "learning_rate"}):
        yield Chart("learning rate", "Of each step.", charts.lines(rate, "rate", steps=steps))
    if seconds := series({"whole step": WHOLE, "rollouts": ROLLOUTS, "teacher": TEACHER}):
        bound = bound_of_step(log)
        says = (
            f"{bound[:1].upper()}{bound[1:]}. Training is the student's loss and its update." if bound else "Of a step."
        )
        yield Chart("time", says, charts.lines(seconds, "seconds", steps=steps))
    if memory := series({"most": "memory_gib"}):
        says = "The most memory that the device had in use; without an accelerator, what the process holds."
        yield Chart("memory", says, charts.lines(memory, "GiB", steps=steps))


def of_metric(log: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """Return (step, value) of a metric."""
    values = ((float(entry["step"]), entry.get(name)) for entry in log)
    return [(step, float(value)) for step, value in values if isinstance(value, int | float) and value == value]


def _accuracy(run: ReportedRun, steps: tuple[float, float]) -> Chart | None:
    looks = [look for look in run.summary.get("selection") or () if "accuracy" in look]
    metrics = run.summary.get("metrics", {})
    rules = {"teacher, test split:": metrics[CEILING]["accuracy"]["value"]} if CEILING in metrics else {}
    if not looks:
        return None
    points = [(float(look["step"]), look["accuracy"]["value"]) for look in looks]
    bands = [
        (float(look["step"]), look["accuracy"]["low"], look["accuracy"]["high"])
        for look in looks
        if look["accuracy"]["low"] is not None
    ]
    says = f"Right greedy answers to the {looks[0]['n']} questions of the selection split, with 95 % intervals."
    name = "selection split"
    svg = charts.lines({name: points}, "right", steps=steps, bands={name: bands}, rules=rules, share=True)
    return Chart("accuracy", says, svg)


def stretches_of(run: ReportedRun) -> list[tuple[str, int, int, str]]:
    """Return (monitor, from step, to step, level) of all monitors that ever spoke, the worst first."""
    changes = run.watch.history
    worst = {
        name: max(LEVELS.index(change.verdict.level) for change in changes if change.monitor == name)
        for name in dict.fromkeys(change.monitor for change in changes)
    }
    found = []
    for name in sorted(worst, key=lambda name: -worst[name]):
        of_name = [change for change in changes if change.monitor == name]
        found.append((name, 0, of_name[0].step, of_name[0].before))
        ends = [*(change.step for change in of_name[1:]), run.steps + 1]  # the last step is a step long
        found += [(name, change.step, end, change.verdict.level) for change, end in zip(of_name, ends, strict=True)]
    return [each for each in found if each[2] > each[1]]
