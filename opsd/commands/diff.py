"""`opsd diff RUN_A RUN_B`: what differs between two runs."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from opsd.evaluation.run_folder import differences, read_card


def main(arguments: Sequence[str]) -> int:
    """Print what differs; returns 1 if anything does, like diff."""
    parser = argparse.ArgumentParser(
        prog="opsd diff",
        description="Compare two runs by their run cards: settings, teacher, contexts, prompts, hashes of data, "
        "tokenizer and templates, versions, hardware, seeds. Exit status 1 if they differ.",
        epilog="Example: opsd diff runs/first runs/second",
    )
    parser.add_argument("a", metavar="RUN_A", help="an output folder, or a run_card.json")
    parser.add_argument("b", metavar="RUN_B")
    options = parser.parse_args(arguments)
    found = differences(read_card(options.a), read_card(options.b))
    console = Console()
    if not found:
        console.print("the two runs are the same, but for where they were written")
        return 0
    table = Table("", options.a, options.b, box=None, header_style="bold", pad_edge=False)
    long = [(name, a, b) for name, a, b in found if any("\n" in str(value) for value in (a, b))]
    for name, a, b in found:
        if (name, a, b) not in long:
            table.add_row(name, _shown(a), _shown(b))
    if table.row_count:
        console.print(table)
    for name, a, b in long:
        console.print(Text(f"\n{name}", "bold"))
        for line in _changed_lines(str(a or ""), str(b or "")):
            console.print(Text(line, "red" if line[0] == "-" else "green" if line[0] == "+" else "dim"))
    return 1


def _shown(value: Any) -> Text:
    return Text("—" if value is None else str(value), overflow="fold")


def _changed_lines(a: str, b: str) -> Iterable[str]:
    return list(difflib.unified_diff(a.splitlines(), b.splitlines(), lineterm="", n=1))[3:]
