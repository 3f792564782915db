"""What was gained beside what was kept: the front, the best values, retention paired by question and seed."""

from __future__ import annotations

import json
import xml.etree.ElementTree as Xml
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_compare import N, answers, result, run

from opsd.cli import main
from opsd.commands.tradeoff import markdown
from opsd.evaluation.compare import RunResult
from opsd.evaluation.pareto import ALL_SPLITS, Tradeoff, front, tradeoff_of
from opsd.evaluation.statistics import over_seeds, paired_difference
from opsd.evaluation.sweep_folder import DONE, RunRecord
from opsd.report.pareto import as_svg

BEFORE = result(answers(0.3, 99))


def exact(share: float, n: int = N) -> np.ndarray:
    return np.arange(n) < round(share * n)


def at(
    control: str | None, rate: float, seed: int, task: float, *kept: float, selection: float | None = 0.5
) -> RunResult:
    """A run of a sweep with exact shares on the task and on each retention split, whose sizes differ."""
    splits = {
        f"split {number}": {
            "before": result(exact(0.7, 100 * (number + 1))),
            "after": result(exact(share, 100 * (number + 1))),
        }
        for number, share in enumerate(kept)
    }
    one = run(control, seed, exact(task), learning_rate=rate)
    one.card["outcome"] = {"seconds": 20.0, "cpu_seconds": 39.0, "rollouts": 40}  # type: ignore[index]
    return replace(
        one,
        folder=f"runs/{control or 'method'}-{rate}-{seed}",
        results={**one.results, "before": BEFORE},
        values={"learning_rate": rate},
        selection=selection,
        retention=splits,
    )


def names(tradeoff: Tradeoff, mark: str) -> list[str]:
    return [point.name for point in tradeoff.points if getattr(point, mark)]


@pytest.mark.parametrize(("best", "remark"), [(1e-6, "lr 1e-6 (lowest)"), (3e-6, None), (1e-5, "lr 1e-5 (highest)")])
def test_a_best_value_at_the_edge_of_those_tried_is_named(best: float, remark: str | None) -> None:
    runs = [at(None, rate, 0, 0.4, 0.6, selection=0.6 if rate == best else 0.5) for rate in (1e-6, 3e-6, 1e-5)]
    shown = markdown(tradeoff_of(runs))
    assert ("at the edge" in shown) == (remark is not None) and (remark or "") in shown


def test_the_front_is_worked_by_hand() -> None:
    """Task, retention: (40, 70) and (50, 60) are on it, (50, 55) and (35, 70) are behind, equal points are both on."""
    places = {1e-6: (0.35, 0.70), 3e-6: (0.40, 0.70), 1e-5: (0.50, 0.60), 3e-5: (0.50, 0.55)}
    runs = [at(None, rate, 0, *place) for rate, place in places.items()]
    assert [p.values["learning_rate"] for p in tradeoff_of(runs).points if p.on_front] == [3e-6, 1e-5]
    twins = tradeoff_of([at(None, 1e-5, 0, 0.5, 0.6), at("sft", 1e-5, 0, 0.5, 0.6), at("seq-kd", 1e-5, 0, 0.4, 0.6)])
    assert names(twins, "on_front") == ["method", "sft"]
    assert front([replace(point, retention={}) for point in twins.points]) == [False] * 3


def test_retention_is_the_mean_over_splits_whatever_their_sizes() -> None:
    (point,) = tradeoff_of([at(None, 1e-5, 0, 0.5, 0.9, 0.5)]).points
    assert point.kept is not None and point.kept.change is not None
    assert point.kept.after.value == pytest.approx(0.7)  # not (90 + 100) / 300
    assert point.kept.change.difference == pytest.approx(0.0)
    assert [point.retention[f"split {n}"].change.difference for n in (0, 1)] == pytest.approx([0.2, -0.2])
    assert (point.seconds, point.cpu_seconds, point.rollouts, point.length) == (20.0, 39.0, 40.0, 5.0)


def test_the_best_value_is_chosen_on_the_selection_split_over_the_seeds_that_all_values_have() -> None:
    """The test split, or seeds that only one value was trained with, must not choose."""
    runs = [
        at(None, 1e-6, 0, 0.9, 0.7, selection=0.60),
        at(None, 1e-5, 0, 0.4, 0.7, selection=0.62),
        at(None, 1e-5, 1, 0.4, 0.7, selection=0.10),
        at("sft", 1e-6, 0, 0.3, 0.7, selection=0.5),
        at("sft", 1e-6, 1, 0.3, 0.7, selection=0.5),
    ]
    tradeoff = tradeoff_of(runs)
    assert names(tradeoff, "is_best") == ["method, lr 1e-5", "sft"]
    assert [arm.name for arm in tradeoff.comparison.arms] == ["method", "sft"]
    (pair,) = tradeoff.comparison.pairwise
    assert pair.difference.difference == pytest.approx(0.1) and (pair.same_sign, pair.by_seed) == (2, [0.1, 0.1])
    assert "the same sign in 2 of 2" in pair.verdict
    assert not any("learning_rate" in warning for warning in tradeoff.comparison.warnings)


def test_without_a_selection_split_no_value_is_chosen() -> None:
    runs = [at(None, rate, 0, share, 0.7, selection=None) for rate, share in ((1e-6, 0.4), (1e-5, 0.5))]
    tradeoff = tradeoff_of([*runs, at("sft", 1e-5, 0, 0.3, 0.7, selection=None)])
    assert names(tradeoff, "is_best") == [] and len(tradeoff.comparison.arms) == 3
    assert "no best value of method was chosen" in tradeoff.remarks[0]


def test_runs_by_hand_that_differ_in_learning_rate_only_are_one_arm() -> None:
    runs = [replace(at(None, rate, 0, share, 0.7), values=None) for rate, share in ((1e-6, 0.4), (1e-5, 0.5))]
    other = replace(
        run(None, 0, exact(0.2), max_completion_length=9), folder="runs/long-0", retention=runs[0].retention
    )
    tradeoff = tradeoff_of([*runs, other])
    arms = [point.arm for point in tradeoff.points]
    assert arms[0] == arms[1] != arms[2]
    assert [point.values for point in tradeoff.points] == [{"learning_rate": 1e-6}, *[{"learning_rate": 1e-5}] * 2]


def test_retention_is_paired_by_question_and_seed_and_adjusted() -> None:
    generator = np.random.default_rng(0)

    def kept(one: RunResult, share: float) -> RunResult:
        split = {"before": BEFORE, "after": result(generator.random(N) < share)}
        return replace(one, retention={"general": split})

    runs = [kept(at(c, 1e-5, s, 0.5), share) for c, share in ((None, 0.7), ("sft", 0.5), ("x", 0.7)) for s in (0, 1, 2)]
    retention = tradeoff_of(runs).retention
    pairs = retention["general"]
    assert [pair.other for pair in pairs] == ["sft", "x"] and ALL_SPLITS not in retention
    sides = [np.array([r.retention["general"]["after"].correct for r in runs if r.arm == a]) for a in ("sft", "method")]
    wanted = paired_difference(sides[0].mean(0), sides[1].mean(0))
    assert pairs[0].difference == wanted and pairs[0].p_value == pytest.approx(2 * wanted.p_value)
    assert pairs[0].spread == over_seeds((sides[1].astype(float) - sides[0]).mean(1))
    assert pairs[0].verdict.startswith("method beat sft: +") and "cannot be distinguished" in pairs[1].verdict


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep's folder with four points, and one run that failed."""
    monkeypatch.setenv("COLUMNS", "250")
    places = [(None, 1e-6, 0.4, 0.7), (None, 1e-5, 0.5, 0.6), ("sft", 1e-6, 0.4, 0.5), ("sft", 1e-5, 0.45, 0.3)]
    folders = []
    for control, rate, task, kept in places:
        one = at(control, rate, 0, task, kept)
        folder = tmp_path / f"{one.arm}-lr{rate}-seed0"
        folders.append(folder.name)
        for when, each in one.results.items():
            each.save(folder / "evaluation" / f"{when}.json")
        for when, each in one.retention["split 0"].items():
            each.save(folder / "evaluation" / f"retention_split_0.{when}.json")
        look = {"step": 4, "accuracy": {"value": task}}
        summary = {"selection": [look], "chosen": "step 4: the last", "retention": {"split 0": {}}}
        (folder / "evaluation" / "evaluation.json").write_text(json.dumps(summary))
        (folder / "run_card.json").write_text(json.dumps(dict(one.card)))
        RunRecord("answers" if control else "method", one.values or {}, 0, status=DONE).write(folder)
    RunRecord("method", {"learning_rate": 1e-4}, 0, status="failed").write(tmp_path / "failed")
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": [*folders, "failed"]}))
    return tmp_path


def test_command_compares_the_finished_runs_of_a_sweep_by_the_names_of_its_arms(sweep: Path, capsys) -> None:
    files = {kind: sweep / f"c.{kind}" for kind in ("json", "markdown", "plot")}
    assert main(["compare", str(sweep), *(t for kind, path in files.items() for t in (f"--{kind}", str(path)))]) == 0
    out, table = capsys.readouterr().out, files["markdown"].read_text()
    assert "method, lr 1e-5" in out and "front, best" in out
    assert "best values on the selection split: method, lr 1e-5; answers, lr 1e-5" in out
    assert "retention, split 0: method is ahead of answers with one pair of seeds" in out
    assert "| method, lr 1e-6 | front | 0 | 40.0 | 40.0 (" in table and "| 20 | 0.500 |" in table
    stored = json.loads(files["json"].read_text())
    marks = [(p["name"], p["on_front"], p["is_best"]) for p in stored["points"]]
    assert marks[1] == ("method, lr 1e-5", True, True) and [m[1] for m in marks] == [
        True,
        True,
        False,
        False,
    ]
    assert stored["retention"]["split 0"][0]["difference"]["difference"] == pytest.approx(0.3)
    assert "(" in out.split("lr 1e-5")[1].splitlines()[0]
    root = Xml.parse(files["plot"]).getroot()
    assert "method, lr 1e-5: task 50.0 %, retention 60.0 %" in said(root) and len(said(root)) == 4


def test_a_narrow_terminal_shows_no_intervals(sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """With them a line of the table took six lines."""
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["compare", str(sweep)]) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("method, lr 1e-5")]
    assert line.split()[3:8] == ["front,", "best", "0", "50.0", "50.0"] and "a terminal of" in " ".join(out.split())


def said(root: Xml.Element) -> list[str]:
    """What a screen reader says of the points of a plot."""
    labels = [node.get("aria-label", "") for node in root.iter()]
    return [label for label in labels if ": task " in label]


def test_a_plot_has_every_point_and_no_name_becomes_markup() -> None:
    extremes: list[Any] = [at(None, 1e-6, 0, 0.0, 0.0), at(None, 1e-5, 0, 1.0, 1.0), at("a<b", 1e-6, 0, 0.5, 0.5)]
    points = tradeoff_of(extremes).points
    for in_page in (False, True):
        svg = as_svg(points, in_page=in_page)
        assert len(said(Xml.fromstring(svg))) == 3 and "a&lt;b" in svg
        assert ("var(--" in svg) is in_page  # a file has no page to take its colours from
