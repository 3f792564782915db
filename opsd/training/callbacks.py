"""Callbacks at the start and end of a step: update the teacher, log its metrics, stop on a signal.

Knows the teacher's hooks and transformers' callbacks; nothing of losses or rollouts.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from opsd.contexts.base import Context
from opsd.teachers import Teacher
from opsd.training.checkpoints import RESUME

# SLURM announces the end of a job with the signal that it is asked for, usually SIGUSR1.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class TeacherCallback(TrainerCallback):
    """Calls the teacher's hooks: `shard` before training, `before_step` and `after_step` around every optimizer step.

    >>> trainer.callback_handler.callbacks.insert(0, TeacherCallback(teacher, scorer.contexts, metrics, print))

    Args:
        teacher: the teacher.
        contexts: the contexts of everyone who scores; each is given the number of the step.
        metrics: lists of values by name, the trainer's, to which the teacher's metrics are added.
        notify: called with what the teacher reports, such as a refused snapshot.
    """

    def __init__(
        self,
        teacher: Teacher,
        contexts: Sequence[Context],
        metrics: dict[str, list[float]],
        notify: Callable[[str], None],
    ):
        self._teacher, self._contexts, self._metrics, self._notify = teacher, contexts, metrics, notify

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Shard the teacher's weights as the student's are sharded by now."""
        self._teacher.shard()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Call `before_step` with the log of the steps done, and give contexts the step."""
        self._set_step(state.global_step)
        self._report(self._teacher.before_step(state.global_step, state.log_history))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Call `after_step`, and log the teacher's metrics: the latest value of each, not a mean."""
        self._set_step(state.global_step)  # an evaluation may follow
        self._report(self._teacher.after_step(state.global_step))
        for name, value in self._teacher.metrics.items():
            self._metrics[name] = [value]

    def _set_step(self, step: int) -> None:
        for context in self._contexts:
            context.step = step

    def _report(self, message: str | None) -> None:
        if message:
            self._notify(message)


class GracefulStop(TrainerCallback):
    """Turns Ctrl-C, SIGTERM or SIGUSR1 into a checkpoint and a clean end after the step; a second Ctrl-C stops at once.

    transformers' own just-in-time checkpoint may save between a rollout and its optimizer step, when the random state
    has already moved on, and each process decides alone. Here all processes agree, and a resumed run is the same run.

    >>> with stop.listening():
    ...     trainer.train()
    >>> stop.stopped_by  # signal.SIGINT, or None after a run that reached its last step

    Args:
        accelerator: gathers the signals of all processes.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._received: int | None = None
        self.stopped_by: int | None = None

    def is_asked(self) -> bool:
        """Tell whether this process received a signal."""
        return self._received is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals for the length of the block; only the main thread can."""
        self._received = self.stopped_by = None
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            # A cluster signals every process, and a launcher then signals its workers again: only a person's second
            # Ctrl-C means "at once".
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self._received = number
        print(
            f"\n{signal.Signals(number).name}: finishing this step, then saving (Ctrl-C again stops at once).",
            flush=True,
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Request a log entry, a checkpoint and the end, if any process received a signal."""
        received = torch.tensor(self._received or 0, device=self._accelerator.device)
        number = int(self._accelerator.gather(received).max())
        if number:
            self.stopped_by = number
            control.should_save = control.should_log = control.should_training_stop = True
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Print which signal stopped the run, where it was saved, and how to resume it."""
        if self.stopped_by is not None:
            step = state.global_step
            self._accelerator.print(
                f"stopped by {signal.Signals(self.stopped_by).name} after step {step}; saved checkpoint-{step} in "
                f"{args.output_dir}. Resume: {RESUME}.",
                flush=True,
            )
