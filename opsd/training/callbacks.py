"""Ctrl-C and SIGTERM end a run at the end of its step, with a checkpoint.

transformers' own just-in-time checkpoint may save between a rollout and its optimizer step, when the random state has
already moved on, and each process decides by itself; here all processes agree, and a resumed run is the same run.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class GracefulStop(TrainerCallback):
    """Turns a signal into a checkpoint and an orderly end; a second Ctrl-C ends the process at once.

    `stopped_by` is the signal that ended the run before its time, or None: one that came after the last step did not.

    Args:
        accelerator: tells the processes of one run of each other's signals.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._received: int | None = None
        self.stopped_by: int | None = None

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

    def describe(self, step: int, output_dir: str) -> str:
        """Say what stopped the run, and how it goes on."""
        assert self.stopped_by is not None
        return (
            f"stopped by {signal.Signals(self.stopped_by).name} after step {step}; saved checkpoint-{step} in "
            f"{output_dir}. Resume: trainer.train(resume_from_checkpoint=True), or "
            "`opsd train CONFIG --resume_from_checkpoint true`."
        )

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
        """Ask for a log entry, a checkpoint and the end, if any process was told to stop."""
        told = torch.tensor(self._received or 0, device=self._accelerator.device)
        number = int(self._accelerator.gather(told).max())
        if number:
            self.stopped_by = number
            control.should_save = control.should_log = control.should_training_stop = True
        return control
