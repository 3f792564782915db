"""The demo of sums: the teacher is the same model with the right answer in its prompt, the demo's task until 0.1.

Here fine-tuning on the answers in sentences does better: docs/when.md has the figures. `opsd.commands.demo` prints what
is run here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsd.commands.demo_run import Clock, Say, common_settings, free_folder, train_printing, write_run_file
from opsd.commands.demo_tasks import Row, packaged_model, sums, worked_examples, write_rows
from opsd.contexts.messages import turns_of
from opsd.contexts.privileged import PrivilegedContext
from opsd.data.values import text_of

CONTEXT = "answer_only"  # with two worked examples, which were the largest lever: results/learning/wordings.md
GRADER = "last_number"  # the model answers in a sentence; reasoning-gym's scorer wants the bare number
CONTROL = "wrong-context"
TRAIN, HELD_OUT = "train.jsonl", "held_out.jsonl"
MAX_NEW_TOKENS = 20  # "The final answer to this arithmetic problem is 123." and the end of turn
# What the run file says beside its settings.
COMMENTS = {
    "dataset_name": "sums and differences of two numbers, each with its answer",
    "context": "two worked examples and the right answer, in the teacher's prompt only",
    "teacher": "the model at step 0, frozen",
    "per_device_train_batch_size": "rollouts per step",
    "max_completion_length": "tokens",
    "evaluation": "measured before and after training, for student and teacher",
    "gradient_checkpointing": "saves memory, which a model of this size does not need",
}


@dataclass(frozen=True)
class SumsSettings:
    """Settings of the demo of sums; `benchmarks/results/demo.json` has the results with these defaults.

    Args:
        model: a folder or a hub id; None takes the packaged SmolLM2-135M-Instruct.
        steps: optimizer steps.
        rollouts: rollouts per step.
        learning_rate: constant after two steps of warm-up.
        questions: held-out questions.
        seed: of training questions, order and sampling; the held-out questions are always the same.
        output: folder of the run; None takes the first free `runs/demo-math…`.

    Example:
        >>> SumsSettings(steps=2, rollouts=4).questions
        200
    """

    model: str | None = None
    steps: int = 24
    rollouts: int = 16
    learning_rate: float = 3e-5
    questions: int = 200
    seed: int = 0
    output: str | None = None


@dataclass(frozen=True)
class SumsResult:
    """Where the demo's runs are, and what they cost.

    Args:
        folder: output folder of the run, with its model, its results and its run file.
        doctor: the doctor's findings before training, in plain values.
        seconds: wall time by part.
        peak_megabytes: largest resident memory of the process.
        control: output folder of the run with wrong answers in the context, if it was asked for.

    Example:
        >>> result = run_sums(SumsSettings(), print)  # doctest: +SKIP
        >>> result.folder  # doctest: +SKIP
        'runs/demo-math'
    """

    folder: str
    doctor: Mapping[str, Any]
    seconds: dict[str, float]
    peak_megabytes: float
    control: str | None = None


def _shown(row: Row) -> str:
    messages, _ = PrivilegedContext(CONTEXT).messages(row)
    return text_of(turns_of(messages)[-1])


# ---- the run file -----------------------------------------------------------------------------------------------


def sums_settings(settings: SumsSettings, model: str, folder: Path) -> dict[str, Any]:
    """Return the settings of the demo's run file."""
    rows = folder / TRAIN
    return {
        "model_name_or_path": model,
        "context": {"template": CONTEXT, "examples": worked_examples(_shown)},
        "teacher": {"strategy": "same_checkpoint"},
        "learning_rate": settings.learning_rate,
        **common_settings(folder, rows, settings.steps, settings.rollouts, MAX_NEW_TOKENS, settings.seed),
        "logging_steps": 1,
        "evaluation": {"test": str(folder / HELD_OUT), "grader": GRADER, "batch_size": 100},
    }


def write_run(settings: SumsSettings, model: str, folder: Path) -> Path:
    """Write training rows, held-out rows and the run file into a folder; returns the path of the run file."""
    train, held_out = sums(settings.steps * settings.rollouts, settings.questions, settings.seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / HELD_OUT, held_out)
    write_rows(folder / TRAIN, train)
    return write_run_file(folder, sums_settings(settings, model, folder), COMMENTS)


# ---- the run ----------------------------------------------------------------------------------------------------


def run_sums(settings: SumsSettings, say: Say, control: bool = False) -> SumsResult:
    """Write the run file, train, and measure before and after.

    Args:
        settings: what to run.
        say: called with each line to print.
        control: train once more with wrong answers in the context.
    """
    from opsd.training.machine import peak_megabytes

    clock = Clock()
    model = settings.model or packaged_model()
    folder = Path(settings.output or free_folder("runs/demo-math"))
    run_file = write_run(settings, model, folder)
    say(f"run file    {run_file}: change it and run `opsd train` on it\n")
    doctor = train_printing(run_file, [], clock, say, examined=True)
    control_folder = f"{folder}-control" if control else None
    if control_folder:
        say(f"\ncontrol     the same run with wrong answers in the teacher's prompt: --control {CONTROL}\n")
        rest = Clock()
        train_printing(run_file, ["--control", CONTROL, "--output_dir", control_folder], rest, say)
        clock.seconds["control"] = sum(rest.seconds.values())
    return SumsResult(str(folder), doctor, clock.seconds, peak_megabytes(), control_folder)
