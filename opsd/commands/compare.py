"""`opsd compare RUNS…`: whether the method beat its controls, with intervals."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Column
from rich.table import Table as RichTable

from opsd.commands import tradeoff as page
from opsd.commands.cells import as_change, as_estimate
from opsd.report.page import Table

if TYPE_CHECKING:
    from opsd.evaluation.compare import Arm, Comparison, Pairwise
    from opsd.evaluation.pareto import Tradeoff

FILES = {"json": "comparison.json", "markdown": "comparison.md", "plot": "pareto.svg"}  # of a sweep's folder
WIDE = 110  # columns of a terminal that show the table with its intervals in one line
HEAD = ("", "seeds", "after{unit}", "gain", "sd", "drift", "{first} minus it", "p")


def make_parser() -> argparse.ArgumentParser:
    """Return the options of `opsd compare`."""
    parser = argparse.ArgumentParser(
        prog="opsd compare",
        description="Compare runs on the same held-out questions: the method with its controls, each with its seeds. "
        "Runs that differ only in seed and training questions are one arm. Intervals over questions (95 %, paired) "
        "cover the choice of questions; the spread over seeds covers the choice of seed. Where an arm has runs at "
        "several learning rates, or at several values of a sweep, arms are compared at their best value on the "
        "selection split; a first table shows every value, with what was kept on the retention splits.",
        epilog="Example: opsd compare runs/method-* runs/wrong-context-* runs/sft-*; opsd compare runs/sweep",
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="output folders of runs that had an `evaluation:`, or of `opsd sweep`"
    )
    parser.add_argument(
        "--metric", default="accuracy", help="accuracy (default), avg@k, pass@k, maj@k, format, length, truncated"
    )
    parser.add_argument("--json", metavar="FILE", help="write the comparison")
    parser.add_argument("--markdown", metavar="FILE", help="write the tables for a README")
    parser.add_argument("--plot", metavar="FILE.svg", help="write a plot of the task against retention")
    parser.add_argument("--html", metavar="FILE.html", help="write tables and plot as one page")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Print the table and the verdicts."""
    options = make_parser().parse_args(arguments)
    from opsd.evaluation.compare import as_json, read_runs
    from opsd.evaluation.pareto import as_plain, tradeoff_of
    from opsd.evaluation.run_folder import write_json, write_whole
    from opsd.report.pareto import as_svg

    tradeoff, console = tradeoff_of(read_runs(options.runs), options.metric), Console()
    comparison = tradeoff.comparison
    page.show(tradeoff, console)
    show(comparison, console)
    if options.json:
        write_json(Path(options.json), {**as_json(comparison), **as_plain(tradeoff)})
    if options.markdown:
        write_whole(Path(options.markdown), page.markdown(tradeoff) + markdown(comparison))
    if options.plot and page.has_plot(tradeoff):
        write_whole(Path(options.plot), as_svg(tradeoff.points))
    elif options.plot:
        console.print(f"no plot was written: {page.NO_RETENTION}", highlight=False)
    if options.html:
        write_whole(Path(options.html), as_html(tradeoff))
        console.print(f"page        {options.html}", highlight=False)
    return 0


def as_html(tradeoff: Tradeoff) -> str:
    """Return the verdict, the plot and the tables as one page."""
    from opsd.report.page import render
    from opsd.report.pareto import as_svg
    from opsd.report.verdict import beats_controls

    comparison = tradeoff.comparison
    shown = page.is_shown(tradeoff)
    points = [Table("Every point", page.head(tradeoff), list(page.rows(tradeoff)), page.remarks(tradeoff))]
    return render(
        "compare.html",
        title=", ".join(arm.name for arm in comparison.arms),
        about=footer(comparison),
        sentence=beats_controls(comparison),
        plot=as_svg(tradeoff.points, in_page=True) if page.has_plot(tradeoff) else "",
        tables=[as_table(comparison), *(points if shown else [])],
    )


def as_table(comparison: Comparison) -> Table:
    """Return a comparison as a table of a page."""
    names, lines = head(comparison), list(rows(comparison))
    shown = [place for place in range(len(names)) if any(cells[place] for cells in lines)]
    cells = [[line[place] for place in shown] for line in lines]
    notes = [f"{comparison.verdict}.", *_remarks(comparison)]
    return Table("Compared on the test split", [names[place] for place in shown], cells, notes)


def show(comparison: Comparison, console: Console) -> None:
    """Print a comparison."""
    shown = as_table(comparison)
    columns = (Column(name, no_wrap=place > 0) for place, name in enumerate(shown.head))
    table = RichTable(*columns, box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    between = " (" if console.width >= WIDE else "\n("  # a narrow terminal has intervals below their estimates
    for cells in shown.rows:
        table.add_row(*(cell.replace(" (", between) for cell in cells))
    console.print(table)
    console.print()
    for line in _remarks(comparison):
        console.print(f"· {line}", highlight=False)
    console.print(f"[bold]{comparison.verdict}.[/]", highlight=False)
    console.print(f"[dim]{footer(comparison)}[/]", highlight=False)


def _remarks(comparison: Comparison) -> list[str]:
    return [
        *(pair.verdict for pair in comparison.pairwise),
        *(f"careful: {warning}" for warning in comparison.warnings),
    ]


def head(comparison: Comparison) -> list[str]:
    """Return the heads of the columns."""
    unit = ", %" if comparison.kind.is_share else ""
    return [each.format(first=comparison.arms[0].name, unit=unit) for each in HEAD]


def rows(comparison: Comparison) -> Iterator[tuple[str, ...]]:
    """Yield the cells of the table: before, a line per arm, and the ceiling."""
    scale = comparison.kind.scale
    empty = ("",) * (len(HEAD) - 3)
    if comparison.before is not None:
        yield ("before", "", as_estimate(comparison.before, scale), *empty)
    pairs = {pair.other: pair for pair in comparison.pairwise}
    for arm in comparison.arms:
        yield (*_arm(arm, scale), *_pair(pairs.get(arm.name), scale))
    if comparison.ceiling is not None:
        yield ("ceiling", "", as_estimate(comparison.ceiling, scale), *empty)


def _arm(arm: Arm, scale: int) -> tuple[str, ...]:
    gain = "" if arm.gain is None else as_change(arm.gain, scale)
    seeds = ", ".join(str(run.seed) for run in arm.runs)
    spread = "?" if arm.spread.deviation is None else f"{scale * arm.spread.deviation:.1f}"
    drift = "" if arm.drift is None else f"{arm.drift:.3f}"
    return arm.name, seeds, as_estimate(arm.after, scale), gain, spread, drift


def _pair(pair: Pairwise | None, scale: int) -> tuple[str, str]:
    if pair is None:
        return "", ""
    return as_change(pair.difference, scale), f"{pair.p_value:.3f}" if pair.p_value >= 0.001 else "< 0.001"


def footer(comparison: Comparison) -> str:
    """Return what the columns mean."""
    unit = "points" if comparison.kind.is_share else "tokens"
    n = comparison.arms[0].after.n
    return (
        f"{comparison.metric} on {n} questions, grader {comparison.grader}, 95 % intervals over questions (differences "
        f"paired); differences in {unit}. sd: standard deviation over seeds. drift: KL(before ‖ now), nats per token "
        "on neutral prompts. p: of no difference between the models of these seeds, adjusted for the number of arms "
        "(Holm). ceiling: the teacher with its context"
    )


def markdown(comparison: Comparison) -> str:
    """Return the table and the verdicts as Markdown."""
    lines = [f"| {' | '.join(head(comparison))} |", f"|{'---|' * len(HEAD)}"]
    lines += [f"| {' | '.join(cells)} |" for cells in rows(comparison)]
    lines += ["", *(f"- {line}" for line in _remarks(comparison))]
    return "\n".join([*lines, "", f"{comparison.verdict}. {footer(comparison)}.", ""])
