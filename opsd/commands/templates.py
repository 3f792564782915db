"""`opsd templates [--columns a,b]`: lists the shipped templates and their columns."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from opsd import sources
from opsd.contexts.privileged import PrivilegedContext


def main(arguments: Sequence[str]) -> int:
    """List the shipped templates."""
    parser = argparse.ArgumentParser(
        prog="opsd templates",
        description="List the shipped templates, which insert columns into the teacher's prompt, and their columns.",
        epilog="Copy one and edit it: opsd cp answer_only .",
    )
    parser.add_argument("--columns", metavar="A,B", help="list only templates that these columns fill")
    options = parser.parse_args(arguments)
    columns = None if options.columns is None else [c.strip() for c in options.columns.split(",")]
    table = Table("template", "needs", "may use", box=None, header_style="bold", pad_edge=False)
    for name in sources.names("templates"):
        if name == "base":
            continue
        context = PrivilegedContext(name)
        if columns is not None and context.missing(columns):
            continue
        table.add_row(name, ", ".join(sorted(context.fields)) or "—", ", ".join(sorted(context.optional_fields)) or "—")
    console = Console()
    if table.row_count:
        console.print(table)
    else:
        console.print(
            f"no shipped template fits the columns {', '.join(columns or [])}; write one: templates/README.md"
        )
    return 0
