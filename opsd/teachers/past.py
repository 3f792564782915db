"""An earlier checkpoint of the student as teacher, from elsewhere or from this run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from opsd.settings import as_count
from opsd.teachers.checks import check_state_keys
from opsd.teachers.sibling import SiblingTeacher
from opsd.teachers.student import StudentHandle
from opsd.teachers.weight_copy import WeightCopy

OF_THIS_RUN = re.compile(r"checkpoint-(\d+)")


class PastCheckpointTeacher(SiblingTeacher):
    """A checkpoint of the student, from this run, another run or the hub.

    Recovers what a later fine-tune cost (Thinking Machines, "On-Policy Distillation", 2025), or keeps a model near an
    earlier one. A folder with a LoRA adapter is loaded on top of the base it names.

    Args:
        model: the checkpoint's folder or hub id; or "checkpoint-N", where no folder has that name, for the student
            after step N of this run: until then the teacher is the student at step 0.
        revision: branch, tag or commit of a hub id.
        dtype, device, offload, quantize, attn_implementation: as in SiblingTeacher; a checkpoint of this run reads only
            `offload`.
        tokenizer: its tokenizer; None loads it from the same place.
        context: what its prompt contains beside the student's.

    Example:
        >>> PastCheckpointTeacher("organisation/before-the-fine-tune")
        >>> PastCheckpointTeacher("checkpoint-100", context="answer_only")  # of this run
    """

    strategy = "past_checkpoint"
    step: int | None = None  # of this run; None where the checkpoint comes from elsewhere
    _weight_copy: WeightCopy | None = None  # the student's weights, where the checkpoint is one of this run

    def _source(self, model: str | PathLike[str] | nn.Module) -> str:
        match = OF_THIS_RUN.fullmatch(model) if isinstance(model, str) and not Path(model).is_dir() else None
        if match is None:
            return super()._source(model)
        self.step = as_count("the step of a checkpoint of this run", int(match[1]))
        return match[0]

    def load_weights(self, student: StudentHandle) -> None:
        """Load the checkpoint, or copy the student until its step has come."""
        if self.step is None:
            super().load_weights(student)
        else:
            self._model = student.model
            self._weight_copy = WeightCopy(student.model, offload=self.placement.offload)

    def active_weights(self) -> AbstractContextManager[None]:
        """Swap the copy in, where it is one of the student."""
        return super().active_weights() if self._weight_copy is None else self._weight_copy.swapped_in()

    def shard(self) -> None:
        """Follow the student into its sharded form."""
        if self._weight_copy is None:
            super().shard()
        else:
            self._weight_copy.pairs()

    @property
    def starts_as_student(self) -> bool:
        """Whether it waits for a step of this run."""
        return self.step is not None

    @property
    def tensors(self) -> list[Tensor]:
        """The model's weights, or the copy."""
        return super().tensors if self._weight_copy is None else self._weight_copy.tensors

    def after_step(self, step: int) -> str | None:
        """Copy the student when its step has come."""
        if self._weight_copy is None or step != self.step:
            return None
        self._weight_copy.copy_model()
        return f"the teacher is now the student of step {step}, and stays so"

    def left_undone(self, done: int, steps: int) -> str | None:
        """Return that its step never comes, where it does not."""
        if self.step is None or self.step < steps:
            return None
        return f"it becomes the student of step {self.step}, and the run ends after {steps}: it stays that of step 0"

    def state_dict(self) -> dict[str, Tensor]:
        """Return the copy, where it is one of the student."""
        return {} if self._weight_copy is None else self._weight_copy.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            CheckpointError: the state of another teacher or another student.
        """
        check_state_keys(state, self._weight_copy.values if self._weight_copy else (), self.strategy)
        if self._weight_copy is not None:
            self._weight_copy.load(state)

    @property
    def settings(self) -> dict[str, Any]:
        """The checkpoint's source, or its step in this run."""
        return super().settings if self.step is None else {"step": self.step}

    def describe(self) -> str:
        """Return whose weights these are."""
        if self.step is not None:
            return f"the student as it will be after step {self.step} of this run; until then the student at step 0"
        return f"an earlier checkpoint, frozen: {self.source or type(self._model).__name__}"
