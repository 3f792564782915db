"""Self-teachers: they score with the student's module after swapping in a copy of its trainable weights.

With LoRA the copy is one adapter, with full fine-tuning one set of weights. A strategy says when the copy changes; how
it is made, swapped in, saved and sharded is here, once.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from opsd.teachers.checks import check_state_keys
from opsd.teachers.local import LocalTeacher
from opsd.teachers.prompting import ContextLike
from opsd.teachers.student import StudentHandle
from opsd.teachers.weight_copy import WeightCopy, adapter_adds_nothing, adapter_off, adapter_parameters

PROGRESS = "opsd.progress"  # stands in a state beside the weights; no parameter has such a name


class SelfTeacher(LocalTeacher):
    """A teacher made of the student; the base of `LiveTeacher`, `SameCheckpointTeacher`, `EMATeacher` and others.

    Args:
        offload: keep the copy in CPU memory between passes: it takes no device memory, and costs a transfer per
            micro-batch. Where FSDP shards the student, its shards stay on the device.
        context: what its prompt contains beside the student's.

    Example:
        >>> teacher = SameCheckpointTeacher(offload=True)
    """

    def __init__(self, *, offload: bool = False, context: ContextLike = None) -> None:
        super().__init__(context=context)
        self.offload = offload
        self._weight_copy: WeightCopy | None = None  # None: it scores with the student's weights or its base model's

    def load_weights(self, student: StudentHandle) -> None:
        """Copy the trainable weights as they are now."""
        self._weight_copy = WeightCopy(student.model, offload=self.offload)

    @property
    def model(self) -> nn.Module:
        """The student's module."""
        return self.student.model

    @property
    def weight_copy(self) -> WeightCopy:
        """The weights that it swaps in."""
        assert self._weight_copy is not None, "prepare makes the copy, and only strategies that have one ask for it"
        return self._weight_copy

    def active_weights(self) -> AbstractContextManager[None]:
        """Swap the copy in."""
        return self.weight_copy.swapped_in()

    def shard(self) -> None:
        """Shard the copy as the student's parameters are sharded."""
        if self._weight_copy is not None:
            self._weight_copy.pairs()

    @property
    def starts_as_student(self) -> bool:
        """True for every self-teacher."""
        return True

    @property
    def tensors(self) -> list[Tensor]:
        """The copy, if there is one."""
        return [] if self._weight_copy is None else self._weight_copy.tensors

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, without where the copy is kept: a resumed run may choose that anew."""
        return {name: value for name, value in super().settings.items() if name != "offload"}


class LiveTeacher(SelfTeacher):
    """The student's weights now, stop-gradient.

    It costs no memory and is unstable without care: the teacher drifts with the student (OPSD's authors call a live
    teacher "very unstable"; SDFT found the same).

    Args:
        context: what its prompt contains beside the student's; without one the loss is 0.

    Example:
        >>> OPSDTrainer(model, LiveTeacher(context="worked_solution"), train_dataset=rows)
    """

    strategy = "live"

    def __init__(self, *, context: ContextLike = None) -> None:
        super().__init__(context=context)

    def load_weights(self, student: StudentHandle) -> None:
        """Load nothing: it scores with the student's weights."""

    def active_weights(self) -> AbstractContextManager[None]:
        """Leave the student's weights as they are."""
        return nullcontext()

    @property
    def cautions(self) -> list[str]:
        """A warning that it is unstable."""
        return [
            "a live teacher drifts with its student, and nothing holds the two back (OPSD's authors found it very "
            "unstable): watch length and entropy, or take a frozen one."
        ]

    def describe(self) -> str:
        """Return whose weights these are."""
        return "the student as it is now, without gradient (unstable without care: watch length and entropy)"


class SameCheckpointTeacher(SelfTeacher):
    """The student's weights at step 0, frozen (OPSD, arXiv 2601.18734); the default teacher.

    With LoRA it is the base model (adapter off) where the adapter adds exactly nothing at step 0 and nothing outside it
    trains; else it copies what trains: a trained adapter that the student arrives with, biases or norms beside the
    adapter. With full fine-tuning it is one copy of the weights.

    Args:
        offload: keep the copy in CPU memory between passes.
        context: what its prompt contains beside the student's; without one its distributions are the student's at
            step 0, and training only holds the student near them.

    Example:
        >>> OPSDTrainer(model, SameCheckpointTeacher(context="answer_only"), train_dataset=rows)
    """

    strategy = "same_checkpoint"

    def load_weights(self, student: StudentHandle) -> None:
        """Copy the trainable weights, or nothing where switching the adapter off gives the same, now and later."""
        model, inside = student.model, adapter_parameters(student.model)
        only_adapter = hasattr(model, "disable_adapter") and all(
            p in inside for p in model.parameters() if p.requires_grad
        )
        if not (only_adapter and adapter_adds_nothing(model, len(student.tokenizer))):
            super().load_weights(student)

    def active_weights(self) -> AbstractContextManager[None]:
        """Switch the adapter off, or swap the copy in."""
        return adapter_off(self.model) if self._weight_copy is None else super().active_weights()

    def describe(self) -> str:
        """Return whose weights these are."""
        how = "adapter off" if self._weight_copy is None else "a frozen copy of its trainable weights"
        return f"the student at step 0, frozen ({how})"


class UpdatedSelfTeacher(SelfTeacher):
    """A self-teacher whose copy changes during training, so that a checkpoint holds the copy and how far it is.

    Example:
        >>> teacher = EMATeacher(0.99)
        >>> teacher.state_dict()["opsd.progress"]
    """

    progress = 0  # updates made, or the step that was copied: each strategy says which

    def state_dict(self) -> dict[str, Tensor]:
        """Return the copy by parameter name, and the progress."""
        return {**self.weight_copy.state_dict(), PROGRESS: torch.tensor(self.progress)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            CheckpointError: the state of another teacher or another student.
        """
        check_state_keys(state, [*self.weight_copy.values, PROGRESS], self.strategy)
        self.progress = int(state[PROGRESS])
        self.weight_copy.load({name: value for name, value in state.items() if name != PROGRESS})
