"""`opsd lint FILE…`: what is wrong with a template."""

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
        description="Check templates: syntax and parents, whether they stay within the sandbox and within limits of "
        "time and memory, names that no dataset has, fields that are never shown, what would leak into the student's "
        "side, and where the assistant's turn begins. Exit status 1 if something fails.",
        epilog="Examples: opsd lint my.jinja    ·    opsd lint my.jinja --dataset_name rows.jsonl --model ./model",
    )
    parser.add_argument("templates", nargs="+", metavar="FILE", help="a path, or a shipped template's name")
    parser.add_argument("--columns", metavar="A,B", help="columns of the dataset it is meant for")
    parser.add_argument("--dataset_name", help="a dataset, whose first rows are rendered")
    parser.add_argument("--dataset_split", default="train", help="its split (default: train)")
    parser.add_argument("--model", help="whose tokenizer and chat template it is rendered with (no weights are loaded)")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Check every template, and return 1 if one fails."""
    options = make_parser().parse_args(arguments)
    columns = None if options.columns is None else [c.strip() for c in options.columns.split(",")]
    rows, renderer = [], None
    if options.dataset_name:
        from opsd.data.rows import load_rows, prepare_rows, row_columns

        dataset = prepare_rows(load_rows(options.dataset_name, split=options.dataset_split), name=options.dataset_name)
        columns = [*row_columns(dataset), *(columns or [])]
        rows = list(dataset.take(ROWS))
    if options.model:
        from transformers import AutoTokenizer

        from opsd.contexts.renderer import PromptRenderer
        from opsd.models.loading import check_model_name

        renderer = PromptRenderer(AutoTokenizer.from_pretrained(check_model_name(options.model)))
    console, failed = Console(), False
    for template in options.templates:
        examination = Examination(lint(template, columns=columns, rows=rows, renderer=renderer))
        console.print(Text(template, "bold"))
        for finding in examination.findings:
            print_finding(finding, console)
        failed = failed or examination.failed
    return int(failed)
