"""`opsd demo` and `opsd demo math`: write run files, train them as `opsd train` does, and print the results."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from opsd.commands.cells import as_change, as_estimate
from opsd.commands.demo_recover import RecoverResult, RecoverSettings, run_recover
from opsd.commands.demo_run import RUN_FILE
from opsd.commands.demo_sums import (
    CONTEXT,
    GRADER,
    HELD_OUT,
    MAX_NEW_TOKENS,
    SumsResult,
    SumsSettings,
    run_sums,
)

MATH = "math"
ABOUT = (
    "Fine-tune a small real model on sums, which costs it general knowledge, and bring that back while the sums stay: "
    "the fine-tuned model answers prompts of both kinds; its teacher for everyday prompts is the model before "
    "fine-tuning, for sums the fine-tuned model itself; the per-token reverse KL to them trains it. Held-out questions "
    "of both tasks are graded before, between and after."
)
ABOUT_MATH = (
    "Train a small real model to add and subtract. It samples answers to the plain question; its teacher is the same "
    "model, frozen, with two worked examples and the right answer in its prompt; the per-token reverse KL between the "
    "two trains it. Held-out questions are graded before and after. Fine-tuning on the answers, written as sentences, "
    "does better on this task: docs/when.md has the figures."
)
RUN_FILES = " Run files are written into the output folder: change them and run `opsd train` on them."
HELP = {
    "model": "a folder or a hub id (default: the packaged SmolLM2-135M-Instruct)",
    "sft_steps": "optimizer steps of fine-tuning",
    "steps": "optimizer steps",
    "rollouts": "per step",
    "sft_learning_rate": "of fine-tuning",
    "learning_rate": "of distillation",
    "questions": "held out, of each task",
    "seed": "of training",
    "output": "folder of the run (default: the first free runs/demo…)",
}
TITLE = (
    "[bold]opsd demo[/]: fine-tuning teaches a small model sums, and costs it general knowledge. The model before "
    "fine-tuning still has that, and becomes the teacher of everyday prompts. The fine-tuned model teaches the sums.\n"
)
TITLE_MATH = (
    "[bold]opsd demo math[/]: a small model learns arithmetic from its own answers. Its teacher is the same model with "
    "two worked examples and the right answer in the prompt.\n"
)


def make_parser(math: bool = False) -> argparse.ArgumentParser:
    """Return the options of `opsd demo`, or of `opsd demo math`."""
    parser = argparse.ArgumentParser(
        prog="opsd demo math" if math else "opsd demo",
        description=(ABOUT_MATH if math else ABOUT) + RUN_FILES,
        epilog=None if math else "`opsd demo math` trains on the sums with the answer in the teacher's prompt.",
    )
    for each in fields(SumsSettings if math else RecoverSettings):
        default = f" ({each.default})" if each.default is not None else ""
        kind = str if each.default is None else type(each.default)
        parser.add_argument(f"--{each.name}", type=kind, default=each.default, help=HELP[each.name] + default)
    if math:
        parser.add_argument("--control", action="store_true", help="train once more with wrong answers in the context")
    parser.add_argument("--json", metavar="FILE", help="write the results")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run a demo."""
    math = bool(arguments) and arguments[0] == MATH
    options = vars(make_parser(math).parse_args(arguments[1:] if math else arguments))
    json_file, control = options.pop("json"), options.pop("control", False)
    _quiet()
    console = Console(soft_wrap=True, highlight=False)
    console.print(TITLE_MATH if math else TITLE)
    settings: SumsSettings | RecoverSettings
    result: SumsResult | RecoverResult
    if math:
        settings = SumsSettings(**options)
        result = run_sums(settings, _say, control)
        if result.control:
            _compare(result, console)
    else:
        settings = RecoverSettings(**options)
        result = run_recover(settings, _say)
        console.print()
        console.print(table(result))
        console.print("[dim]right answers with 95 % intervals over questions; changes in points, paired by question[/]")
    console.print(footer(result))
    if json_file:
        from opsd.evaluation.run_folder import write_json

        write_json(Path(json_file), as_json(settings, result))
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


# ---- the table of two tasks -----------------------------------------------------------------------------------------


def table(result: RecoverResult) -> Table:
    """Return accuracy on both tasks before fine-tuning, after it and after distillation, and what each changed."""
    grid = Table("", "sums", "general knowledge", box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0))
    for cells in rows(result):
        grid.add_row(*cells)
    return grid


def rows(result: RecoverResult) -> Iterator[tuple[str, ...]]:
    """Yield the lines of the table: accuracies of each model, then the changes from one to the next."""
    from opsd.evaluation.summary import difference

    models = _measured(result)
    for name, tasks in models.items():
        yield name, *(f"{as_estimate(each.estimate('accuracy'), 100)} %" for each in tasks.values())
    before, fine_tuned, distilled = models.values()
    for name, first, second in (("SFT changed", before, fine_tuned), ("opsd changed", fine_tuned, distilled)):
        yield name, *(as_change(difference(first[task], second[task]), 100) for task in first)


def _measured(result: RecoverResult) -> dict[str, dict[str, Any]]:
    """Return the results of both tasks by model."""
    from opsd.evaluation.summary import AFTER, BEFORE, FOLDER, results_of

    sft, own = Path(result.sft) / FOLDER, Path(result.folder) / FOLDER
    sums, knowledge = results_of(sft), results_of(sft, "retention general")
    return {
        "before SFT": {"sums": sums[BEFORE], "general": knowledge[BEFORE]},
        "after SFT": {"sums": sums[AFTER], "general": knowledge[AFTER]},
        "after SFT and opsd": {"sums": results_of(own, "retention sums")[AFTER], "general": results_of(own)[AFTER]},
    }


# ---- what a demo cost, and what to do next --------------------------------------------------------------------------


def _compare(result: SumsResult, console: Console) -> None:
    from opsd.commands.compare import show
    from opsd.evaluation.compare import compare, read_runs

    console.print()
    show(compare(read_runs([result.folder, str(result.control)])), console)


def footer(result: SumsResult | RecoverResult) -> str:
    """Return what the runs cost, and what to do next."""
    parts = ", ".join(f"{name} {value:.0f}" for name, value in result.seconds.items())
    folder = result.folder
    lines = [
        "",
        f"seconds         {sum(result.seconds.values()):.0f} ({parts})",
        f"peak memory     {result.peak_megabytes:,.0f} MB",
        f"trained model   {folder}",
        "",
    ]
    if isinstance(result, SumsResult):
        lines.insert(4, "[dim]95 % intervals over questions: Wilson for accuracies, Agresti and Min for the gain[/]")
        lines.append(
            f"grade it again:    opsd eval {folder} --dataset_name {folder}/{HELD_OUT} --grader {GRADER} "
            f"--max_new_tokens {MAX_NEW_TOKENS}"
        )
    lines.append(
        f"change the run:    edit {folder}/{RUN_FILE}, then opsd train {folder}/{RUN_FILE} --output_dir runs/mine"
    )
    if isinstance(result, SumsResult):
        lines.append(f"change the prompt: opsd cp {CONTEXT} .")
    return "\n".join(lines)


def as_json(settings: SumsSettings | RecoverSettings, result: SumsResult | RecoverResult) -> dict[str, Any]:
    """Return settings, costs and the summaries of the evaluations, in plain values."""
    from opsd.evaluation.summary import FOLDER, read_summary

    folders = {"evaluation": result.folder}
    if isinstance(result, RecoverResult):
        folders["sft_evaluation"] = result.sft
    elif result.control:
        folders["control_evaluation"] = result.control
    summaries = {name: read_summary(Path(folder) / FOLDER) for name, folder in folders.items()}
    return {"settings": asdict(settings), **asdict(result), **summaries}


def _quiet() -> None:
    """Turn off notices of libraries that do not concern the reader of the demo."""
    from datasets import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
