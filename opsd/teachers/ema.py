"""An exponential moving average of the student.

Only what training moves is averaged, in float32 whatever the student's dtype. With LoRA that is one more adapter (the
factors are averaged, not their product); with full fine-tuning one more copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from opsd.context import PrivilegedContext
from opsd.errors import ConfigError
from opsd.teachers.base import Cost, StudentHandle
from opsd.teachers.local import LocalTeacher
from opsd.teachers.weights import TrainableWeights


class EMATeacher(LocalTeacher):
    """teacher ← decay · teacher + (1 - decay) · student after every optimizer step (SDFT, arXiv 2601.19897).

    Args:
        decay: share of the old teacher that stays, in [0, 1). What SDPO and TRL call an update rate is 1 - decay.
        context: what it is shown beside the prompt.

    Raises:
        ConfigError: decay outside its range.
    """

    strategy = "ema"

    def __init__(self, decay: float, *, context: PrivilegedContext | str | Mapping[str, Any] | None = None):
        super().__init__(context=context)
        # YAML reads 1e-1 as text (it wants 1.0e-1).
        if isinstance(decay, str) or not 0.0 <= decay < 1.0:
            raise ConfigError(
                f"decay must be a number, at least 0 and below 1, and is {decay!r}. It is the share of the old teacher "
                "that stays: 1 would never move (SameCheckpointTeacher), 0 follows the student at once (LiveTeacher). "
                "An update rate of 0.05, as SDPO and TRL write it, is a decay of 0.95."
            )
        self.decay = decay

    def place(self, student: StudentHandle) -> None:
        """Start as the student."""
        self._weights = TrainableWeights(student.model, dtype=torch.float32)

    @property
    def model(self) -> nn.Module:
        """The student's own module."""
        return self._student.model

    def teaching(self) -> AbstractContextManager[None]:
        """Swap the average in."""
        return self._weights.swapped_in()

    def after_step(self, step: int) -> None:
        """Move the average towards the student."""
        self._weights.move_towards_model(1.0 - self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average, float32 by parameter name."""
        return self._weights.values

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the average back."""
        self._weights.load(state)

    @property
    def settings(self) -> dict[str, Any]:
        """The decay."""
        return {"decay": self.decay}

    @property
    def words(self) -> str:
        """Whose weights these are and the formula they follow."""
        return (
            f"a moving average of the student: teacher ← {self.decay:g} · teacher + {1 - self.decay:g} · student "
            "after each step, starting as the student"
        )

    @property
    def cost(self) -> Cost:
        """The float32 average."""
        return Cost(self._weights.megabytes)
