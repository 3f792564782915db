"""An exponential moving average of the student.

Only what training moves is averaged, in float32 whatever the student's dtype. With LoRA that is one more adapter, of
the averaged factors or of the averaged product (`products.py`); with full fine-tuning one more copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from opsd.contexts.base import Context
from opsd.errors import ConfigError, as_count, not_one_of
from opsd.models.sharding import is_sharded
from opsd.teachers.base import StudentHandle
from opsd.teachers.products import AverageOfProducts
from opsd.teachers.self_teacher import UpdatedSelfTeacher
from opsd.teachers.weight_copy import WeightCopy

AVERAGES = ("factors", "product")


class EMATeacher(UpdatedSelfTeacher):
    """teacher ← decay · teacher + (1 - decay) · student after every optimizer step (SDFT, arXiv 2601.19897).

    Args:
        decay: share of the old teacher that stays, in [0, 1). What SDPO and TRL call an update rate is 1 - decay.
        every: update after every n-th optimizer step; the decay is that of one update.
        warmup: begin with a smaller decay, min(decay, (1 + n) / (10 + n)) at update n = 1, 2, …, so that the first
            weights are forgotten sooner (the schedule of TensorFlow's ExponentialMovingAverage).
        average: with LoRA, what is averaged: the two "factors", or their "product" B·A. docs/decisions.md has the
            measured difference.
        rank: of the averaged product; unset, 4 times the adapter's. What a lower one leaves out is logged.
        offload: keep the average in CPU memory between passes.
        context: what it is shown beside the prompt.

    Raises:
        ConfigError: a setting outside its range.
    """

    strategy = "ema"

    def __init__(
        self,
        decay: float,
        *,
        every: int = 1,
        warmup: bool = False,
        average: str = "factors",
        rank: int | None = None,
        offload: bool = False,
        context: Context | str | Mapping[str, Any] | None = None,
    ):
        super().__init__(offload=offload, context=context)
        # YAML reads 1e-1 as text (it wants 1.0e-1).
        if isinstance(decay, str) or not 0.0 <= decay < 1.0:
            raise ConfigError(
                f"decay must be a number, at least 0 and below 1, and is {decay!r}. It is the share of the old teacher "
                "that stays: 1 would never move (SameCheckpointTeacher), 0 follows the student at once (LiveTeacher). "
                "An update rate of 0.05, as SDPO and TRL write it, is a decay of 0.95."
            )
        if average not in AVERAGES:
            raise ConfigError(not_one_of("average", average, AVERAGES))
        as_count("every", every)
        if not isinstance(warmup, bool):
            raise ConfigError(f"warmup is true or false, and not {warmup!r}.")
        if rank is not None and as_count("rank", rank) and average != "product":
            raise ConfigError("rank is that of an averaged product; set average to 'product', or leave rank out.")
        self.decay, self.every, self.warmup, self.average, self.rank = decay, every, warmup, average, rank

    def place(self, student: StudentHandle) -> None:
        """Start as the student."""
        if self.average == "product":
            self._weights = AverageOfProducts(student.model, self.rank, offload=self.offload)
        else:
            self._weights = WeightCopy(student.model, torch.float32, offload=self.offload)

    def shard(self) -> None:
        """Cut the average as the student is cut.

        Raises:
            ConfigError: it is one of products, whose factors must be whole.
        """
        if self.average == "product" and is_sharded(self.model):
            raise ConfigError("average='product' needs whole factors, and FSDP shards them. Use average='factors'.")
        super().shard()

    def after_step(self, step: int) -> None:
        """Move the average towards the student."""
        if step % self.every == 0:
            self.moved += 1
            self.weights.move_towards_model(1.0 - self.decay_of(self.moved))

    def decay_of(self, update: int) -> float:
        """Return the decay of update number `update` (1, 2, …)."""
        return min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay

    @property
    def cautions(self) -> list[str]:
        """A decay that was meant the other way round."""
        if self.decay >= 0.5:
            return []
        return [
            f"decay {self.decay:g} keeps {self.decay:.0%} of the old teacher, so after one update it is "
            f"{1 - self.decay:.0%} the student itself: almost a live teacher. What SDPO and TRL call an update rate is "
            f"1 - decay: did you mean {1 - self.decay:g}?"
        ]

    @property
    def settings(self) -> dict[str, Any]:
        """What its average depends on."""
        names = ("decay", "every", "warmup", "average", "rank")
        return {name: getattr(self, name) for name in names}

    @property
    def metrics(self) -> dict[str, float]:
        """What re-factorisation left out of an averaged product."""
        return {"teacher/average_lost": self._weights.lost} if isinstance(self._weights, AverageOfProducts) else {}

    def describe(self) -> str:
        """Whose weights these are and the formula they follow."""
        after = "after each step" if self.every == 1 else f"after every {self.every} steps"
        early = ", in update n at most (1 + n) / (10 + n) of the old" if self.warmup else ""
        what = " (of the product B·A)" if self.average == "product" else ""
        return (
            f"a moving average of the student{what}: teacher ← {self.decay:g} · teacher + {1 - self.decay:g} · student "
            f"{after}{early}, starting as the student"
        )
