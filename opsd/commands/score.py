"""`opsd score ROWS`: what teachers with contexts say of each token of a rollout, without a run."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opsd.errors import ConfigError

if TYPE_CHECKING:
    from opsd.commands.run_file import Run
    from opsd.contexts.base import Context
    from opsd.teachers import Teacher
    from opsd.training.score import Score

WORST = 5  # tokens of a rollout that are listed in a terminal
LEAST = 0.005  # nats of a listed token
LISTED = 3  # likeliest tokens of each side there


def make_parser() -> argparse.ArgumentParser:
    """Return the options of `opsd score`; every other option is a setting of a run."""
    parser = argparse.ArgumentParser(
        prog="opsd score",
        usage="opsd score ROWS|RUN.yaml [options] [--key value …]",
        allow_abbrev=False,
        description="Show why a teacher says what it says: score rows with any teachers and contexts, token by token, "
        "without training. A row's `completion` is what is scored; without one the student samples. Coloured tokens in "
        "the terminal, a page with both sides' likeliest tokens (--html), or Parquet (-o).",
        epilog="Examples: opsd score rows.jsonl --model_name_or_path M --context answer_only ./mine.jinja --html s.html"
        "  ·  opsd score run.yaml --row 3 7  ·  other settings as in a run: --beta 0 --max_completion_length 64",
    )
    add_rows(parser)
    parser.add_argument(
        "--teacher", nargs="+", help="recipes, model folders or hub ids (default: the run's, or itself)"
    )
    parser.add_argument(
        "--context", nargs="+", metavar="TEMPLATE", help="templates' names, paths, mappings as JSON, or none"
    )
    parser.add_argument("--row", nargs="+", type=int, default=[0], metavar="N", help="row numbers (default: 0)")
    parser.add_argument("--html", metavar="FILE.html", help="write the heat-map as a page")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE.parquet|FOLDER",
        help="write every token as Parquet; or, into a folder, the "
        "support_k likeliest tokens of all rows, for a cached teacher",
    )
    parser.add_argument("--terminal", action="store_true", help="print it also where a file is written")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Score, and show."""
    options, others = make_parser().parse_known_args(arguments)
    run, teachers, contexts = _settings(options, others)
    if options.output and Path(options.output).suffix != ".parquet":
        return _write_folder(options, run, teachers, contexts)
    rows = _rows(run, list(teachers.values()), contexts, options.row)
    from opsd.evaluation.run_folder import check_output
    from opsd.training.score import RolloutScorer

    for output in filter(None, (options.html, options.output)):
        check_output(Path(output))  # before minutes of scoring
    scorer = RolloutScorer(run.model.model_name_or_path or "", run.args, run.model.model_revision)
    scores = scorer.scores(rows, teachers, contexts)
    if options.terminal or not (options.html or options.output):
        _print(scores)
    if options.html:
        _write_page(Path(options.html), run, scores)
    if options.output:
        from opsd.health.traces import write_rollouts

        write_rollouts(
            Path(options.output), [(each.rollout, {"row": each.row, "teacher": each.teacher}) for each in scores]
        )
        print(f"scores      {options.output}")
    return 0


def _write_folder(
    options: argparse.Namespace, run: Run, teachers: Mapping[str, Teacher], contexts: Mapping[str, Context | None]
) -> int:
    """Write scores for a cached teacher."""
    from opsd.commands.score_store import write_scores
    from opsd.evaluation.run_folder import check_output

    if len(teachers) > 1 or len(contexts) > 1 or options.html or options.terminal:
        raise ConfigError(
            f"-o {options.output} is a folder of scores, which holds those of one teacher with one context, and no "
            "page. Name one of each; or name the output .parquet to compare several."
        )
    (teacher,) = teachers.values()
    for context in contexts.values():
        teacher.prompts = teacher.prompts.with_context(context)
    check_output(Path(options.output) / "manifest.json")
    rows = _rows(run, [teacher], {}, None)
    write_scores(run, teacher, list(rows.values()), Path(options.output))
    return 0


def _settings(
    options: argparse.Namespace, others: Sequence[str]
) -> tuple[Run, dict[str, Teacher], dict[str, Context | None]]:
    """Return the settings of a run, its teachers, and the contexts that were asked for; no weights load."""
    from opsd.contexts.reading import parse_context
    from opsd.teachers import load_teacher

    run = read_settings(options.rows, options.model_name_or_path, others)
    if run.args.control is not None:
        raise ConfigError(
            f"control is {run.args.control}, and opsd score trains nothing: a control changes what a run trains on. "
            "Leave it out; `opsd show --control` has the prompts of one."
        )
    context = None if options.context else run.run.context
    teachers = {given: load_teacher(given, context=context) for given in options.teacher or ()}
    teachers = teachers or {"teacher": load_teacher(run.run.teacher, context=context)}
    contexts = {text: None if text == "none" else parse_context(text) for text in options.context or ()}
    return run, teachers, contexts


def add_rows(parser: argparse.ArgumentParser) -> None:
    """Add the options that `read_settings` reads."""
    parser.add_argument("rows", metavar="ROWS|RUN.yaml", help="rows (.jsonl, .parquet, …, a hub id), or a run's YAML")
    parser.add_argument("--model_name_or_path", metavar="MODEL", help="the student")


def read_settings(rows: str, model: str | None, others: Sequence[str]) -> Run:
    """Return the settings of a command on rows: those of a run file, or of a file of rows and a model.

    Args:
        rows: rows, or a run's YAML.
        model: the student, where it is not the run's.
        others: settings as options.
    """
    from opsd.commands.run_file import read_run

    is_run = Path(rows).suffix in (".yaml", ".yml")
    given = ["--model_name_or_path", model] if model else []
    data = [] if is_run else ["--dataset_name", rows]
    return read_run(Path(rows) if is_run else None, [*given, *data, *others])


def _rows(
    run: Run, teachers: Sequence[Teacher], contexts: Mapping[str, Context | None], numbers: Sequence[int] | None
) -> dict[int, Mapping[str, Any]]:
    """Return the rows that were asked for, or all, as training would read them."""
    from itertools import islice

    from opsd.commands.build import rows_of
    from opsd.data.prepare import prepare_rows

    own = [teacher.prompts for teacher in teachers]
    prompts = [each.with_context(context) for each in own for context in contexts.values()] or own
    dataset = prepare_rows(
        rows_of(run, run.run.dataset_train_split),
        name=run.run.dataset_name or "",
        system_prompt=run.args.student_system_prompt,
        reads={name for each in prompts for context in each.contexts for name in context.columns},
        needs=[need for each in prompts for need in each.needs(())],
    )
    if numbers is None:
        return dict(enumerate(dataset))
    rows = list(islice(iter(dataset), max(numbers, default=0) + 1))
    for number in numbers:
        if number < 0:
            raise ConfigError(f"rows are counted from 0, and row {number} was asked for.")
        if number >= len(rows):
            raise ConfigError(f"the dataset has rows 0 to {len(rows) - 1}, and row {number} was asked for.")
    return {number: rows[number] for number in numbers}


def _print(scores: Sequence[Score]) -> None:
    from rich.console import Console

    from opsd.training.display import rollout_text

    console = Console(highlight=False)
    for score in scores:
        origin = "sampled here" if score.rollout.on_policy else "the row's completion"
        console.rule(f"row {score.row} ({origin}) · {score.teacher}", align="left")
        console.print(rollout_text(score.rollout))
        for line in _worst(score):
            console.print(line, markup=False, style="dim")


def _worst(score: Score) -> Iterator[str]:
    """Yield the tokens with the largest divergence, each with what both sides would have said."""
    from opsd.health.text import printable

    rollout = score.rollout
    scored = [place for place, nats in enumerate(rollout.divergence) if not math.isnan(nats)]
    scored = [place for place in scored if abs(rollout.divergence[place]) >= LEAST]
    for place in sorted(scored, key=lambda place: -abs(rollout.divergence[place]))[:WORST]:
        line = f"{rollout.divergence[place]:6.2f} nats  {printable(rollout.tokens[place])!r}"
        found = rollout.alternatives[place] if rollout.alternatives else None
        if found is not None:
            student = _listed(found.student_tokens, found.student_logprobs)
            teacher = _listed(found.teacher_tokens, found.teacher_logprobs)
            line += f"  student: {student}  teacher: {teacher}"
        yield line


def _listed(tokens: Sequence[str], logprobs: Sequence[float]) -> str:
    from opsd.health.text import printable

    pairs = list(zip(tokens, logprobs, strict=True))[:LISTED]
    return ", ".join(f"{printable(token)!r} {math.exp(value):.0%}" for token, value in pairs)


def _write_page(path: Path, run: Run, scores: Sequence[Score]) -> None:
    from opsd.evaluation.run_folder import write_whole
    from opsd.report.heatmap import Shown, as_plain
    from opsd.report.page import render

    divergence = run.args.objective.divergence
    name = divergence.kind.name(divergence.beta)
    shown = [Shown(str(score.row), score.teacher, score.rollout) for score in scores]
    student = str(run.model.model_name_or_path).rstrip("/").rpartition("/")[2]
    html = render(
        "score.html",
        title=f"{student}: rows of {Path(run.run.dataset_name or '').name}",
        about=f"student: {student} · {run.args.objective.describe()}",
        heatmap=as_plain(shown, "row", "teacher and context", name),
    )
    write_whole(path, html)
    print(f"page        {path}")
