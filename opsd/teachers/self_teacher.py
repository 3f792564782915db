"""Teachers made of the student: its own module, holding other values while it scores.

With LoRA that costs one adapter, with full fine-tuning one copy of the weights. A strategy says when those values
change; how they are kept, swapped in, saved and sharded is here, once.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from opsd.contexts.base import Context
from opsd.teachers.base import StudentHandle
from opsd.teachers.local import LocalTeacher
from opsd.teachers.weight_copy import WeightCopy, adapter_adds_nothing, adapter_off

MOVED = "opsd.moved"  # stands in a state beside the values; no parameter has such a name


class SelfTeacher(LocalTeacher):
    """The student's module with values of its own.

    Args:
        offload: keep the values in CPU memory between passes: they cost no device memory, and a copy per micro-batch.
            Where FSDP shards the student, its shards stay on the device.
        context: what it is shown beside the prompt.
    """

    def __init__(self, *, offload: bool = False, context: Context | str | Mapping[str, Any] | None = None) -> None:
        super().__init__(context=context)
        self.offload = offload
        self._weights: WeightCopy | None = None  # None: the student's own, or its base model's

    def place(self, student: StudentHandle) -> None:
        """Copy what training will move, as it is now."""
        self._weights = WeightCopy(student.model, offload=self.offload)

    @property
    def model(self) -> nn.Module:
        """The student's own module."""
        return self._student.model

    @property
    def weights(self) -> WeightCopy:
        """The values it holds."""
        assert self._weights is not None, "call prepare(student) first"
        return self._weights

    def teaching(self) -> AbstractContextManager[None]:
        """Swap the values in."""
        return self.weights.swapped_in()

    def shard(self) -> None:
        """Cut the values as the student's parameters are cut by now."""
        if self._weights is not None:
            self._weights.pairs()

    @property
    def starts_as_student(self) -> bool:
        """It does."""
        return True

    @property
    def tensors(self) -> list[Tensor]:
        """The values, if it holds any."""
        return [] if self._weights is None else self._weights.tensors


class LiveTeacher(SelfTeacher):
    """The student's weights now, stop-gradient.

    Free, and unstable without care: what the student drifts into, its teacher drifts into as well (OPSD's authors call
    a live teacher "very unstable"; SDFT found the same).

    Args:
        context: what it is shown beside the prompt; without one the loss is 0.
    """

    strategy = "live"

    def __init__(self, *, context: Context | str | Mapping[str, Any] | None = None) -> None:
        super().__init__(context=context)

    def place(self, student: StudentHandle) -> None:
        """Nothing to place: it is the student."""

    def teaching(self) -> AbstractContextManager[None]:
        """The student's own state."""
        return nullcontext()

    @property
    def cautions(self) -> list[str]:
        """What its users found."""
        return [
            "a live teacher drifts with its student, and nothing holds the two back (OPSD's authors found it very "
            "unstable): watch length and entropy, or take a frozen one."
        ]

    def describe(self) -> str:
        """Whose weights these are."""
        return "the student as it is now, without gradient (unstable without care: watch length and entropy)"


class SameCheckpointTeacher(SelfTeacher):
    """The student's weights at step 0, frozen (OPSD, arXiv 2601.18734).

    With LoRA it is the base model (adapter off) where the adapter adds exactly nothing at step 0; a student that
    arrives with a trained adapter is copied, adapter only. With full fine-tuning it is one copy of the weights.

    Args:
        offload: keep the copy in CPU memory between passes.
        context: what it is shown beside the prompt; without one it agrees with the student at step 0 and teaches
            nothing until the student moves away.
    """

    strategy = "same_checkpoint"

    def place(self, student: StudentHandle) -> None:
        """Copy what training will move, or nothing where switching the adapter off is the same."""
        is_peft = hasattr(student.model, "disable_adapter")
        if not (is_peft and adapter_adds_nothing(student.model, len(student.tokenizer))):
            super().place(student)

    def teaching(self) -> AbstractContextManager[None]:
        """Switch the adapter off, or swap the step-0 weights in."""
        return adapter_off(self.model) if self._weights is None else super().teaching()

    def describe(self) -> str:
        """Whose weights these are."""
        how = "adapter off" if self._weights is None else "a frozen copy of what training moves"
        return f"the student at step 0, frozen ({how})"


class UpdatedSelfTeacher(SelfTeacher):
    """A teacher whose values change during training: they, and how far it has come, belong into a checkpoint."""

    moved = 0  # updates made, or the step that was copied: whatever the strategy counts

    def state_dict(self) -> dict[str, Tensor]:
        """Return the values by parameter name, and how far it has come."""
        return {**self.weights.state_dict(), MOVED: torch.tensor(self.moved)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take them back."""
        self.moved = int(state[MOVED])
        self.weights.load({name: value for name, value in state.items() if name != MOVED})
