"""`opsd show CONFIG.yaml`: prints the prompts of student and teacher, and the tokens that are scored."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.columns import Columns
from rich.console import Console, Group
from rich.panel import Panel
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from opsd.commands.build import rows_of
from opsd.commands.run_file import Run, read_run
from opsd.contexts.base import ROLLOUT_FIELDS
from opsd.contexts.completions import completion_ids, end_of_answer, ended_ids
from opsd.contexts.reading import parse_context
from opsd.contexts.renderer import PromptRenderer
from opsd.data.prepare import prepare_rows
from opsd.data.rows import completion_of
from opsd.errors import ConfigError
from opsd.health.text import printable
from opsd.models.loading import load_tokenizer
from opsd.teachers import Teacher, load_teacher
from opsd.training.controls import control_of
from opsd.training.groups import placeholders

NARROW = 50  # columns; prompts in narrower panels are stacked
BOUNDARY = " ▏"
SHADES = ("on grey15", "on grey27")  # of neighbouring tokens, so that their edges are visible


def make_parser() -> argparse.ArgumentParser:
    """Return the options of `opsd show`."""
    parser = argparse.ArgumentParser(
        prog="opsd show",
        description="Print the prompts of student and teacher for a row side by side, as text and as tokens. ▏ marks "
        "the boundary between prompt and completion. Underlined tokens are scored, with the same ids on both sides.",
        epilog="Examples: opsd show run.yaml    ·    opsd show --model_name_or_path M --dataset_name rows.jsonl "
        "--context hint --completion 'It is 19.'    ·    opsd show run.yaml --context answer_only ./my.jinja --row 0 7",
    )
    parser.add_argument("config", nargs="?", help="a run's YAML file; options win over it")
    parser.add_argument(
        "--model_name_or_path", help="a model; its tokenizer and chat template are used, no weights load"
    )
    parser.add_argument("--dataset_name", help="a file, a folder or a hub id")
    parser.add_argument("--teacher", help="a recipe's name or path; its context is used")
    parser.add_argument(
        "--context",
        nargs="+",
        metavar="TEMPLATE",
        help="templates' names, paths, mappings as JSON, or none; several are compared",
    )
    parser.add_argument("--control", help="print the prompts under a control of the run, such as wrong-context")
    parser.add_argument("--row", nargs="+", type=int, default=[0], metavar="N", help="row numbers (default: 0)")
    parser.add_argument("--completion", help="the completion (default: the row's, else a placeholder)")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Print both prompts of each row."""
    options = make_parser().parse_args(arguments)
    run, teachers = _settings(options)
    rollout_fields = ROLLOUT_FIELDS if run.run.reward_funcs else ()
    dataset = prepare_rows(
        rows_of(run, run.run.dataset_train_split),
        name=run.run.dataset_name or "",
        system_prompt=run.args.student_system_prompt,
        reads={name for teacher in teachers for context in teacher.prompts.contexts for name in context.columns},
        needs=[need for teacher in teachers for need in teacher.prompts.needs(rollout_fields)],
    )
    rows = dataset if isinstance(dataset, Dataset) else list(islice(iter(dataset), max(options.row) + 1))
    for number in options.row:
        if not 0 <= number < len(rows):
            raise ConfigError(f"the dataset has rows 0 to {len(rows) - 1}, and row {number} was asked for.")
    tokenizer = load_tokenizer(
        run.model.model_name_or_path or "",
        revision=run.model.model_revision,
        trust_remote_code=run.args.trust_remote_code,
    )
    renderer = PromptRenderer(tokenizer, None, run.args.chat_template_kwargs or {})
    console = Console()
    for number in options.row:
        row = rows[number]
        completion, origin = _completion(options.completion, row, renderer)
        sides = [("student", renderer.ids(row["prompt"]))]
        sides += [side for teacher in teachers for side in _teacher_sides(teacher, row, renderer, rollout_fields)]
        _show_row(console, tokenizer, sides, completion)
        lengths = ", ".join(f"{title} {len(ids)}" for title, ids in sides)
        scored = f"{len(completion)} tokens are scored on both sides ({origin})"
        console.print(f"row {number}, tokens of the prompt: {lengths}; {scored}.")
    return 0


def _show_row(
    console: Console, tokenizer: PreTrainedTokenizerBase, sides: Sequence[tuple[str, list[int]]], completion: list[int]
) -> None:
    beside = console.width // min(len(sides), 3) - 1
    width = beside if beside >= NARROW else console.width
    for as_tokens in (False, True):
        panels = [
            Panel(_render(tokenizer, ids, completion, as_tokens), title=title, width=width) for title, ids in sides
        ]
        console.print(Columns(panels) if width == beside else Group(*panels))


def _teacher_sides(
    teacher: Teacher, row: Mapping[str, Any], renderer: PromptRenderer, names: Sequence[str]
) -> list[tuple[str, list[int]]]:
    """Return title and prompt of every teacher that scores this row."""
    rollout_fields = placeholders(names, row)
    sides = []
    for leaf in teacher.prompts.leaves_of(row):
        context = leaf.context
        ids = context.render(row, rollout_fields, renderer=renderer) if context else renderer.ids(row["prompt"])
        sides.append((f"teacher (context: {leaf.describe()})", ids))
    return sides


def _settings(options: argparse.Namespace) -> tuple[Run, list[Teacher]]:
    """Return the run as `opsd train` reads it, and its teacher with each context; no weights load."""
    names = ("model_name_or_path", "dataset_name", "teacher", "control")
    overrides = [part for n in names if (value := getattr(options, n)) for part in (f"--{n}", value)]
    run = read_run(Path(options.config) if options.config else None, overrides)
    if not options.context:
        teacher, control = load_teacher(run.run.teacher, context=run.run.context), control_of(run.args.control)
        return run, [control.teacher(teacher) if control else teacher]
    teacher = load_teacher(run.run.teacher)
    return run, [teacher.copy_with(teacher.prompts.with_context(parse_context(text))) for text in options.context]


def _completion(given: str | None, row: Mapping[str, Any], renderer: PromptRenderer) -> tuple[list[int], str]:
    of_row = completion_of(row)
    if given is None and of_row is not None:
        ids = of_row if isinstance(of_row, list) else completion_ids(renderer, row["prompt"], of_row)
        return ids, "the row's completion"
    end = end_of_answer(renderer, row["prompt"])
    return ended_ids(renderer, given or "(the rollout)", end), "given" if given else "a placeholder"


def _render(tokenizer: PreTrainedTokenizerBase, prompt: list[int], completion: list[int], as_tokens: bool) -> Text:
    text = Text()
    for part, style in ((prompt, "dim" if not as_tokens else ""), (completion, "bold underline")):
        if part is completion:
            text.append(BOUNDARY, "bold red")
        if not as_tokens:
            text.append(printable(tokenizer.decode(part), keep="\n"), style)
            continue
        for i, token in enumerate(part):
            shown = printable(tokenizer.decode([token]), keep="\n").replace("\n", "⏎\n")
            text.append(shown, f"{style} {SHADES[i % 2]}".strip())
    return text
