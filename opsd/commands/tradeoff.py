"""The first table of `opsd compare`: every point of a sweep, what it gained on the task and what it kept elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Column, Table

from opsd.commands.cells import as_change, as_estimate

if TYPE_CHECKING:
    from opsd.evaluation.pareto import Kept, Point, Tradeoff
    from opsd.evaluation.statistics import SeedSpread

WIDE = 170  # columns of a terminal that show the table with its intervals
# Left out of a narrower one, as the intervals are.
ONLY_WIDE = ("sd", "change", "all splits, %", "tokens", "s", "s/rollout")
NO_RETENTION = (
    "it shows the task against retention, and the runs have no retention split (`evaluation: {retention: …}`)"
)


def is_shown(tradeoff: Tradeoff) -> bool:
    """Return whether the points say more than the comparison: an arm has several, or retention was measured."""
    arms = [point.arm for point in tradeoff.points]
    return len(set(arms)) < len(arms) or has_plot(tradeoff)


def has_plot(tradeoff: Tradeoff) -> bool:
    """Return whether there is retention to plot the task against."""
    return any(point.kept is not None for point in tradeoff.points)


def show(tradeoff: Tradeoff, console: Console) -> None:
    """Print the points, where there is more to them than the comparison shows."""
    if not is_shown(tradeoff):
        return
    is_wide, names, points = console.width >= WIDE, head(tradeoff), list(rows(tradeoff))
    measured = [place for place in range(len(names)) if any(cells[place] for cells in points)]
    shown = [place for place in measured if is_wide or names[place] not in ONLY_WIDE]
    columns = [Column(names[place] if is_wide else names[place].partition(",")[0], no_wrap=True) for place in shown]
    table = Table(*columns, box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for cells in points:
        table.add_row(*(cells[place] if is_wide else _without_interval(cells[place]) for place in shown))
    console.print(table)
    for line in remarks(tradeoff):
        console.print(f"· {line}", highlight=False)
    hint = "" if is_wide else f" With intervals, changes and seconds: --markdown, or a terminal of {WIDE} columns."
    console.print(f"[dim]{footer(tradeoff)}.{hint}[/]", highlight=False)
    console.print()


def _without_interval(cell: str) -> str:
    return cell.partition(" (")[0]


def head(tradeoff: Tradeoff) -> list[str]:
    """Return the heads of the columns."""
    unit = ", %" if tradeoff.comparison.kind.is_share else ""
    kept = [text for name in _splits(tradeoff) for text in (f"{name}, %", "sd", "change")]
    first = ["", "", "seeds", "select, %", f"task{unit}", "sd", "gain"]
    return [*first, *kept, "drift", "tokens", "s", "s/rollout"]


def rows(tradeoff: Tradeoff) -> Iterator[list[str]]:
    """Yield the cells of a point each."""
    scale = tradeoff.comparison.kind.scale
    for point in tradeoff.points:
        task = point.task
        marks = ", ".join(["front"] * point.on_front + ["best"] * (point.is_best and _is_swept(tradeoff, point)))
        seeds = ", ".join(str(run.seed) for run in task.runs)
        selection = "" if point.selection is None else f"{100 * point.selection:.1f}"
        gain = "" if task.gain is None else as_change(task.gain, scale)
        kept = [text for name in _splits(tradeoff) for text in _kept(point.retention[name])]
        drift = "" if task.drift is None else f"{task.drift:.3f}"
        numbers = [as_estimate(task.after, scale), _deviation(task.spread, scale), gain, *kept, drift]
        yield [point.name, marks, seeds, selection, *numbers, f"{point.length:.1f}", *_seconds(point)]


def _splits(tradeoff: Tradeoff) -> list[str]:
    """Return the retention splits, and their mean where there are several."""
    from opsd.evaluation.pareto import ALL_SPLITS

    names = list(tradeoff.points[0].retention)
    return [name for name in names if name != ALL_SPLITS or len(names) > 2]


def _is_swept(tradeoff: Tradeoff, point: Point) -> bool:
    return sum(other.arm == point.arm for other in tradeoff.points) > 1


def _kept(kept: Kept) -> tuple[str, str, str]:
    change = "" if kept.change is None else as_change(kept.change, 100)
    return as_estimate(kept.after, 100), _deviation(kept.spread, 100), change


def _deviation(spread: SeedSpread, scale: int) -> str:
    return "?" if spread.deviation is None else f"{scale * spread.deviation:.1f}"


def _seconds(point: Point) -> tuple[str, str]:
    if point.seconds is None:
        return "", ""
    return f"{point.seconds:.0f}", f"{point.seconds / point.rollouts:.3f}" if point.rollouts else ""


def remarks(tradeoff: Tradeoff) -> list[str]:
    """Return what is to be said of the points, in lines."""
    chosen = [point.name for point in tradeoff.points if point.is_best and _is_swept(tradeoff, point)]
    lines = [f"compared at the best values on the selection split: {'; '.join(chosen)}"] if chosen else []
    if edges := list(_edges(tradeoff)):
        lines.append(f"at the edge of what was tried, so that a value beyond may do better: {'; '.join(edges)}")
    pairs = [f"retention, {name}: {pair.verdict}" for name, each in tradeoff.retention.items() for pair in each]
    return [*lines, *tradeoff.remarks, *pairs]


def _edges(tradeoff: Tradeoff) -> Iterator[str]:
    """Yield the arms whose best value is the lowest or the highest of its setting."""
    for point in (point for point in tradeoff.points if point.is_best):
        for name, value in point.values.items():
            tried = {other.values[name] for other in tradeoff.points if other.arm == point.arm}
            if len(tried) > 1 and all(isinstance(each, int | float) for each in tried):
                for edge, word in ((min(tried), "lowest"), (max(tried), "highest")):
                    if value == edge:
                        yield f"{point.name} ({word})"


def footer(tradeoff: Tradeoff) -> str:
    """Return what the columns mean."""
    return (
        "select, task: the selection and the test split after training; the retention splits likewise. 95 % intervals "
        "over questions; sd: standard deviation over seeds; changes in points, paired by question. front: no other "
        "point is at least as good on the task and on the mean of the retention splits, and better on one. best: of "
        "its arm on the selection split, over the seeds that all its values have. tokens: per answer. s: seconds of "
        "training by the wall clock, and per rollout"
    )


def markdown(tradeoff: Tradeoff) -> str:
    """Return the points as Markdown; empty where the comparison shows all there is."""
    if not is_shown(tradeoff):
        return ""
    names = head(tradeoff)
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    lines += [f"| {' | '.join(cells)} |" for cells in rows(tradeoff)]
    return "\n".join([*lines, "", *(f"- {line}" for line in remarks(tradeoff)), "", f"{footer(tradeoff)}.", "", ""])
