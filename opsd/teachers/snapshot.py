"""A copy of the student, renewed every n steps if a gate lets it pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opsd.context import PrivilegedContext
from opsd.errors import ConfigError, did_you_mean
from opsd.sharding import agreed
from opsd.teachers.base import History
from opsd.teachers.gate import Gate
from opsd.teachers.own import MovingTeacher


class SnapshotTeacher(MovingTeacher):
    """The student as it was at its last renewal: between renewals as still as a frozen teacher.

    CRISP (arXiv 2603.05433) renews every 50 steps, without a gate; CGTR (arXiv 2606.03532) with one.

    Args:
        every: steps between renewals.
        gate: a Gate, or a mapping of its arguments; a renewal that it refuses is printed with the reason. None lets
            every renewal pass.
        offload: keep the copy in CPU memory between passes.
        context: what it is shown beside the prompt.

    Raises:
        ConfigError: a number outside its range, or a gate that cannot work.
    """

    strategy = "snapshot"

    def __init__(
        self,
        every: int,
        *,
        gate: Gate | Mapping[str, Any] | None = None,
        offload: bool = False,
        context: PrivilegedContext | str | Mapping[str, Any] | None = None,
    ):
        super().__init__(offload=offload, context=context)
        if not isinstance(every, int) or every < 1:
            raise ConfigError(f"every counts steps between renewals, at least 1, and is {every!r}.")
        self.every = every
        self.gate = _as_gate(gate)
        if self.gate and every < 2:
            raise ConfigError("a gate compares windows of logged steps, which `every: 1` leaves empty. Use at least 2.")

    @property
    def watches(self) -> frozenset[str]:
        """The metrics that its gate reads."""
        return frozenset() if self.gate is None else self.gate.watches

    def after_step(self, step: int, history: History = ()) -> str | None:
        """Become the student, if it is time and the gate agrees; returns what happened, for the log."""
        if step % self.every:
            return None
        # Some metrics are known to one process only, and all must decide alike.
        problem = None if self.gate is None else agreed(self._problem(step, history))
        if problem:
            return f"the teacher was not renewed at step {step}: {problem}; it stays the student of step {self.moved}"
        self.weights.copy_model()
        self.moved = step
        return f"the teacher was renewed: it is now the student of step {step}"

    def _problem(self, step: int, history: History) -> str | None:
        assert self.gate is not None
        # A step is logged after teachers were told of it, so a window ends one step before its renewal.
        window = [range(max(end - self.every, 1), end) for end in (self.every, self.moved, step)]
        return self.gate.problem(history, *window)

    @property
    def metrics(self) -> dict[str, float]:
        """Of which step it is a copy."""
        return {"teacher/snapshot_of_step": self.moved}

    @property
    def settings(self) -> dict[str, Any]:
        """Steps and gate."""
        return {"every": self.every, "gate": None if self.gate is None else self.gate.words}

    @property
    def words(self) -> str:
        """Whose weights these are and when they change."""
        condition = f" if {self.gate.words}" if self.gate else ""
        return f"a copy of the student, renewed every {self.every} steps{condition}; step 0 to begin with"


def _as_gate(value: Gate | Mapping[str, Any] | None) -> Gate | None:
    if value is None or isinstance(value, Gate):
        return value
    known = Gate.__dataclass_fields__
    for key in value:
        if key not in known:
            raise ConfigError(f"a gate has no setting {key!r}.{did_you_mean(key, known)} It has: {', '.join(known)}.")
    return Gate(**value)
