"""The student as it was before step 1, frozen: the default teacher.

With LoRA it is the base model (adapter off) where the adapter adds exactly nothing at step 0; a student that arrives
with a trained adapter is copied, adapter only. With full fine-tuning it is one copy of the trainable weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from opsd.context import PrivilegedContext
from opsd.teachers.base import Cost, StudentHandle
from opsd.teachers.local import LocalTeacher
from opsd.teachers.weights import TrainableWeights, adapter_adds_nothing, adapter_off


class SameCheckpointTeacher(LocalTeacher):
    """The student's weights at step 0, frozen (OPSD, arXiv 2601.18734).

    Args:
        context: what it is shown beside the prompt; without one it agrees with the student at step 0 and teaches
            nothing until the student moves away.
    """

    strategy = "same_checkpoint"

    def __init__(self, *, context: PrivilegedContext | str | Mapping[str, Any] | None = None):
        super().__init__(context=context)
        self._weights: TrainableWeights | None = None

    def place(self, student: StudentHandle) -> None:
        """Copy what training will move, or nothing where switching the adapter off is the same."""
        is_peft = hasattr(student.model, "disable_adapter")
        base_is_enough = is_peft and adapter_adds_nothing(student.model, len(student.tokenizer))
        self._weights = None if base_is_enough else TrainableWeights(student.model)

    @property
    def model(self) -> nn.Module:
        """The student's own module."""
        return self._student.model

    def teaching(self) -> AbstractContextManager[None]:
        """Switch the adapter off, or swap the step-0 weights in."""
        return adapter_off(self.model) if self._weights is None else self._weights.swapped_in()

    @property
    def words(self) -> str:
        """Whose weights these are."""
        how = "adapter off" if self._weights is None else "a frozen copy of what training moves"
        return f"the student at step 0, frozen ({how})"

    @property
    def cost(self) -> Cost:
        """Nothing, or the copy."""
        return Cost(self._weights.megabytes if self._weights else 0.0)
