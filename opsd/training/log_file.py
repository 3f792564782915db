"""Writes each log entry as a line of `log.jsonl` at once: a run that broke off has it, and one that goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from opsd.health.log import FILE, Lines


class LogFile(TrainerCallback):
    """Keeps the log of a run in its folder.

    >>> trainer.add_callback(LogFile(print))

    Args:
        say: prints a line.
    """

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._lines: Lines | None = None  # in the process that writes

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write what the trainer has logged before: of a resumed run up to its checkpoint, of a new one nothing."""
        if args.should_save and state.is_world_process_zero:
            self._lines = Lines(Path(args.output_dir) / FILE)
            self._lines.begin(state.log_history)
            self._give_up_if_damaged()

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: Mapping[str, Any], **kwargs: Any
    ) -> None:
        """Add an entry."""
        if self._lines is not None:
            self._lines.append([{**logs, "step": state.global_step}])
            self._give_up_if_damaged()

    def _give_up_if_damaged(self) -> None:
        if self._lines is not None and self._lines.damage:
            self._say(f"log         {FILE} is not complete: {self._lines.damage}")
            self._lines = None
