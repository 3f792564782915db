"""`opsd eval MODEL --dataset_name ROWS --grader last_number`: grade a model's answers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from opsd.errors import ConfigError
from opsd.settings import as_count

if TYPE_CHECKING:
    from opsd.contexts.base import Context
    from opsd.evaluation.result import EvaluationResult

HARNESS = (
    "--harness is not an option of opsd eval: a trained model is an ordinary checkpoint, and the lm-evaluation-harness "
    "reads it. Run `lm_eval --model hf --model_args pretrained=RUN --tasks gsm8k`, and for an "
    "adapter `--model_args pretrained=BASE,peft=RUN`."
)


def make_parser() -> argparse.ArgumentParser:
    """Return the options of `opsd eval`."""
    parser = argparse.ArgumentParser(
        prog="opsd eval",
        description="Grade a model's answers on a dataset: greedy answers, and with --samples several sampled answers "
        "per question. With --context the prompts contain the teacher's context: the accuracy is then the ceiling of a "
        "teacher with these weights.",
        epilog="Examples: opsd eval runs/first --dataset_name test.jsonl --grader last_number --samples 8   ·   "
        "opsd eval runs/first/checkpoint-50 …",
    )
    parser.add_argument("model", help="a run's folder, one of its checkpoints, a model or adapter folder, or a hub id")
    parser.add_argument("--dataset_name", help="a file, a folder or a hub id")
    parser.add_argument("--dataset_split", default="train", help="split (default: train, which a file has)")
    parser.add_argument(
        "--grader",
        help="exact, last_number, contains, choice, math, regex:PATTERN, reasoning_gym:DATASET, or module:function",
    )
    parser.add_argument("--answer_column", default="answer", help="column with the right answer (default: answer)")
    parser.add_argument("--context", help="template of the prompts: a name, a path, or a JSON mapping of settings")
    parser.add_argument(
        "--chat_template_kwargs", type=json.loads, default={}, metavar="JSON", help='such as {"enable_thinking": false}'
    )
    parser.add_argument("--samples", type=int, default=0, help="sampled answers per question beside the greedy one")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the sampled answers (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampled answers (default: 0)")
    parser.add_argument(
        "--metrics", help="comma-separated: accuracy, avg@8, pass@4, maj@8, format, length, truncated (default: all)"
    )
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer, in tokens (default: 256)")
    parser.add_argument("--batch_size", type=int, default=32, help="answers per forward pass (default: 32)")
    parser.add_argument("--limit", type=int, help="only the first so many rows")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that came with the model")
    parser.add_argument("--output", metavar="FILE.json", help="write every answer and its grade, for `opsd compare`")
    parser.add_argument("--harness", help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Evaluate and print a table."""
    options = make_parser().parse_args(arguments)
    if options.harness:
        raise ConfigError(HARNESS)
    for name in ("dataset_name", "grader"):
        if getattr(options, name) is None:
            raise ConfigError(f"opsd eval needs --{name}: an accuracy depends on its questions and its grader.")
    result = _evaluated(options)
    console = Console()
    console.print(_table(result, options))
    sampled = f"; {result.samples} samples at temperature {result.temperature:g}" if result.samples else ""
    console.print(
        f"grader: {result.grader}; context: {result.context}; greedy{sampled}; 95 % intervals over {result.n} questions"
    )
    if result.ungraded:
        console.print(
            f"[bold]{len(result.ungraded)} question(s) have an answer that the grader failed on[/] (first: "
            f"{result.ungraded[:5]}). These answers count as wrong: the figures are lower bounds"
        )
    if options.output:
        result.save(Path(options.output))
    return 0


def _evaluated(options: argparse.Namespace) -> EvaluationResult:
    from opsd.contexts.renderer import PromptRenderer
    from opsd.evaluation import evaluate, generate_with, load_grader, stop_ids_of
    from opsd.evaluation.run_folder import settings_of
    from opsd.models.loading import load_model
    from opsd.training.checkpoints import model_folder

    grader = load_grader(options.grader, options.answer_column)
    _check_samples(options)
    folder = model_folder(options.model)
    trained = settings_of(folder)
    rows, context = _rows_and_context(options, trained.get("student_system_prompt"))
    model, tokenizer = load_model(folder, trust_remote_code=options.trust_remote_code)
    kwargs = {**(trained.get("chat_template_kwargs") or {}), **options.chat_template_kwargs}
    renderer = PromptRenderer(tokenizer, None, kwargs)

    def prompt_ids(row: Mapping[str, Any]) -> list[int]:
        return context.render(row, renderer=renderer) if context else renderer.ids(row["prompt"])

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("answering", total=len(rows) * (1 + max(options.samples, 0)))
        return evaluate(
            generate_with(model, tokenizer, prompt_ids),
            rows,
            tokenizer,
            grader=grader,
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
            stop_ids=stop_ids_of(model, tokenizer),
            samples=options.samples,
            temperature=options.temperature,
            seed=options.seed,
            progress=lambda done: progress.update(task, completed=done),
            model=folder,
            context=context.name if context else "none",
        )


def _rows_and_context(
    options: argparse.Namespace, system_prompt: str | None
) -> tuple[list[Mapping[str, Any]], Context | None]:
    from opsd.contexts.reading import parse_context
    from opsd.data.files import load_rows
    from opsd.data.needs import check_columns
    from opsd.data.prepare import prepare_rows
    from opsd.data.rows import row_columns

    loaded = load_rows(options.dataset_name, split=options.dataset_split)
    dataset = prepare_rows(loaded, name=options.dataset_name, system_prompt=system_prompt)
    context = parse_context(options.context)
    if context is not None:
        check_columns(row_columns(dataset), context.needs, options.dataset_name)
    rows = list(dataset)
    return rows[: None if options.limit is None else as_count("limit", options.limit)], context


def _metrics(options: argparse.Namespace) -> list[str]:
    return [name.strip() for name in options.metrics.split(",")] if options.metrics else []


def _check_samples(options: argparse.Namespace) -> None:
    from opsd.evaluation.sample_metrics import parse_metric

    for name in _metrics(options):
        _, k = parse_metric(name)
        if (k or 0) > options.samples:
            raise ConfigError(f"{name} needs {k} sampled answers per question; --samples is {options.samples}.")


def _table(result: EvaluationResult, options: argparse.Namespace) -> Table:
    from opsd.evaluation.sample_metrics import meaning_of
    from opsd.evaluation.summary import as_text

    table = Table(result.model, "", "95 % interval", "", box=None, header_style="bold", pad_edge=False)
    for name in _metrics(options) or result.usual_metrics:
        metric = meaning_of(name)
        value, interval = as_text(result.estimate(name), metric.is_share)
        table.add_row(name, value, interval, f"[dim]{metric.meaning}[/]")
    return table
