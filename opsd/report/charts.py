"""Charts as SVG: declared in Vega-Lite, drawn by vl-convert, coloured by the page's own light and dark scheme.

Knows numbers and names; nothing of runs. `var(--…)` are the colours of pages/style.css.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEIGHT = 320, 140
VEGA_LITE = "https://vega.github.io/schema/vega-lite/v5.json"  # a name that vl-convert knows; nothing is fetched
COLOURS = [f"var(--series-{number})" for number in range(1, 7)]
LEVEL_COLOURS = {"fine": "var(--fine)", "watch": "var(--watch)", "act": "var(--act)"}
SMALL = 1e-2  # values below it are written with an exponent
POINTS = 400  # of a series at most; a longer one is thinned out
_INK = {"labelColor": "var(--ink)", "titleColor": "var(--ink)"}
_CONFIG = {
    "font": "system-ui, sans-serif",
    "background": None,
    "view": {"stroke": None},
    "axis": {**_INK, "gridColor": "var(--grid)", "domainColor": "var(--grid)", "tickColor": "var(--grid)",
             "titleFontWeight": "normal"},
    "legend": {**_INK, "orient": "top", "title": None},
    "range": {"category": COLOURS},
}  # fmt: skip

Series = Mapping[str, Sequence[tuple[float, float]]]  # name -> (step, value)


def svg_of(spec: Mapping[str, Any]) -> str:
    """Return a Vega-Lite chart as SVG."""
    import vl_convert  # starts its own engine: a second

    whole = {"$schema": VEGA_LITE, "config": _CONFIG, "width": WIDTH, "height": HEIGHT, **spec}
    return str(vl_convert.vegalite_to_svg(whole, vl_version="5.20"))


def lines(
    series: Series,
    unit: str,
    *,
    steps: tuple[float, float],
    bands: Mapping[str, Sequence[tuple[float, float, float]]] | None = None,
    rules: Mapping[str, float] | None = None,
    share: bool = False,
) -> str:
    """Return series over steps as SVG.

    Args:
        series: name -> (step, value).
        unit: of the values.
        steps: the first and the last step of all charts of a page.
        bands: name of a series -> (step, low, high) of its intervals.
        rules: level lines by name, such as a ceiling.
        share: values are shares of 1, shown in per cent.
    """
    values: list[dict[str, Any]] = [
        {"step": step, "value": value, "series": name} for name, each in series.items() for step, value in thin(each)
    ]
    x = {"field": "step", "type": "quantitative", "scale": {"domain": list(steps), "nice": False}, "title": "step",
         "axis": {"tickMinStep": 1, "format": "d"}}  # fmt: skip
    small = max((abs(each["value"]) for each in values), default=1.0) < SMALL
    form = {"format": "~%"} if share else {"format": "~e"} if small else {}
    y = {"field": "value", "type": "quantitative", "title": unit, "axis": form,
         "scale": {"zero": share}}  # fmt: skip
    colour: dict[str, Any] = {"field": "series", "type": "nominal", "sort": list(series)}
    if len(series) == 1:
        colour["legend"] = None
    has_points = max(map(len, series.values()), default=0) <= 30
    drawn: list[dict[str, Any]] = []
    if bands:
        data = [
            {"step": step, "low": low, "high": high, "series": name}
            for name, each in bands.items()
            for step, low, high in each
        ]
        of_band = {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": colour}
        drawn.append({"data": {"values": data}, "mark": {"type": "area", "opacity": 0.2}, "encoding": of_band})
    mark = {"type": "line", "strokeWidth": 1.8, "point": {"size": 22} if has_points else False}
    drawn.append({"data": {"values": values}, "mark": mark, "encoding": {"x": x, "y": y, "color": colour}})
    for name, value in (rules or {}).items():
        level = {"data": {"values": [{"value": value, "name": f"{name} {value:.1%}" if share else name}]}}
        drawn.append(
            {**level, "mark": {"type": "rule", "strokeDash": [5, 4], "color": "var(--ink)"}, "encoding": {"y": y}}
        )
        text = {"type": "text", "align": "left", "x": 4, "dy": -5, "color": "var(--ink)"}
        drawn.append({**level, "mark": text, "encoding": {"y": y, "text": {"field": "name"}}})
    return svg_of({"layer": drawn})


def stack(series: Series, unit: str, *, steps: tuple[float, float]) -> str:
    """Return shares that add up to 1, over steps, as SVG."""
    values = [
        {"step": step, "value": value, "series": name, "order": order}
        for order, (name, each) in enumerate(series.items())
        for step, value in thin(each)
    ]
    x = {"field": "step", "type": "quantitative", "scale": {"domain": list(steps), "nice": False},
         "axis": {"tickMinStep": 1, "format": "d"}}  # fmt: skip
    y = {"field": "value", "type": "quantitative", "stack": "normalize", "title": unit, "axis": {"format": "~%"}}
    colour = {"field": "series", "type": "nominal", "sort": list(series)}
    encoding = {"x": x, "y": y, "color": colour, "order": {"field": "order"}}
    return svg_of({"data": {"values": values}, "mark": {"type": "area", "opacity": 0.85}, "encoding": encoding})


def levels(stretches: Sequence[tuple[str, int, int, str]], *, steps: tuple[float, float]) -> str:
    """Return what monitors said over steps: a row each, coloured by level.

    Args:
        stretches: (monitor, from step, to step, level).
        steps: the first and the last step.
    """
    values = [{"monitor": name, "from": first, "to": last, "level": level} for name, first, last, level in stretches]
    scale = {"domain": list(LEVEL_COLOURS), "range": list(LEVEL_COLOURS.values())}
    encoding = {
        "x": {"field": "from", "type": "quantitative", "scale": {"domain": list(steps), "nice": False}, "title": "step",
              "axis": {"tickMinStep": 1, "format": "d"}},
        "x2": {"field": "to"},
        "y": {"field": "monitor", "type": "nominal", "title": None, "sort": None},
        "color": {"field": "level", "type": "nominal", "scale": scale},
    }  # fmt: skip
    mark = {"type": "bar", "height": {"band": 0.7}}
    return svg_of({"height": {"step": 18}, "data": {"values": values}, "mark": mark, "encoding": encoding})


def thin(values: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """Return a series of at most POINTS values: means of neighbours.

    Example:
        >>> len(thin([(step, 1.0) for step in range(1000)])) <= POINTS
        True
    """
    size = -(-len(values) // POINTS)
    if size <= 1:
        return values
    parts = (values[start : start + size] for start in range(0, len(values), size))
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]
