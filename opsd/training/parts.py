"""The parts of a run, in one record for whoever describes or stores the whole of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from accelerate import Accelerator
from datasets import Dataset, IterableDataset

from opsd.evaluation.plan import EvaluationPlan
from opsd.teachers import Recipe, StudentHandle
from opsd.training.config import OPSDConfig
from opsd.training.groups import Groups
from opsd.training.loss import Scorer

Rows: TypeAlias = Dataset | IterableDataset


@dataclass(frozen=True)
class RunParts:
    """What a run is made of, prepared.

    Args:
        args: training arguments.
        accelerator: of the run.
        student: the student.
        scorer: the loss, with the teacher and its contexts.
        groups: how rollouts are graded.
        rows: the training rows: a dataset, a stream, or None.
        eval_rows: the evaluation rows: a dataset, a mapping of such, or None.
        plan: what is evaluated, if anything.
        recipe: the recipe that the teacher was named by, if any.
        optimizers: optimizer and schedule that the user gave, if any.
        given: the student's name or path, where the user gave one; "" for a loaded model.
        prepared: the training rows before `drop_long_rows`.

    Example:
        >>> run_card(trainer.parts)["divergence"]["formula"]
        'Σ_v s(v)·[log s(v) − log t(v)]'
    """

    args: OPSDConfig
    accelerator: Accelerator
    student: StudentHandle
    scorer: Scorer
    groups: Groups
    rows: Rows | None
    eval_rows: Any = None
    plan: EvaluationPlan | None = None
    recipe: Recipe | None = None
    optimizers: tuple[Any, Any] = (None, None)
    given: str = ""
    prepared: Rows | None = None

    @property
    def dropped(self) -> int:
        """Number of training rows that `drop_long_rows` dropped."""
        return len(self.prepared) - len(self.rows) if isinstance(self.prepared, Dataset) and self.rows else 0
