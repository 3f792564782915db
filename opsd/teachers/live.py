"""The student as it is now, without gradient.

Free, and unstable without care: what the student drifts into, its teacher drifts into as well (OPSD's authors call a
live teacher "very unstable"; SDFT found the same).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn

from opsd.teachers.base import StudentHandle
from opsd.teachers.local import LocalTeacher


class LiveTeacher(LocalTeacher):
    """The student's weights now, stop-gradient.

    Args:
        context: what it is shown beside the prompt; without one the loss is 0.
    """

    strategy = "live"

    def place(self, student: StudentHandle) -> None:
        """Nothing to place: it is the student."""

    @property
    def model(self) -> nn.Module:
        """The student's own module."""
        return self._student.model

    def teaching(self) -> AbstractContextManager[None]:
        """The student's own state."""
        return nullcontext()

    @property
    def words(self) -> str:
        """Whose weights these are."""
        return "the student as it is now, without gradient (unstable without care: watch length and entropy)"
