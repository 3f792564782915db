"""Draws points of the task against retention as SVG, without a plotting package.

Knows points; nothing of runs or files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from opsd.evaluation.pareto import Point
from opsd.evaluation.sweep_folder import as_label

WIDTH, HEIGHT = 760, 480
LEFT, RIGHT, TOP, BOTTOM = 64, 180, 24, 52  # margins; the legend is at the right
# Okabe and Ito's colours, which colour-blind people tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
STEPS = (1, 2, 5, 10, 20, 25)  # per cent between two lines of the grid
LINES = 6  # of the grid at most


def as_svg(points: Sequence[Point]) -> str:
    """Return a plot: a point per arm and value, its seeds, whiskers over seeds, and the Pareto front.

    Args:
        points: those without retention are left out.

    Example:
        >>> as_svg(tradeoff_of(read_runs(["runs/sweep"])).points)[:5]  # doctest: +SKIP
        '<svg '
    """
    return "\n".join([*_Drawing([point for point in points if point.kept is not None]).lines(), "</svg>", ""])


class _Drawing:
    def __init__(self, points: Sequence[Point]):
        self.points = points
        self.arms = list(dict.fromkeys(point.arm for point in points))
        self.xs = _axis([end for point in points for end in _ends(point, 0)])
        self.ys = _axis([end for point in points for end in _ends(point, 1)])

    def lines(self) -> Iterator[str]:
        font = 'font-family="sans-serif" font-size="12"'
        yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {font}>'
        yield f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
        yield from self._grid()
        yield from self._front()
        for point in self.points:
            yield from self._point(point)
        yield from self._legend()

    def x(self, value: float) -> float:
        return _placed(100 * value, self.xs, LEFT, WIDTH - RIGHT)

    def y(self, value: float) -> float:
        return _placed(100 * value, self.ys, HEIGHT - BOTTOM, TOP)

    def _grid(self) -> Iterator[str]:
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        for value in self.xs:
            x = self.x(value / 100)
            yield f'<path d="M{x:.1f} {TOP}V{bottom}" stroke="#ddd"/>'
            yield _text(x, bottom + 18, f"{value:g}", "middle")
        for value in self.ys:
            y = self.y(value / 100)
            yield f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#ddd"/>'
            yield _text(LEFT - 8, y + 4, f"{value:g}", "end")
        yield _text((LEFT + right) / 2, HEIGHT - 12, "task after training, % of the test split", "middle")
        middle = (TOP + bottom) / 2
        yield f'<g transform="rotate(-90 18 {middle})">{_text(18, middle, "retention after training, %", "middle")}</g>'

    def _front(self) -> Iterator[str]:
        places = sorted(_middle(point) for point in self.points if point.on_front)
        if len(places) > 1:
            path = "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in places)
            yield f'<path d="M{path}" fill="none" stroke="#999" stroke-dasharray="5 4"/>'

    def _point(self, point: Point) -> Iterator[str]:
        colour = self._colour(point.arm)
        place = _middle(point)
        x, y = self.x(place[0]), self.y(place[1])
        assert point.kept is not None
        for spread, is_task in ((point.task.spread, True), (point.kept.spread, False)):
            if spread.deviation:
                low, high = spread.mean - spread.deviation, spread.mean + spread.deviation
                path = f"M{self.x(low):.1f} {y:.1f}H{self.x(high):.1f}" if is_task else ""
                path = path or f"M{x:.1f} {self.y(low):.1f}V{self.y(high):.1f}"
                yield f'<path d="{path}" stroke="{colour}" stroke-opacity="0.5"/>'
        fill = colour if point.on_front else "white"
        name = escape(point.name)
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}" stroke="{colour}" stroke-width="2">'
        yield f"<title>{name}: task {place[0]:.1%}, retention {place[1]:.1%}</title></circle>"
        if point.is_best:
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="9" fill="none" stroke="{colour}"/>'
        label = ", ".join(as_label(value) for value in point.values.values())
        yield _text(x + 11, y - 7, label, "start", 'font-size="10" fill="#555"')

    def _legend(self) -> Iterator[str]:
        left = WIDTH - RIGHT + 18
        for number, arm in enumerate(self.arms):
            y = TOP + 14 + 20 * number
            yield f'<circle cx="{left}" cy="{y - 4}" r="5" fill="{self._colour(arm)}"/>'
            yield _text(left + 12, y, arm, "start")
        notes = (
            "filled: on the Pareto front",
            "ring: best of its arm",
            "on the selection split",
            "bars: sd over seeds",
        )
        for number, note in enumerate(notes):
            y = TOP + 30 + 20 * len(self.arms) + 15 * number
            yield _text(left - 5, y, note, "start", 'font-size="10" fill="#555"')

    def _colour(self, arm: str) -> str:
        return COLOURS[self.arms.index(arm) % len(COLOURS)]


def _middle(point: Point) -> tuple[float, float]:
    assert point.kept is not None
    return point.task.after.value, point.kept.after.value


def _ends(point: Point, axis: int) -> tuple[float, float]:
    """Return the ends of a point's whisker, in per cent."""
    assert point.kept is not None
    deviation = (point.task.spread, point.kept.spread)[axis].deviation or 0.0
    middle = _middle(point)[axis]
    return 100 * (middle - deviation), 100 * (middle + deviation)


def _axis(values: Sequence[float]) -> list[float]:
    """Return the values of the grid, which reaches around all values.

    Example:
        >>> _axis([36.0, 47.0])
        [35.0, 40.0, 45.0, 50.0]
    """
    low, high = min(values), max(values)
    step = next((each for each in STEPS if (high - low) / each <= LINES - 2), STEPS[-1])
    first, last = math.floor(low / step - 0.2), math.ceil(high / step + 0.2)
    return [float(step * number) for number in range(first, last + 1)]


def _placed(value: float, axis: Sequence[float], start: float, end: float) -> float:
    return start + (value - axis[0]) / (axis[-1] - axis[0]) * (end - start)


def _text(x: float, y: float, text: str, anchor: str, others: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {others}>{escape(text)}</text>'
