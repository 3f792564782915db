"""The demo: fine-tuning teaches sums and costs general knowledge; distillation brings that back and keeps the sums.

Two runs of `opsd train`, each with a run file: `sft/run.yaml` fine-tunes on bare answers, `run.yaml` trains the result
on its own answers. The model before fine-tuning grades answers to everyday prompts, the fine-tuned model those to sums.
Their `evaluation:` measures both tasks before and after. Thinking Machines (On-Policy Distillation, 2025) recovered
instruction following from an earlier checkpoint in this way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opsd.commands.demo_run import RUN_FILE, Clock, Say, common_settings, free_folder, train_printing, write_run_file
from opsd.commands.demo_tasks import EVERYDAY, SUM, both_kinds, general, of_kind, packaged_model, sums, write_rows

SUMS, KNOWLEDGE, TRAIN = "sums.jsonl", "general.jsonl", "train.jsonl"
SUMS_GRADER, KNOWLEDGE_GRADER = "last_number", "contains"
MAX_NEW_TOKENS = 24
COMMENTS_SFT = {
    "dataset_name": "sums and differences of two numbers, each with its answer: a bare number",
    "control": "plain fine-tuning on the answers",
    "evaluation": "sums are the task; general knowledge is what must stay",
}
COMMENTS = {
    "model_name_or_path": "the fine-tuned model",
    "dataset_name": "prompts without answers, about everyday things and some sums",
    "teacher": "for everyday prompts the model before fine-tuning, for sums the fine-tuned model at step 0",
    "max_completion_length": "tokens of a rollout",
    "evaluation": "general knowledge is to come back; sums are what must stay",
}


@dataclass(frozen=True)
class RecoverSettings:
    """Settings of the demo; `benchmarks/results/learning/keep_both.json` has three seeds of this set-up, with controls.

    Args:
        model: a folder or a hub id; None takes the packaged SmolLM2-135M-Instruct.
        sft_steps: optimizer steps of fine-tuning.
        steps: optimizer steps of distillation.
        rollouts: rows per step of both.
        sft_learning_rate: constant after two steps of warm-up.
        learning_rate: likewise.
        questions: held-out questions of each task.
        seed: of training rows, order and sampling; the held-out questions are always the same.
        output: folder of the runs; None takes the first free `runs/demo…`.

    Example:
        >>> RecoverSettings(steps=2, rollouts=4).questions
        175
    """

    model: str | None = None
    sft_steps: int = 48
    steps: int = 24
    rollouts: int = 16
    sft_learning_rate: float = 3e-5
    learning_rate: float = 2e-5
    questions: int = 175
    seed: int = 0
    output: str | None = None


@dataclass(frozen=True)
class RecoverResult:
    """Where the demo's runs are, and what they cost.

    Args:
        folder: output folder of distillation.
        sft: output folder of fine-tuning.
        seconds: wall time by part.
        peak_megabytes: largest resident memory of the process.
        doctor: the doctor's findings before distillation, in plain values.

    Example:
        >>> run_recover(RecoverSettings(), print).folder  # doctest: +SKIP
        'runs/demo'
    """

    folder: str
    sft: str
    seconds: dict[str, float]
    peak_megabytes: float
    doctor: Mapping[str, Any] = field(default_factory=dict)


def run_recover(settings: RecoverSettings, say: Say) -> RecoverResult:
    """Fine-tune, distil, and measure both tasks before, between and after.

    Args:
        settings: what to run.
        say: called with each line to print.
    """
    from opsd.training.machine import peak_megabytes

    model, folder = settings.model or packaged_model(), Path(settings.output or free_folder("runs/demo"))
    sft = folder / "sft"
    clock = Clock()
    _write_rows(settings, folder, sft)
    say(f"1  fine-tune on {settings.sft_steps * settings.rollouts} sums with their answers: {sft / RUN_FILE}\n")
    path = write_run_file(sft, sft_settings(settings, model, folder, sft), COMMENTS_SFT)
    train_printing(path, [], clock, say)
    seconds = {"fine-tuning": sum(clock.seconds.values())}
    say(f"\n2  train the result on its own answers; each kind of prompt has its teacher: {folder / RUN_FILE}\n")
    path = write_run_file(folder, distil_settings(settings, model, folder, sft), COMMENTS)
    clock = Clock()
    doctor = train_printing(path, [], clock, say, examined=True)
    return RecoverResult(str(folder), str(sft), {**seconds, **clock.seconds}, peak_megabytes(), doctor)


# ---- rows and run files -----------------------------------------------------------------------------------------


def _write_rows(settings: RecoverSettings, folder: Path, sft: Path) -> None:
    sft.mkdir(parents=True, exist_ok=True)
    train, held_out = sums(settings.sft_steps * settings.rollouts, settings.questions, settings.seed)
    write_rows(sft / TRAIN, train)
    write_rows(folder / SUMS, of_kind(SUM, held_out))
    write_rows(folder / KNOWLEDGE, of_kind(EVERYDAY, general()[: settings.questions]))
    rows = both_kinds(
        settings.steps * settings.rollouts, settings.seed, lambda n: sums(n, settings.questions, settings.seed)[0]
    )
    write_rows(folder / TRAIN, rows)


def _common(settings: RecoverSettings, folder: Path, steps: int) -> dict[str, Any]:
    rows = folder / TRAIN
    return {
        **common_settings(folder, rows, steps, settings.rollouts, MAX_NEW_TOKENS, settings.seed),
        "logging_steps": max(1, steps // 8),
    }


def _evaluation(task: tuple[Path, str], kept: tuple[str, Path, str]) -> dict[str, Any]:
    name, rows, grader = kept
    return {
        "test": str(task[0]),
        "grader": task[1],
        "retention": {name: {"rows": str(rows), "grader": grader}},
        "batch_size": 100,
    }


def sft_settings(settings: RecoverSettings, model: str, folder: Path, sft: Path) -> dict[str, Any]:
    """Return the settings of the run that fine-tunes."""
    task, knowledge = (folder / SUMS, SUMS_GRADER), ("general", folder / KNOWLEDGE, KNOWLEDGE_GRADER)
    return {
        "model_name_or_path": model,
        "control": "sft",
        "teacher": {"strategy": "same_checkpoint"},
        "learning_rate": settings.sft_learning_rate,
        **_common(settings, sft, settings.sft_steps),
        "evaluation": _evaluation(task, knowledge),
    }


def distil_settings(settings: RecoverSettings, model: str, folder: Path, sft: Path) -> dict[str, Any]:
    """Return the settings of the run that brings back what fine-tuning cost."""
    knowledge, kept = (folder / KNOWLEDGE, KNOWLEDGE_GRADER), ("sums", folder / SUMS, SUMS_GRADER)
    return {
        "model_name_or_path": str(sft),
        "teacher": {
            "strategy": "routed",
            "column": "kind",
            "teachers": {
                EVERYDAY: {"strategy": "past_checkpoint", "model": model},
                SUM: {"strategy": "same_checkpoint"},
            },
        },
        "learning_rate": settings.learning_rate,
        **_common(settings, folder, settings.steps),
        "evaluation": _evaluation(knowledge, kept),
    }
