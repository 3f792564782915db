"""A step that cannot be finished, because no server scores its rollouts: saves the run as it was before that step.

A checkpoint in the middle of a step would have random states that sampled its rollouts, and metrics of half of it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from opsd.errors import ServerError
from opsd.training.checkpoints import RESUME


class HalfStep(TrainerCallback):
    """Remembers what a step changes before its update.

    >>> half_step = HalfStep(trainer)
    >>> with half_step.saving():  # where a rollout cannot be scored, a checkpoint of the step before is saved
    ...     trainer.train()

    Args:
        trainer: an OPSDTrainer.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._random: tuple[Any, ...] = ()  # before the step, and before what an epoch's first batch draws
        self._pending: tuple[Any, ...] = ()  # metrics that are not logged yet; of a half step only

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget an earlier run of this trainer."""
        self._random = self._pending = ()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember the metrics that are not logged yet."""
        if not self._trainer.teacher.can_fail:
            return
        lists = {name: list(values) for name, values in self._trainer._metrics["train"].items()}
        self._pending = lists, self._trainer._averages["train"].state, state.num_input_tokens_seen

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember the random states that this step's checkpoint has or would have."""
        self._pending = ()
        if self._trainer.teacher.can_fail:
            on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
            self._random = random.getstate(), np.random.get_state(), torch.get_rng_state(), on_devices

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Save a checkpoint where a block ends because no server answers.

        Raises:
            ServerError: says what was saved, and how to go on.
        """
        try:
            yield
        except ServerError as error:
            if not self._random:  # no step was done: what it began from is there
                raise
            self._go_back()
            self._trainer._save_checkpoint(self._trainer.model, None)
            step = self._trainer.state.global_step
            raise ServerError(
                f"{error} The run has done {step} steps; checkpoint-{step} is saved in "
                f"{self._trainer.args.output_dir}. Resume: {RESUME}."
            ) from error

    def _go_back(self) -> None:
        python, of_numpy, of_torch, on_devices = self._random
        random.setstate(python)
        np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)
        if on_devices is not None:
            torch.cuda.set_rng_state_all(on_devices)
        self._trainer.ahead.forget_this_step()
        if self._pending:
            lists, tallies, self._trainer.state.num_input_tokens_seen = self._pending
            self._trainer._metrics["train"].clear()
            self._trainer._metrics["train"].update(lists)
            self._trainer._averages["train"].load(tallies)
