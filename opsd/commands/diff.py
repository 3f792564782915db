"""`opsd diff RUN_A RUN_B`: what differs between two runs."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from opsd.health.text import printable

Differences = Iterable[tuple[str, Any, Any]]


def make_parser() -> argparse.ArgumentParser:
    """Return the options of `opsd diff`."""
    parser = argparse.ArgumentParser(
        prog="opsd diff",
        description="Compare two runs by their run cards: settings, teacher, contexts, prompts, hashes of data, "
        "tokenizer and templates, versions, hardware, seeds. Exit status 1 if they differ.",
        epilog="Example: opsd diff runs/first runs/second",
    )
    parser.add_argument("a", metavar="RUN_A", help="an output folder, or a run_card.json")
    parser.add_argument("b", metavar="RUN_B")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Print the differences; returns 1 if there are any, like diff."""
    options = make_parser().parse_args(arguments)
    from opsd.evaluation.run_folder import differences, read_card

    changed = differences(read_card(options.a), read_card(options.b))
    console = Console()
    if not changed:
        console.print("the two runs are the same, apart from paths and names")
        return 0
    long = [each for each in changed if any("\n" in str(value) for value in each[1:])]
    _print_values(options, [each for each in changed if each not in long], console)
    _print_texts(long, console)
    return 1


def _print_values(options: argparse.Namespace, changed: Differences, console: Console) -> None:
    table = Table("", options.a, options.b, box=None, header_style="bold", pad_edge=False)
    for name, a, b in changed:
        table.add_row(name, _cell(a), _cell(b))
    if table.row_count:
        console.print(table)


def _print_texts(changed: Differences, console: Console) -> None:
    """Print texts of several lines as a unified diff."""
    for name, a, b in changed:
        console.print(Text(f"\n{name}", "bold"))
        texts = (str(a or "").splitlines(), str(b or "").splitlines())
        for line in list(difflib.unified_diff(*texts, lineterm="", n=1))[3:]:
            console.print(Text(printable(line), "red" if line[0] == "-" else "green" if line[0] == "+" else "dim"))


def _cell(value: Any) -> Text:
    return Text("—" if value is None else printable(str(value), keep="\n"), overflow="fold")
