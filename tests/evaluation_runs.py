"""Runs with an evaluation plan: rows for its splits, a grader, a trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import make_llama, make_rows, make_tokenizer
from datasets import Dataset
from helpers import make_args

from opsd import OPSDTrainer, SameCheckpointTeacher
from opsd.evaluation import EvaluationResult
from opsd.evaluation.summary import results_of

ROWS = make_rows(40)
for _number, _row in enumerate(ROWS):
    _row["prompt"] = [{"role": "user", "content": f"Question {_number}: what is it?"}]
TRAIN, TEST, DEV, KEPT = ROWS[:12], ROWS[12:24], ROWS[24:32], ROWS[32:]


def vowels(text: str, row: dict[str, Any]) -> bool:
    """A grader whose verdict depends on what a small model says."""
    return sum(letter in "aeiou" for letter in text) % 2 == 0


GRADER = f"{__name__}:vowels"
PLAN: dict[str, Any] = {"test": TEST, "grader": GRADER}


def make(
    folder: Path, teacher: Any = None, evaluation: Any = None, *, train: Any = TRAIN, **changes: Any
) -> OPSDTrainer:
    peft = changes.pop("peft_config", None)
    return OPSDTrainer(
        changes.pop("model", None) or make_llama(0),
        teacher or SameCheckpointTeacher(context="worked_solution"),
        args=make_args(folder, **changes),
        train_dataset=Dataset.from_list(train),
        processing_class=make_tokenizer(),
        evaluation=PLAN if evaluation is None else evaluation,
        peft_config=peft,
    )


def results(folder: Path, split: str = "test") -> dict[str, EvaluationResult]:
    return results_of(folder / "evaluation", split)
