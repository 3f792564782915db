"""Lets the teacher follow the student: into its sharded form, and after every optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from opsd.teachers import Teacher


class FollowStudent(TrainerCallback):
    """Tells the teacher what happens to the student.

    Args:
        teacher: the teacher.
        metrics: where what it says of itself is logged: lists by name.
        say: tells the user what it did.
    """

    def __init__(self, teacher: Teacher, metrics: Any, say: Callable[[str], None]):
        self._teacher, self._metrics, self._say = teacher, metrics, say

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Shard what it holds as the student is sharded by now."""
        self._teacher.shard()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let it move by what was logged of the steps done."""
        self._tell(self._teacher.before_step(state.global_step, state.log_history))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let it move, and log what it says of itself: the latest, not a mean."""
        self._tell(self._teacher.after_step(state.global_step))
        for name, value in self._teacher.metrics.items():
            self._metrics[name] = [value]

    def _tell(self, said: str | None) -> None:
        if said:
            self._say(said)
