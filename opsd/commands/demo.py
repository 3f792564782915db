"""`opsd demo`: writes a run file, trains it as `opsd train` does, and prints the results."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from opsd.commands.demo_run import (
    CONTEXT,
    GRADER,
    HELD_OUT,
    MAX_NEW_TOKENS,
    RUN_FILE,
    DemoResult,
    DemoSettings,
    run_demo,
)

TITLE = (
    "[bold]opsd demo[/]: a small model learns arithmetic from its own answers. Its teacher is the same model with the "
    "right answer in the prompt.\n"
)


def make_parser() -> argparse.ArgumentParser:
    """Return the options of `opsd demo`."""
    default = DemoSettings()
    parser = argparse.ArgumentParser(
        prog="opsd demo",
        description="Train a small real model to add and subtract. It samples answers to the plain question; its "
        "teacher is the same model, frozen, with the right answer in its prompt; the per-token reverse KL between the "
        "two trains it. Held-out questions are graded before and after. The demo writes a run file, run.yaml, into "
        "its output folder: change it and run `opsd train` on it.",
    )
    parser.add_argument("--model", help="a folder or a hub id (default: the packaged SmolLM2-135M-Instruct)")
    parser.add_argument("--steps", type=int, default=default.steps, help=f"optimizer steps ({default.steps})")
    parser.add_argument("--rollouts", type=int, default=default.rollouts, help=f"per step ({default.rollouts})")
    parser.add_argument("--learning_rate", type=float, default=default.learning_rate, help=f"({default.learning_rate})")
    parser.add_argument("--questions", type=int, default=default.questions, help=f"held out ({default.questions})")
    parser.add_argument("--seed", type=int, default=default.seed, help=f"({default.seed})")
    parser.add_argument("--output", help="folder of the run (default: the first free runs/demo…)")
    parser.add_argument(
        "--control", action="store_true", help="train once more with wrong answers in the context, and compare"
    )
    parser.add_argument("--json", metavar="FILE", help="write the results")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run the demo."""
    options = vars(make_parser().parse_args(arguments))
    control, json_file = options.pop("control"), options.pop("json")
    settings = DemoSettings(**options)
    _quiet()
    console = Console(soft_wrap=True, highlight=False)
    console.print(TITLE)
    result = run_demo(settings, lambda line: print(line, flush=True), control)
    if result.control:
        _compare(result, console)
    console.print(footer(result))
    if json_file:
        from opsd.evaluation.run_folder import write_json

        write_json(Path(json_file), as_json(settings, result))
    return 0


def _compare(result: DemoResult, console: Console) -> None:
    from opsd.commands.compare import show
    from opsd.evaluation.compare import compare, read_runs

    console.print()
    show(compare(read_runs([result.folder, str(result.control)])), console)


def footer(result: DemoResult) -> str:
    """Return what the run cost, and what to do next."""
    parts = ", ".join(f"{name} {value:.0f}" for name, value in result.seconds.items())
    folder = result.folder
    return (
        f"\nseconds         {sum(result.seconds.values()):.0f} ({parts})\n"
        f"peak memory     {result.peak_megabytes:,.0f} MB\n"
        f"trained model   {folder}\n"
        f"[dim]95 % intervals over questions: Wilson for accuracies, Agresti and Min for the gain[/]\n\n"
        f"grade it again:    opsd eval {folder} --dataset_name {folder}/{HELD_OUT} --grader {GRADER} "
        f"--max_new_tokens {MAX_NEW_TOKENS}\n"
        f"change the run:    edit {folder}/{RUN_FILE}, then opsd train {folder}/{RUN_FILE} --output_dir runs/mine\n"
        f"change the prompt: opsd cp {CONTEXT} ."
    )


def as_json(settings: DemoSettings, result: DemoResult) -> dict[str, Any]:
    """Return settings, costs and the summaries of the evaluation, in plain values."""
    from opsd.evaluation.summary import FOLDER, read_summary

    folders = {"evaluation": result.folder, **({"control_evaluation": result.control} if result.control else {})}
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
