"""The plot of the task against retention: a point per arm and value, its spread over seeds, the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opsd.evaluation.pareto import Point
from opsd.evaluation.sweep_folder import as_label
from opsd.report.charts import svg_of

# Okabe and Ito's colours, which colour-blind people tell apart; on white, for a file.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]
TASK, KEPT = "task after training, % of the test split", "retention after training, %"


def as_svg(points: Sequence[Point], *, in_page: bool = False) -> str:
    """Return the plot.

    Args:
        points: those without retention are left out.
        in_page: colours follow the page's light and dark scheme; a file is black on white.

    Example:
        >>> as_svg(tradeoff_of(read_runs(["runs/sweep"])).points)[:4]  # doctest: +SKIP
        '<svg'
    """
    shown = [_plain(point) for point in points if point.kept is not None]
    arms = list(dict.fromkeys(each["arm"] for each in shown))
    x = {"field": "task", "type": "quantitative", "title": TASK, "scale": {"zero": False, "padding": 16}}
    y = {"field": "kept", "type": "quantitative", "title": KEPT, "scale": {"zero": False, "padding": 16}}
    scale = {"domain": arms, **({} if in_page else {"range": COLOURS[: len(arms)] or COLOURS})}
    colour = {
        "field": "arm",
        "type": "nominal",
        "scale": scale,
        "legend": {"symbolOpacity": 1, "orient": "top", "title": None},
    }
    best, front = {"filter": "datum.is_best"}, {"filter": "datum.on_front"}
    white = "var(--paper)" if in_page else "white"
    fill = {"condition": {"test": "datum.on_front", **colour}, "value": white}
    line = {"type": "line", "strokeDash": [5, 4], "color": "#8a8a8a", "strokeWidth": 1}
    bars = {"opacity": 0.5}
    layers: list[dict[str, Any]] = [
        {"transform": [front], "mark": line, "encoding": {"x": x, "y": y}},
        {"mark": {"type": "rule", **bars}, "encoding": {"x": {**x, "field": "task_low"}, "x2": {"field": "task_high"},
                                                        "y": y, "color": colour}},
        {"mark": {"type": "rule", **bars}, "encoding": {"y": {**y, "field": "kept_low"}, "y2": {"field": "kept_high"},
                                                        "x": x, "color": colour}},
        {"transform": [best], "mark": {"type": "point", "size": 260}, "encoding": {"x": x, "y": y, "color": colour}},
        {"mark": {"type": "point", "size": 80, "strokeWidth": 2, "opacity": 1},
         "encoding": {"x": x, "y": y, "stroke": colour, "fill": fill, "description": {"field": "says"}}},
        {"mark": {"type": "text", "align": "left", "dx": 9, "dy": -9, "fontSize": 10,
                  "color": "var(--ink)" if in_page else "#555"},
         "encoding": {"x": x, "y": y, "text": {"field": "label"}}},
    ]  # fmt: skip
    note = "filled: on the Pareto front · ring: best of its arm on the selection split · bars: sd over seeds"
    title = {"text": note, "fontSize": 10, "fontWeight": "normal", "anchor": "start", "orient": "bottom", "offset": 8,
             "color": "var(--soft)" if in_page else "#555"}  # fmt: skip
    spec = {"width": 640, "height": 400, "data": {"values": shown}, "layer": layers, "title": title}
    return svg_of(spec if in_page else {**spec, "background": "white", "config": {"view": {"stroke": None}}})


def _plain(point: Point) -> Mapping[str, Any]:
    """Return a point in per cent."""
    assert point.kept is not None
    task, kept = 100 * point.task.after.value, 100 * point.kept.after.value
    task_sd, kept_sd = (100 * (each.deviation or 0.0) for each in (point.task.spread, point.kept.spread))
    return {
        "arm": point.arm,
        "label": ", ".join(as_label(value) for value in point.values.values()),
        "says": f"{point.name}: task {task:.1f} %, retention {kept:.1f} %",
        "task": task,
        "task_low": task - task_sd,
        "task_high": task + task_sd,
        "kept": kept,
        "kept_low": kept - kept_sd,
        "kept_high": kept + kept_sd,
        "on_front": point.on_front,
        "is_best": point.is_best,
    }
