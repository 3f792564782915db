"""`opsd eval MODEL --dataset_name ROWS --grader last_number`, or `opsd eval MODEL --harness TASKS`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from opsd.errors import ConfigError, as_count

if TYPE_CHECKING:
    from opsd.evaluation.result import EvaluationResult


def make_parser() -> argparse.ArgumentParser:
    """Return the options of `opsd eval`."""
    parser = argparse.ArgumentParser(
        prog="opsd eval",
        description="Grade a model's answers on a dataset: greedy ones, and with --samples several sampled ones per "
        "question. With --context it is the ceiling: the same model, shown what the teacher is shown. With --harness "
        "the lm-evaluation-harness asks its own tasks instead (pip install 'opsd[harness]').",
        epilog="Examples: opsd eval runs/first --dataset_name test.jsonl --grader last_number --samples 8   ·   "
        "opsd eval runs/first/checkpoint-50 …   ·   opsd eval org/model --harness gsm8k,ifeval --limit 100",
    )
    parser.add_argument("model", help="a run's folder, one of its checkpoints, a model or adapter folder, or a hub id")
    parser.add_argument("--dataset_name", help="a file, a folder or a hub id")
    parser.add_argument("--dataset_split", default="train", help="split (default: train, which a file has)")
    parser.add_argument(
        "--grader",
        help="exact, last_number, contains, choice, math, regex:PATTERN, reasoning_gym:DATASET, or module:function",
    )
    parser.add_argument("--answer_column", default="answer", help="column with the right answer (default: answer)")
    parser.add_argument("--context", help="template to show the model: a name, a path, or a JSON mapping of settings")
    parser.add_argument(
        "--chat_template_kwargs", type=json.loads, default={}, metavar="JSON", help='such as {"enable_thinking": false}'
    )
    parser.add_argument("--samples", type=int, default=0, help="sampled answers per question beside the greedy one")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the sampled answers (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    parser.add_argument(
        "--metrics", help="comma-separated: accuracy, avg@8, pass@4, maj@8, format, length, truncated (default: all)"
    )
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--limit", type=int, help="only the first so many rows")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that came with the model")
    parser.add_argument("--output", metavar="FILE.json", help="write every answer and its grade, for `opsd compare`")
    parser.add_argument("--harness", metavar="TASKS", help="comma-separated tasks of the lm-evaluation-harness")
    parser.add_argument("--harness_path", metavar="FOLDER", help="folder with tasks of your own for --harness")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Evaluate and print a table."""
    options = make_parser().parse_args(arguments)
    if options.harness:
        return _with_harness(options)
    for name in ("dataset_name", "grader"):
        if getattr(options, name) is None:
            raise ConfigError(
                f"opsd eval needs --{name}: a figure means nothing without its questions and its grader. Or name tasks "
                "of the lm-evaluation-harness: --harness gsm8k."
            )
    result = _answered(options)
    console = Console()
    console.print(_table(result, options))
    how = f"greedy{f'; {result.samples} samples at temperature {result.temperature:g}' if result.samples else ''}"
    console.print(f"grader: {result.grader}; shown: {result.shown}; {how}; 95 % intervals over {result.n} questions")
    if result.ungraded:
        console.print(
            f"[bold]{len(result.ungraded)} question(s) have an answer that the grader failed on[/] (first: "
            f"{result.ungraded[:5]}); it counts as wrong, so the figures are lower bounds"
        )
    if options.output:
        result.save(Path(options.output))
    return 0


def _answered(options: argparse.Namespace) -> EvaluationResult:
    from opsd.contexts.reading import parse_context
    from opsd.contexts.renderer import PromptRenderer
    from opsd.data.rows import load_rows, prepare_rows, row_columns, with_system_prompt
    from opsd.evaluation import evaluate, load_grader, sampler_of, stop_ids_of
    from opsd.evaluation.sample_metrics import parse_metric
    from opsd.models.loading import load_model
    from opsd.training.checkpoints import model_folder
    from opsd.training.run_card import settings_of

    grader = load_grader(options.grader, options.answer_column)
    for name in _metrics(options):
        _, k = parse_metric(name)
        if (k or 0) > options.samples:
            raise ConfigError(f"{name} needs {k} sampled answers per question; --samples is {options.samples}.")
    dataset = prepare_rows(load_rows(options.dataset_name, split=options.dataset_split), name=options.dataset_name)
    context = parse_context(options.context)
    if context is not None:
        context.check_columns(row_columns(dataset))
    folder = model_folder(options.model)
    trained = settings_of(folder)
    dataset = with_system_prompt(dataset, trained.get("student_system_prompt"))
    rows = list(dataset)[: None if options.limit is None else as_count("limit", options.limit)]
    model, tokenizer = load_model(folder, trust_remote_code=options.trust_remote_code)
    kwargs = {**(trained.get("chat_template_kwargs") or {}), **options.chat_template_kwargs}
    renderer = PromptRenderer(tokenizer, None, kwargs)

    def prompt_ids(row: Any) -> list[int]:
        return context.render(row, renderer=renderer) if context else renderer.ids(row["prompt"])

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("answering", total=len(rows) * (1 + max(options.samples, 0)))
        return evaluate(
            sampler_of(model, tokenizer, prompt_ids),
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
            shown=context.name if context else "the prompt",
        )


def _metrics(options: argparse.Namespace) -> list[str]:
    return [name.strip() for name in options.metrics.split(",")] if options.metrics else []


def _table(result: EvaluationResult, options: argparse.Namespace) -> Table:
    from opsd.evaluation.sample_metrics import meaning_of
    from opsd.evaluation.summary import as_words

    table = Table(result.model, "", "95 % interval", "", box=None, header_style="bold", pad_edge=False)
    for name in _metrics(options) or result.usual_metrics:
        metric = meaning_of(name)
        value, interval = as_words(result.estimate(name), metric.is_share)
        table.add_row(name, value, interval, f"[dim]{metric.meaning}[/]")
    return table


def _with_harness(options: argparse.Namespace) -> int:
    from opsd.evaluation.harness import as_table, run_harness
    from opsd.training.checkpoints import model_folder

    tasks = [name.strip() for name in options.harness.split(",") if name.strip()]
    result = run_harness(
        model_folder(options.model),
        tasks,
        limit=options.limit,
        batch_size=options.batch_size,
        include_path=options.harness_path,
        chat_template_kwargs=options.chat_template_kwargs,
        trust_remote_code=options.trust_remote_code,
        seed=options.seed,
    )
    Console().print(as_table(result))
    return 0
