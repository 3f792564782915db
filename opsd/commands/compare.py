"""`opsd compare RUNS…`: did the method beat its controls, and how sure is that?"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from opsd.evaluation.compare import Arm, Comparison, Versus
    from opsd.evaluation.statistics import Estimate

HEAD = ("", "seeds", "after", "gain over before", "sd over seeds", "drift", "{first} minus it", "over seeds", "p")


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

    found = compare(read_runs(options.runs), options.metric)
    console = Console()
    first = found.arms[0].name
    table = Table(*(head.format(first=first) for head in HEAD), box=None, header_style="bold", pad_edge=False)
    for cells in rows(found):
        table.add_row(*cells)
    console.print(table)
    console.print()
    for line in [*(each.words for each in found.versus), *(f"careful: {each}" for each in found.warnings)]:
        console.print(f"· {line}", highlight=False)
    console.print(f"[bold]{found.words}.[/]", highlight=False)
    console.print(f"[dim]{footer(found)}[/]", highlight=False)
    if options.json:
        Path(options.json).write_text(json.dumps(as_json(found), indent=1, ensure_ascii=False) + "\n", "utf-8")
    if options.markdown:
        Path(options.markdown).write_text(markdown(found), "utf-8")
    return 0


def rows(found: Comparison) -> Iterator[tuple[str, ...]]:
    """Yield the cells of the table, a line per arm, with what is not an arm at its ends."""
    is_share = found.kind.is_share
    empty = ("",) * (len(HEAD) - 3)
    if found.before is not None:
        yield ("student before", "", _estimate(found.before, is_share), *empty)
    versus = {each.other: each for each in found.versus}
    for arm in found.arms:
        yield (*_arm(arm, is_share), *_versus(versus.get(arm.name), is_share))
    if found.ceiling is not None:
        yield ("teacher with its context", "", _estimate(found.ceiling, is_share), *empty)


def _arm(arm: Arm, is_share: bool) -> tuple[str, ...]:
    gain = "" if arm.gain is None else _change(arm.gain.difference, arm.gain.low, arm.gain.high, is_share)
    seeds = ", ".join(str(run.seed) for run in arm.runs)
    spread = "one seed" if arm.spread.deviation is None else f"{_number(arm.spread.deviation, is_share)}"
    drift = "" if arm.drift is None else f"{arm.drift:.3f}"
    return arm.name, seeds, _estimate(arm.after, is_share), gain, spread, drift


def _versus(found: Versus | None, is_share: bool) -> tuple[str, str, str]:
    if found is None:
        return "", "", ""
    by_seed = found.spread
    over = "" if by_seed.low is None or by_seed.high is None else _range(by_seed.low, by_seed.high, is_share)
    change = _change(found.difference.difference, found.difference.low, found.difference.high, is_share)
    return change, over, f"{found.p_value:.3f}" if found.p_value >= 0.001 else "< 0.001"


def _estimate(found: Estimate, is_share: bool) -> str:
    from opsd.evaluation.summary import as_words

    value, ends = as_words(found, is_share)
    return f"{value} ({ends})" if ends else value


def _number(value: float, is_share: bool) -> str:
    return f"{100 * value:.1f}" if is_share else f"{value:.1f}"


def _range(low: float, high: float, is_share: bool) -> str:
    scale = 100 if is_share else 1
    return f"{scale * low:+.1f} to {scale * high:+.1f}"


def _change(value: float, low: float, high: float, is_share: bool) -> str:
    scale = 100 if is_share else 1
    return f"{scale * value:+.1f} ({_range(low, high, is_share)})"


def footer(found: Comparison) -> str:
    """Return how to read the table."""
    unit = "points" if found.kind.is_share else "tokens"
    n = found.arms[0].after.n
    return (
        f"{found.metric} on {n} questions, grader {found.grader}; differences in {unit}, paired by question and seed, "
        "95 % by bootstrap over questions; over seeds: Student's t; drift: KL(before ‖ now), nats per token, neutral "
        "prompts; p: adjusted for the number of arms (Holm)"
    )


def markdown(found: Comparison) -> str:
    """Return the table and its words as Markdown."""
    first = found.arms[0].name
    lines = [f"| {' | '.join(head.format(first=first) for head in HEAD)} |", f"|{'---|' * len(HEAD)}"]
    lines += [f"| {' | '.join(cells)} |" for cells in rows(found)]
    lines += ["", *(f"- {each.words}" for each in found.versus), *(f"- careful: {each}" for each in found.warnings)]
    return "\n".join([*lines, "", f"{found.words}. {footer(found)}.", ""])
