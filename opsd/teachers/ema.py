"""An exponential moving average of the student.

Averages the trainable parameters only, in float32 whatever the student's dtype. With LoRA that is one more adapter (the
two factors are averaged, not their product); with full fine-tuning one more copy of the weights.
"""

from __future__ import annotations

from typing import Any

import torch

from opsd.errors import ConfigError
from opsd.settings import as_count
from opsd.teachers.prompting import ContextLike
from opsd.teachers.self_teacher import UpdatedSelfTeacher
from opsd.teachers.student import StudentHandle
from opsd.teachers.weight_copy import WeightCopy


class EMATeacher(UpdatedSelfTeacher):
    """teacher ← decay · teacher + (1 - decay) · student after every optimizer step (SDFT, arXiv 2601.19897).

    Args:
        decay: share of the old teacher that stays, in [0, 1). What SDPO and TRL call an update rate is 1 - decay.
        every: update after every n-th optimizer step; the decay is that of one update.
        warmup: begin with a smaller decay, min(decay, (1 + n) / (10 + n)) at update n = 1, 2, …, so that the first
            weights are forgotten sooner (the schedule of TensorFlow's ExponentialMovingAverage).
        offload: keep the average in CPU memory between passes.
        context: what its prompt contains beside the student's.

    Raises:
        ConfigError: a setting outside its range.

    Example:
        >>> OPSDTrainer(model, EMATeacher(0.99, context="demonstration"), train_dataset=rows)
    """

    strategy = "ema"

    def __init__(
        self,
        decay: float,
        *,
        every: int = 1,
        warmup: bool = False,
        offload: bool = False,
        context: ContextLike = None,
    ):
        super().__init__(offload=offload, context=context)
        # YAML reads 1e-1 as text (it wants 1.0e-1).
        if isinstance(decay, str) or not 0.0 <= decay < 1.0:
            raise ConfigError(
                f"decay must be a number, at least 0 and below 1, and is {decay!r}. It is the share of the old teacher "
                "that stays: 1 would never move (SameCheckpointTeacher), 0 follows the student at once (LiveTeacher). "
                "An update rate of 0.05, as SDPO and TRL write it, is a decay of 0.95."
            )
        as_count("every", every)
        if not isinstance(warmup, bool):
            raise ConfigError(f"warmup is true or false, and not {warmup!r}.")
        self.decay, self.every, self.warmup = decay, every, warmup

    def load_weights(self, student: StudentHandle) -> None:
        """Start the average as the student."""
        self._weight_copy = WeightCopy(student.model, torch.float32, offload=self.offload)

    def after_step(self, step: int) -> None:
        """Move the average towards the student."""
        if step % self.every == 0:
            self.progress += 1
            self.weight_copy.move_towards_model(1.0 - self.decay_of(self.progress))

    def left_undone(self, done: int, steps: int) -> str | None:
        """Return that it never moves, where its interval is as long as the run."""
        if self.every == 1 or self.every < steps:
            return None
        return f"it moves every {self.every} steps, and the run ends after {steps}: it stays the student of step 0"

    def decay_of(self, update: int) -> float:
        """Return the decay of update number `update` (1, 2, …)."""
        return min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay

    @property
    def cautions(self) -> list[str]:
        """A warning where the decay looks like an update rate."""
        if self.decay >= 0.5:
            return []
        return [
            f"decay {self.decay:g} keeps {self.decay:.0%} of the old teacher, so after one update it is "
            f"{1 - self.decay:.0%} the student itself: almost a live teacher. What SDPO and TRL call an update rate is "
            f"1 - decay: did you mean {1 - self.decay:g}?"
        ]

    @property
    def settings(self) -> dict[str, Any]:
        """Decay, interval and warm-up."""
        return {"decay": self.decay, "every": self.every, "warmup": self.warmup}

    def describe(self) -> str:
        """Return whose weights these are and the formula they follow."""
        after = "after each step" if self.every == 1 else f"after every {self.every} steps"
        early = ", in update n at most (1 + n) / (10 + n) of the old" if self.warmup else ""
        return (
            f"a moving average of the student: teacher ← {self.decay:g} · teacher + {1 - self.decay:g} · student "
            f"{after}{early}, starting as the student"
        )
