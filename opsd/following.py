"""Lets the teacher follow the student: into its sharded form, and after every optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback

from opsd.contexts.base import Context
from opsd.teachers import Teacher


class TeacherCallback(TrainerCallback):
    """Tells the teacher what happens to the student.

    Args:
        teacher: the teacher.
        contexts: what it and others who score are shown.
        metrics: where what it says of itself is logged: lists by name.
        say: tells the user what it did.
    """

    def __init__(self, teacher: Teacher, contexts: Sequence[Context], metrics: Any, say: Callable[[str], None]):
        self._teacher, self._contexts, self._metrics, self._say = teacher, contexts, metrics, say

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Shard what it holds as the student is sharded by now."""
        self._teacher.shard()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let it move by what was logged of the steps done, and tell contexts which step this is."""
        for context in self._contexts:
            context.step = state.global_step
        self._tell(self._teacher.before_step(state.global_step, state.log_history))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let it move, and log what it says of itself: the latest, not a mean."""
        for context in self._contexts:  # an evaluation may follow
            context.step = state.global_step
        self._tell(self._teacher.after_step(state.global_step))
        for name, value in self._teacher.metrics.items():
            self._metrics[name] = [value]

    def _tell(self, said: str | None) -> None:
        if said:
            self._say(said)
