"""`opsd eval MODEL --dataset_name ROWS --grader last_number`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table


def make_parser() -> argparse.ArgumentParser:
    """Return the options of `opsd eval`."""
    parser = argparse.ArgumentParser(
        prog="opsd eval",
        description="Grade a model's greedy answers on a dataset. With --context it is the ceiling: the same model, "
        "shown what the teacher is shown.",
        epilog="Example: opsd eval runs/first --dataset_name test.jsonl --grader last_number --context answer_only",
    )
    parser.add_argument("model", help="a folder or a hub id; a folder with an adapter is loaded on its base")
    parser.add_argument("--dataset_name", required=True, help="a file, a folder or a hub id")
    parser.add_argument("--dataset_split", default="train", help="split (default: train, which a file has)")
    parser.add_argument("--grader", required=True, help="exact, last_number, contains, … or module:function")
    parser.add_argument("--answer_column", default="answer", help="column with the right answer (default: answer)")
    parser.add_argument("--context", help="template to show the model: a name or a path")
    parser.add_argument(
        "--chat_template_kwargs", type=json.loads, default={}, metavar="JSON", help='such as {"enable_thinking": false}'
    )
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--limit", type=int, help="only the first so many rows")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that came with the model")
    parser.add_argument("--output", metavar="FILE.jsonl", help="write every answer and its grade")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Evaluate and print a table."""
    options = make_parser().parse_args(arguments)
    from opsd.context import PrivilegedContext
    from opsd.data import load_rows, prepare_rows, row_columns
    from opsd.evaluation import evaluate, load_grader
    from opsd.models import load_model
    from opsd.prompts import PromptRenderer

    grader = load_grader(options.grader, options.answer_column)
    dataset = prepare_rows(load_rows(options.dataset_name, split=options.dataset_split), name=options.dataset_name)
    context = PrivilegedContext.of(options.context)
    if context is not None:
        context.check_columns(row_columns(dataset))
    rows = list(dataset)[: options.limit]
    model, tokenizer = load_model(options.model, trust_remote_code=options.trust_remote_code)
    renderer = PromptRenderer(tokenizer, None, options.chat_template_kwargs)
    console = Console()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("answering", total=len(rows))
        result = evaluate(
            model,
            rows,
            tokenizer,
            prompt_ids=lambda row: context.render(row, side=renderer) if context else renderer.ids(row["prompt"]),
            grader=grader,
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
            progress=lambda done: progress.update(task, completed=done),
        )
    low, high = result.interval
    table = Table("model", "shown", "n", "right", "95 % interval", "cut off", box=None, header_style="bold")
    shown = context.name if context else "the prompt"
    table.add_row(
        options.model, shown, str(result.n), f"{result.accuracy:.1%}", f"{low:.1%} to {high:.1%}", str(result.truncated)
    )
    console.print(table)
    console.print(f"grader: {options.grader}; greedy; interval: Wilson")
    if result.ungraded:
        console.print(
            f"[bold]{len(result.ungraded)} row(s) could not be graded[/] and count as wrong: {result.ungraded[:5]}"
        )
    if options.output:
        lines = [
            json.dumps({"row": i, "text": text, "correct": correct}, ensure_ascii=False)
            for i, (text, correct) in enumerate(zip(result.texts, result.correct, strict=True))
        ]
        Path(options.output).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0
