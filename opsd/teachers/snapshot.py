"""A copy of the student, renewed every n steps if a gate accepts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opsd.errors import ConfigError, did_you_mean
from opsd.models.sharding import from_first_process
from opsd.settings import as_count
from opsd.teachers.base import History
from opsd.teachers.gate import Gate
from opsd.teachers.prompting import ContextLike
from opsd.teachers.self_teacher import UpdatedSelfTeacher


class SnapshotTeacher(UpdatedSelfTeacher):
    """A copy of the student that is renewed every n steps and is frozen in between.

    CRISP (arXiv 2603.05433) renews every 50 steps without a gate; CGTR (arXiv 2606.03532) with one.

    Args:
        every: steps between renewals.
        gate: a Gate, or a mapping of its arguments; a renewal that it refuses is printed with the reason. None accepts
            every renewal.
        offload: keep the copy in CPU memory between passes.
        context: what its prompt contains beside the student's.

    Raises:
        ConfigError: a number outside its range, or a gate that cannot work.

    Example:
        >>> SnapshotTeacher(50, gate={"metric": "reward", "tolerance": 0.02}, context="concise")
    """

    strategy = "snapshot"

    def __init__(
        self,
        every: int,
        *,
        gate: Gate | Mapping[str, Any] | None = None,
        offload: bool = False,
        context: ContextLike = None,
    ):
        super().__init__(offload=offload, context=context)
        self.every = as_count("every", every)
        self.gate = _as_gate(gate)

    @property
    def watches(self) -> dict[str, int]:
        """The metrics that its gate reads."""
        return {} if self.gate is None else dict.fromkeys(self.gate.watches, self.every)

    def before_step(self, done: int, history: History) -> str | None:
        """Copy the student if a renewal is due and the gate accepts it; return what happened, to be printed."""
        if done == 0 or done % self.every:
            return None
        # Some metrics are known to one process only, and all must decide alike.
        problem = None if self.gate is None else from_first_process(self._problem(done, history))
        if problem:
            return (
                f"the teacher was not renewed at step {done}: {problem}; it stays the student of step {self.progress}"
            )
        self.weight_copy.copy_model()
        self.progress = done
        return f"the teacher was renewed: it is now the student of step {done}"

    def _problem(self, done: int, history: History) -> str | None:
        assert self.gate is not None
        windows = [range(end - self.every + 1, end + 1) for end in (self.every, self.progress, done)]
        return self.gate.problem(history, *windows)

    def left_undone(self, done: int, steps: int) -> str | None:
        """Return that it is never renewed, where no renewal is due or the gate refused each."""
        due = (steps - 1) // self.every
        if due == 0:
            return f"it is renewed every {self.every} steps, and the run ends after {steps}: it stays that of step 0"
        if done >= steps and self.progress == 0:
            return f"0 of {due} renewals: the gate refused each, and it stayed the student of step 0"
        return None

    @property
    def metrics(self) -> dict[str, float]:
        """The step that was copied."""
        return {"teacher/snapshot_of_step": self.progress}

    @property
    def settings(self) -> dict[str, Any]:
        """Interval and gate."""
        return {"every": self.every, "gate": None if self.gate is None else self.gate.describe()}

    def describe(self) -> str:
        """Return whose weights these are and when they change."""
        condition = f" if {self.gate.describe()}" if self.gate else ""
        return f"a copy of the student, renewed every {self.every} steps{condition}; at first of step 0"


def _as_gate(value: Any) -> Gate | None:
    if value is None or isinstance(value, Gate):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"a gate is a mapping of its conditions, such as {{metric: reward}}, and not {value!r}.")
    known = Gate.__dataclass_fields__
    for key in value:
        if key not in known:
            raise ConfigError(f"a gate has no setting {key!r}.{did_you_mean(key, known)} It has: {', '.join(known)}.")
    return Gate(**value)
