"""`opsd demo`: prints the demo, step by step, with a live bar, then one table."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from opsd.commands.demo_run import (
    CONTEXT,
    GRADER,
    MAX_NEW_TOKENS,
    QUESTIONS,
    DemoResult,
    DemoSettings,
    Score,
    Watcher,
    run_demo,
)
from opsd.evaluation.statistics import paired_difference, proportion_interval, share_of_gap


def make_parser() -> argparse.ArgumentParser:
    """Return the options of `opsd demo`."""
    default = DemoSettings()
    parser = argparse.ArgumentParser(
        prog="opsd demo",
        description="Train a small real model to add and subtract. It samples answers from the plain question; its "
        "teacher is the same model, frozen, shown the right answer; the per-token reverse KL between the two trains "
        "it. Held-out questions are graded before and after.",
    )
    parser.add_argument("--model", help="a folder or a hub id (default: the packaged SmolLM2-135M-Instruct)")
    parser.add_argument("--steps", type=int, default=default.steps, help=f"optimizer steps ({default.steps})")
    parser.add_argument("--rollouts", type=int, default=default.rollouts, help=f"per step ({default.rollouts})")
    parser.add_argument("--learning_rate", type=float, default=default.learning_rate)
    parser.add_argument("--questions", type=int, default=default.questions, help="held-out questions")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--output", help="folder for the trained model (default: the first free runs/demo…)")
    parser.add_argument("--control", action="store_true", help="repeat with wrong answers shown: is it information?")
    parser.add_argument("--json", metavar="FILE", help="write the result")
    return parser


class Bars(Watcher):
    """Shows each part of the demo as a line with a live bar."""

    def __init__(self, console: Console):
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description:<46}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=console,
        )

    def __enter__(self) -> Bars:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, name: str, text: str, total: int) -> None:
        """Add a line."""
        if not self._console.is_terminal:  # a log file: one line when a part begins
            self._console.print(f"{text} ({total})")
        self._task = self._progress.add_task(text, total=total, note="")

    def advance(self, done: int, note: str = "") -> None:
        """Move its bar."""
        self._progress.update(self._task, completed=done, note=note)

    def end(self) -> None:
        """Fill its bar."""
        task = self._progress.tasks[self._task]
        self._progress.update(self._task, completed=task.total)


def main(arguments: Sequence[str]) -> int:
    """Run the demo."""
    options = vars(make_parser().parse_args(arguments))
    control, json_file = options.pop("control"), options.pop("json")
    settings = DemoSettings(**options)
    _quiet()
    console = Console()
    console.print("[bold]opsd demo[/]: a model that learns from itself, told the answer\n")
    with Bars(console) as bars:
        result = run_demo(settings, bars, control)
    console.print()
    console.print(doctors_word(result), highlight=False)
    console.print(table(result))
    console.print(summary(result))
    if json_file:
        Path(json_file).write_text(
            json.dumps({"settings": asdict(settings), "result": asdict(result)}, indent=1) + "\n"
        )
    return 0


def doctors_word(result: DemoResult) -> str:
    """Return what the doctor said before training: its verdict on the teacher, and what else it warned of."""
    findings = result.doctor["findings"]
    told = [f for f in findings if f["check"] == "lift" or f["status"] in ("warn", "fail")]
    return "\n".join([f"doctor: {result.doctor['verdict']}", *(f"  {f['saw']}" for f in told), ""])


def table(result: DemoResult) -> Table:
    """Return the scores with their intervals, and each student's gain over the student before."""
    grid = Table("", "right", "of", "accuracy", "95 % interval", "gain over before", box=None, header_style="bold")
    rows = [
        ("student before", result.before, False),
        ("student after", result.after, True),
        ("teacher with the answer (the ceiling)", result.ceiling, False),
        ("control: taught with wrong answers", result.control, True),
    ]
    for name, score, is_student in rows:
        if score is not None:
            grid.add_row(name, *_figures(score), _gain(result.before, score) if is_student else "")
    return grid


def _figures(score: Score) -> tuple[str, str, str, str]:
    low, high = proportion_interval(score.correct)
    return (
        str(sum(score.correct)),
        str(len(score.correct)),
        f"{score.accuracy:.1%}",
        f"{low:.1%} to {high:.1%}",
    )


def _gain(before: Score, after: Score) -> str:
    gain = paired_difference(before.correct, after.correct)
    return f"{100 * gain.difference:+.1f} points ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})"


def summary(result: DemoResult) -> str:
    """Return the lines below the table."""
    share = share_of_gap(result.before.accuracy, result.after.accuracy, result.ceiling.accuracy)
    gap = "no gap to close: the teacher is no better than the student" if share is None else f"{share:.0%}"
    total = sum(result.seconds.values())
    parts = ", ".join(f"{name} {value:.0f}" for name, value in result.seconds.items())
    return (
        f"\nshare of the gap closed   {gap}\n"
        f"seconds                   {total:.0f} ({parts})\n"
        f"peak memory               {result.peak_megabytes:,.0f} MB\n"
        f"trained model             {result.model_folder}\n"
        f"[dim]greedy answers, grader {GRADER}, template {CONTEXT}; intervals: Wilson for accuracies, bootstrap over "
        "questions for the gain[/]\n"
        f"\ngrade it again:  opsd eval {result.model_folder} --dataset_name {result.model_folder}/{QUESTIONS} "
        f"--grader {GRADER} --max_new_tokens {MAX_NEW_TOKENS}\n"
        f"make it yours:   opsd cp {CONTEXT} ."
    )


def _quiet() -> None:
    """Leave the screen to the demo: library notices of no use to its reader are off."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
