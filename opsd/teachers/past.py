"""An earlier self: a checkpoint from elsewhere, or from this very run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from opsd.errors import as_count
from opsd.teachers.base import StudentHandle
from opsd.teachers.sibling import SiblingTeacher
from opsd.teachers.weight_copy import WeightCopy

OF_THIS_RUN = re.compile(r"checkpoint-(\d+)")


class PastCheckpointTeacher(SiblingTeacher):
    """An earlier self: a checkpoint of the student, from this run, another run or the hub.

    Recovers what a later fine-tune cost (Thinking Machines, "On-Policy Distillation", 2025), or keeps a model near
    what it was. A folder with a LoRA adapter is loaded on top of the base it names.

    Args:
        model: the checkpoint's folder or hub id; or "checkpoint-N" (and no such folder here) for the student as it is
            after step N of this run: until then the teacher is the student as it began.
        revision: branch, tag or commit of a hub id.
        dtype, device, offload, quantize, attn_implementation: as in SiblingTeacher; of a checkpoint of this run only
            `offload` counts.
        tokenizer: its tokenizer; None loads it from the same place.
        context: what it is shown beside the prompt.
    """

    strategy = "past_checkpoint"
    step: int | None = None  # of this run; None where the checkpoint comes from elsewhere
    _own: WeightCopy | None = None

    def _source(self, model: str | PathLike[str] | nn.Module) -> str:
        found = OF_THIS_RUN.fullmatch(model) if isinstance(model, str) and not Path(model).is_dir() else None
        if found is None:
            return super()._source(model)
        self.step = as_count("the step of a checkpoint of this run", int(found[1]))
        return found[0]

    def place(self, student: StudentHandle) -> None:
        """Load the checkpoint, or begin as the student and wait for the step."""
        if self.step is None:
            super().place(student)
        else:
            self._model = student.model
            self._own = WeightCopy(student.model, offload=self.placement.offload)

    def teaching(self) -> AbstractContextManager[None]:
        """Swap the values in, where they are the student's."""
        return super().teaching() if self._own is None else self._own.swapped_in()

    def shard(self) -> None:
        """Follow the student into its sharded form."""
        if self._own is None:
            super().shard()
        else:
            self._own.pairs()

    @property
    def starts_as_student(self) -> bool:
        """Whether it waits for a step of this run."""
        return self.step is not None

    @property
    def tensors(self) -> list[Tensor]:
        """The model, or the values."""
        return super().tensors if self._own is None else self._own.tensors

    def after_step(self, step: int) -> str | None:
        """Become the student when its step has come."""
        if self._own is None or step != self.step:
            return None
        self._own.copy_model()
        return f"the teacher is now the student of step {step}, and stays so"

    def state_dict(self) -> dict[str, Tensor]:
        """Return the values, where they are the student's."""
        return {} if self._own is None else self._own.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take them back."""
        if self._own is not None:
            self._own.load(state)

    @property
    def settings(self) -> dict[str, Any]:
        """Which checkpoint; of this run's own the weights come and go."""
        return super().settings if self.step is None else {"step": self.step}

    def describe(self) -> str:
        """Whose weights these are."""
        if self.step is not None:
            return f"the student as it will be after step {self.step} of this run; until then as it began"
        return f"an earlier checkpoint, frozen: {self.source or type(self._model).__name__}"
