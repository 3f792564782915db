"""Teachers made of teachers: what a mixture and a route have in common.

Preparing, following the student, saving and stating costs go to every part; which part answers for what is the
strategy's. Knows the interface of teachers only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from torch import Tensor

from opsd.contexts.base import Context
from opsd.contexts.reading import as_context
from opsd.teachers.base import History, Row, StudentHandle, Teacher

SEPARATOR = "/"  # between a part's name and its own names in a checkpoint


class CompositeTeacher(Teacher):
    """A teacher made of others, each with a context of its own.

    Args:
        parts: the others by name.
        context: what those are shown that have no context of their own.
    """

    def __init__(
        self,
        parts: Mapping[str, Teacher],
        *,
        context: Context | str | Mapping[str, Any] | None = None,
    ):
        super().__init__(context=context)
        self.parts = dict(parts)
        if self.context is not None:
            self.parts = self._parts_with_default(self.context)

    def _parts_with_default(self, context: Context) -> dict[str, Teacher]:
        """Return the parts with a context where they have none; a part with two names stays one."""
        shown = {id(part): part.with_default_context(context) for part in self.parts.values()}
        return {name: shown[id(part)] for name, part in self.parts.items()}

    def with_default_context(self, context: Context) -> Teacher:
        """Return the same teachers, those without a context shown this one."""
        other = copy.copy(self)
        other.parts = self._parts_with_default(context)
        return other

    def with_contexts(self, change: Callable[[Context | None], Context | None]) -> Teacher:
        """Return the same teachers, each of their contexts changed; a part with two names stays one."""
        changed = {id(part): part.with_contexts(change) for part in self.parts.values()}
        other = copy.copy(self)
        other.context = change(self.context)
        other.parts = {name: changed[id(part)] for name, part in self.parts.items()}
        return other

    @property
    def owners(self) -> list[Teacher]:
        """The parts that hold weights: one that has several names, or is shown several things, counts once."""
        return list({id(part): part for part in self.parts.values()}.values())

    @property
    def leaves(self) -> list[Teacher]:
        """The owners that are not made of others, each once, however many parts at whatever depth it is in."""
        nested = [part.leaves if isinstance(part, CompositeTeacher) else [part] for part in self.owners]
        return list({id(leaf): leaf for leaves in nested for leaf in leaves}.values())

    def prepare(self, student: StudentHandle) -> None:
        """Prepare every teacher once, then those that are made of them."""
        for leaf in self.leaves:
            leaf.prepare(student)
        self.compose(student)

    def compose(self, student: StudentHandle) -> None:
        """Take hold of the parts, whose teachers are prepared."""
        super().prepare(student)
        for part in self.owners:
            if isinstance(part, CompositeTeacher):
                part.compose(student)

    def shard(self) -> None:
        """Shard every teacher."""
        for leaf in self.leaves:
            leaf.shard()

    def after_step(self, step: int) -> str | None:
        """Let every teacher follow."""
        return "\n".join(filter(None, [leaf.after_step(step) for leaf in self.leaves])) or None

    def before_step(self, done: int, history: History) -> str | None:
        """Let every teacher follow."""
        return "\n".join(filter(None, [leaf.before_step(done, history) for leaf in self.leaves])) or None

    def state_dict(self) -> dict[str, Tensor]:
        """Return every teacher's state, its names behind the teacher's number."""
        return {
            f"{number}{SEPARATOR}{name}": value
            for number, leaf in enumerate(self.leaves)
            for name, value in leaf.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take every teacher's state back."""
        for number, leaf in enumerate(self.leaves):
            start = f"{number}{SEPARATOR}"
            leaf.load_state_dict({name[len(start) :]: v for name, v in state.items() if name.startswith(start)})

    def with_context(self, context: Context | str | Mapping[str, Any] | None) -> Self:
        """Return the same teachers, weights and all, all shown something else."""
        other = copy.copy(self)
        other.context = as_context(context)
        other.parts = {name: part.with_context(context) for name, part in self.parts.items()}
        return other

    @property
    def views(self) -> list[Teacher]:
        """Everyone who is shown a prompt."""
        return [view for part in self.parts.values() for view in part.views]

    def views_of(self, row: Row) -> list[Teacher]:
        """Return those who score this row."""
        return [view for part in self.parts.values() for view in part.views_of(row)]

    def check_rows(self, dataset: Any, columns: Sequence[str], rollout_fields: Sequence[str] = ()) -> None:
        """Check every part's context."""
        for part in self.parts.values():
            part.check_rows(dataset, columns, rollout_fields)

    @property
    def tensors(self) -> list[Tensor]:
        """Every teacher's."""
        return [tensor for leaf in self.leaves for tensor in leaf.tensors]

    @property
    def starts_as_student(self) -> bool:
        """Whether all of its teachers do."""
        return all(leaf.starts_as_student for leaf in self.leaves)

    @property
    def cautions(self) -> list[str]:
        """Every teacher's."""
        return [caution for leaf in self.leaves for caution in leaf.cautions]

    @property
    def collective(self) -> bool:
        """Whether any part's processes exchange weights."""
        return any(part.collective for part in self.owners)

    @property
    def watches(self) -> dict[str, int]:
        """What any part reads, at the shortest of their intervals."""
        watched = [item for part in self.owners for item in part.watches.items()]
        return {name: min(steps for other, steps in watched if other == name) for name, _ in watched}

    @property
    def metrics(self) -> Mapping[str, float]:
        """What the teachers say of themselves, numbered where several say the same."""
        said = [(number, *item) for number, leaf in enumerate(self.leaves) for item in leaf.metrics.items()]
        names = [name for _, name, _ in said]
        return {name if names.count(name) == 1 else f"{name}/{number}": value for number, name, value in said}

    @property
    def max_length(self) -> int | None:
        """The shortest of the parts'."""
        return min((n for part in self.owners if (n := part.max_length) is not None), default=None)

    @property
    def settings(self) -> dict[str, Any]:
        """Every part's description."""
        return {"parts": {name: part.description for name, part in self.parts.items()}}
