"""Puts a report together: verdict, curves, heat-map, samples, results, card. Reads runs; writes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from opsd.evaluation.compare import Comparison
from opsd.evaluation.result import Answer, EvaluationResult
from opsd.evaluation.run_folder import leaves
from opsd.evaluation.summary import AFTER, BEFORE, TEACHER
from opsd.health.monitor import LEVELS
from opsd.report import heatmap
from opsd.report.curves import charts_of
from opsd.report.missing import Missing
from opsd.report.page import Table, render
from opsd.report.run import ReportedRun
from opsd.report.verdict import Sentence, beats_controls, better, healthy, tone_of

SAMPLES = 30  # questions whose answers are shown


def report_of(
    run: ReportedRun,
    comparison: Comparison | None = None,
    tables: Sequence[Table] = (),
    *,
    why_not: str = "",
    live: str = "",
) -> str:
    """Return the report of a run as one HTML page.

    Args:
        run: the run.
        comparison: with its controls; None where none were given.
        tables: of that comparison.
        why_not: why there is no comparison, where controls were given.
        live: the version of a page that is served, and loads itself again when there is a newer one; "" for a file.
    """
    lacks = Missing(run.missing)
    made, nothing = lacks.tried, list[Any]()
    shown = made("tokens", lambda: heatmap.by_step(run.whole(heatmap.chosen(run.rollouts))), nothing)
    asked = ("Did it get better?", "Did it beat its controls?", "Is it healthy?")
    damaged = [Sentence(each, "Nobody knows: what it is read from is damaged.", "open") for each in asked]
    verdict = [
        made("the first sentence", lambda: better(run), damaged[0]),
        made("the second sentence", lambda: beats_controls(comparison, str(run.folder), why_not), damaged[1]),
        made("the third sentence", lambda: healthy(run), damaged[2]),
    ]
    empty: dict[str, Any] = {}
    rollouts = made("tokens", lambda: heatmap.as_plain(shown, "step", "rollout", run.divergence), empty)
    spoken = [item for item in run.watch.verdicts.items() if item[1].level != "fine"]
    samples = made("answers before and after", lambda: list(_samples(run.results)), nothing)
    values: dict[str, Any] = {
        "title": f"{run.folder.resolve().name}: {_model(run.card)}",
        "about": made("the head", lambda: _about(run), ""),
        "sentences": verdict,
        "charts": made("curves", lambda: charts_of(run), nothing),
        "spoken": sorted(spoken, key=lambda item: -LEVELS.index(item[1].level)),
        "heatmap": rollouts if shown and rollouts else None,
        "shown_of": f"{len(shown):,} of {len(run.rollouts):,} traced rollouts. Choose a token to see what both sides "
        "would have said instead.",
        "splits": made("results by split", lambda: list(_splits(run)), nothing),
        "has_teacher": TEACHER in run.summary.get("metrics", {}),
        "drift": made("drift", lambda: _drift(run.summary), ""),
        "tables": tables,
        "samples": samples[:SAMPLES],
        "samples_of": _samples_of(samples),
        "card": made("the run card", lambda: list(_card(run.card)), nothing),
        "live": live,
        "missing": lacks.found,
    }
    return render("report.html", **values)


def _model(card: Mapping[str, Any]) -> str:
    return str(card.get("model", "a run without a card")).rstrip("/").rpartition("/")[2]


def _about(run: ReportedRun) -> str:
    of_all = f" of {run.planned_steps}" if run.planned_steps and not run.has_ended else ""
    parts = [f"{run.steps} steps{of_all}"]
    if run.card:
        parts += [
            f"teacher: {run.card['teacher']['description']}",
            f"context: {', '.join(run.card['contexts']) or 'none'}",
        ]
        parts += [f"loss: {run.card['divergence']['description']}"]
        control = run.card["settings"].get("control")
        parts += [f"a control: {control}"] if control else []
    return " · ".join(parts).replace(f"{Path.home()}/", "~/")  # a page is shown to others


def _splits(run: ReportedRun) -> Iterator[dict[str, Any]]:
    """Yield a row per split: accuracy before and after, with intervals."""
    metrics = run.summary.get("metrics", {})
    if BEFORE in metrics and AFTER in metrics and "gain" in run.summary:
        teacher = _share(metrics[TEACHER]["accuracy"]) if TEACHER in metrics else ""
        yield {**_row("test", metrics, run.summary["gain"]), "teacher": teacher}
    for name, split in run.summary.get("retention", {}).items():
        yield {**_row(f"{name} (kept?)", split, split["difference"]), "teacher": ""}


def _row(name: str, metrics: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    points = f"{100 * change['difference']:+.1f} ({100 * change['low']:+.1f} to {100 * change['high']:+.1f})"
    sides = {when: _share(metrics[when]["accuracy"]) for when in (BEFORE, AFTER)}
    return {"name": name, "n": change["n"], **sides, "change": points, "tone": tone_of(change)}


def _share(accuracy: Mapping[str, Any]) -> str:
    text = f"{accuracy['value']:.1%}"
    return text if accuracy["low"] is None else f"{text} ({accuracy['low']:.1%} to {accuracy['high']:.1%})"


def _drift(summary: Mapping[str, Any]) -> str:
    if not summary.get("drift"):
        return ""
    nats = summary["drift"]["per_token"]
    interval = "" if nats["low"] is None else f" ({nats['low']:.3f} to {nats['high']:.3f})"
    return (
        f"Drift on neutral prompts: {nats['value']:.3f} nats per token{interval} between the student before and after."
    )


def _samples(results: Mapping[str, EvaluationResult]) -> Iterator[dict[str, str]]:
    """Yield the answers to each question before and after, those whose grade changed first."""
    if BEFORE not in results or AFTER not in results:
        return
    before, after = results[BEFORE], results[AFTER].in_order_of(results[BEFORE])
    rows = list(zip(before.questions, before.greedy, after.greedy, strict=True))
    for question, first, last in sorted(rows, key=lambda row: row[1].correct == row[2].correct):
        texts = {"question": question, "before": first.text, "after": last.text}
        yield {**texts, "was": _mark(first), "now": _mark(last)}


def _mark(answer: Answer) -> str:
    return "ungraded" if answer.correct is None else "right" if answer.correct else "wrong"


def _samples_of(samples: Sequence[Mapping[str, str]]) -> str:
    gained = sum(each["was"] != "right" and each["now"] == "right" for each in samples)
    lost = sum(each["was"] == "right" and each["now"] != "right" for each in samples)
    shown = min(len(samples), SAMPLES)
    return f"{gained} became right, {lost} became wrong; {shown} of {len(samples)} are shown, the changed ones first."


def _card(card: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield the parts of a card, each as rows of a table."""
    if not card:
        return
    first = {name: card.get(name) for name in ("opsd", "model", "rows", "groups", "evaluation")}
    first |= {"teacher": card["teacher"]["description"], "loss": card["divergence"]["description"]}
    first |= {"formula": card["divergence"]["formula"], **dict(card.get("outcome", {}))}
    yield "The run", _rows({name: value for name, value in first.items() if value is not None})
    doctor = card.get("doctor")
    if isinstance(doctor, Mapping):
        findings = {f"{each['check']} ({each['status']})": each["saw"] for each in doctor["findings"]}
        yield "Doctor", _rows({"verdict": doctor["verdict"], **findings})
    for prompt in card.get("prompts", ())[:1]:
        views = {f"teacher with {view['context']}": view["prompt"] for view in prompt["teacher"]}
        yield "Prompts of the first row", _rows({"student": prompt["student"], **views})
    for title in ("settings", "versions", "hardware", "hashes", "seeds"):
        if title in card:
            yield title.capitalize(), _rows(card[title])


def _rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, str(value)) for name, value in leaves(values)]
