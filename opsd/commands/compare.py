"""`opsd compare RUNS…`: did the method beat its controls, and how sure is that?"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from opsd.evaluation.compare import Arm, Comparison, Pairwise
    from opsd.evaluation.statistics import Estimate, PairedDifference

HEAD = ("", "seeds", "after{unit}", "gain", "sd", "drift", "{first} minus it", "p")


def make_parser() -> argparse.ArgumentParser:
    """Return the options of `opsd compare`."""
    parser = argparse.ArgumentParser(
        prog="opsd compare",
        description="Compare runs on the same held-out questions: the method with its controls, each with its seeds. "
        "Runs that differ in nothing but seed and training questions are one arm. Intervals over questions (95 %, "
        "paired) say what other questions might have shown; the spread over seeds what another seed might have.",
        epilog="Example: opsd compare runs/method-* runs/wrong-context-* runs/sft-*",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="output folders of runs that had an `evaluation:`")
    parser.add_argument(
        "--metric", default="accuracy", help="accuracy (default), avg@k, pass@k, maj@k, format, length, truncated"
    )
    parser.add_argument("--json", metavar="FILE", help="write the comparison")
    parser.add_argument("--markdown", metavar="FILE", help="write the table for a README")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Print a table, and what it comes to."""
    options = make_parser().parse_args(arguments)
    from opsd.evaluation.compare import as_json, compare, read_runs
    from opsd.evaluation.run_folder import write_json, write_whole

    found = compare(read_runs(options.runs), options.metric)
    console = Console()
    table = Table(*head(found), box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for cells in rows(found):
        table.add_row(*cells)
    console.print(table)
    console.print()
    for line in [*(each.words for each in found.versus), *(f"careful: {each}" for each in found.warnings)]:
        console.print(f"· {line}", highlight=False)
    console.print(f"[bold]{found.words}.[/]", highlight=False)
    console.print(f"[dim]{footer(found)}[/]", highlight=False)
    if options.json:
        write_json(Path(options.json), as_json(found))
    if options.markdown:
        write_whole(Path(options.markdown), markdown(found))
    return 0


def head(found: Comparison) -> list[str]:
    """Return the table's first line."""
    unit = ", %" if found.kind.is_share else ""
    return [each.format(first=found.arms[0].name, unit=unit) for each in HEAD]


def rows(found: Comparison) -> Iterator[tuple[str, ...]]:
    """Yield the cells of the table, a line per arm, with what is not an arm at its ends."""
    scale = found.kind.scale
    empty = ("",) * (len(HEAD) - 3)
    if found.before is not None:
        yield ("before", "", _estimate(found.before, scale), *empty)
    versus = {each.other: each for each in found.versus}
    for arm in found.arms:
        yield (*_arm(arm, scale), *_versus(versus.get(arm.name), scale))
    if found.ceiling is not None:
        yield ("ceiling", "", _estimate(found.ceiling, scale), *empty)


def _arm(arm: Arm, scale: int) -> tuple[str, ...]:
    gain = "" if arm.gain is None else _change(arm.gain, scale)
    seeds = ", ".join(str(run.seed) for run in arm.runs)
    spread = "?" if arm.spread.deviation is None else f"{scale * arm.spread.deviation:.1f}"
    drift = "" if arm.drift is None else f"{arm.drift:.3f}"
    return arm.name, seeds, _estimate(arm.after, scale), gain, spread, drift


def _versus(found: Pairwise | None, scale: int) -> tuple[str, str]:
    if found is None:
        return "", ""
    return _change(found.difference, scale), f"{found.p_value:.3f}" if found.p_value >= 0.001 else "< 0.001"


def _estimate(found: Estimate, scale: int) -> str:
    ends = "" if found.low is None or found.high is None else f" ({scale * found.low:.1f} to {scale * found.high:.1f})"
    return f"{scale * found.value:.1f}{ends}"


def _change(found: PairedDifference, scale: int) -> str:
    return f"{scale * found.difference:+.1f} ({scale * found.low:+.1f} to {scale * found.high:+.1f})"


def footer(found: Comparison) -> str:
    """Return how to read the table."""
    unit = "points" if found.kind.is_share else "tokens"
    n = found.arms[0].after.n
    return (
        f"{found.metric} on {n} questions, grader {found.grader}, 95 % intervals over questions (differences paired); "
        f"differences in {unit}. sd: over seeds. drift: KL(before ‖ now), nats per token on neutral prompts. p: of no "
        "difference between the models of these seeds, adjusted for the number of arms (Holm). ceiling: the teacher "
        "with its context"
    )


def markdown(found: Comparison) -> str:
    """Return the table and its words as Markdown."""
    lines = [f"| {' | '.join(head(found))} |", f"|{'---|' * len(HEAD)}"]
    lines += [f"| {' | '.join(cells)} |" for cells in rows(found)]
    lines += ["", *(f"- {each.words}" for each in found.versus), *(f"- careful: {each}" for each in found.warnings)]
    return "\n".join([*lines, "", f"{found.words}. {footer(found)}.", ""])
