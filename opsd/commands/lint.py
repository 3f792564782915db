"""`opsd lint FILE…`: checks templates before they are used."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from opsd.commands.doctor import print_finding
from opsd.contexts.lint import lint
from opsd.findings import Examination

ROWS = 16


def make_parser() -> argparse.ArgumentParser:
    """Return the options of `opsd lint`."""
    parser = argparse.ArgumentParser(
        prog="opsd lint",
        description="Check templates: syntax and parents, the sandbox and limits of time and memory, columns that are "
        "missing, fields that are never printed, privileged text in the student's prompts or the assistant's turn, and "
        "markers that only the chat template may write. Exit status 1 if something fails.",
        epilog="Examples: opsd lint my.jinja    ·    opsd lint my.jinja --dataset_name rows.jsonl --model ./model",
    )
    parser.add_argument("templates", nargs="+", metavar="FILE", help="a path, or a shipped template's name")
    parser.add_argument("--columns", metavar="A,B", help="columns of the dataset")
    parser.add_argument("--dataset_name", help=f"a dataset; its first {ROWS} rows are rendered")
    parser.add_argument("--dataset_split", default="train", help="its split (default: train)")
    parser.add_argument("--model", help="a model; its tokenizer and chat template render the rows, no weights load")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Check every template; return 1 if one fails."""
    options = make_parser().parse_args(arguments)
    columns = None if options.columns is None else [c.strip() for c in options.columns.split(",")]
    rows, renderer = [], None
    if options.dataset_name:
        from opsd.data.files import load_rows
        from opsd.data.prepare import prepare_rows
        from opsd.data.rows import row_columns

        dataset = prepare_rows(load_rows(options.dataset_name, split=options.dataset_split), name=options.dataset_name)
        columns = [*row_columns(dataset), *(columns or [])]
        rows = list(dataset.take(ROWS))
    if options.model:
        from opsd.contexts.renderer import PromptRenderer
        from opsd.models.loading import load_tokenizer

        renderer = PromptRenderer(load_tokenizer(options.model))
    console, failed = Console(), False
    for template in options.templates:
        examination = Examination(lint(template, columns=columns, rows=rows, renderer=renderer))
        console.print(Text(template, "bold"))
        for finding in examination.findings:
            print_finding(finding, console)
        failed = failed or examination.failed
    return int(failed)
