"""Teachers made of teachers: what a mixture, a route and a control have in common.

Passes hooks on to every member once, also where it is part of several things. Which part scores which token is the
strategy's. Knows the interface of teachers only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from opsd.errors import CheckpointError, ConfigError
from opsd.teachers.base import History, Teacher, TeacherView
from opsd.teachers.prompting import CompositePrompts, ContextLike, TeacherPrompts
from opsd.teachers.student import StudentHandle

SEPARATOR = "/"  # between a member's number and its names in a checkpoint


def as_teacher(value: Any, what: str) -> Teacher:
    """Return `value` if it is a Teacher object.

    Args:
        value: what a user gave.
        what: what it is for, as the message calls it.

    Raises:
        ConfigError: a class, a name, a mapping, or something else.
    """
    if not isinstance(value, Teacher):
        raise ConfigError(wrong_teacher(value, what))
    return value


def wrong_teacher(value: Any, what: str = "a teacher") -> str:
    """Return the message for a value that is no Teacher object."""
    start = f"{what} is a Teacher object, and this is"
    if isinstance(value, type):
        way_out = f"Make one: {value.__name__}(…)." if issubclass(value, Teacher) else "Extend opsd.Teacher."
        return f"{start} the class {value.__name__}. {way_out}"
    if isinstance(value, str | Mapping):
        return (
            f"{start} {value!r:.80}. Names and mappings are read in one place, which says which of them is wrong. "
            f"Write load_teacher({value!r:.80}), or load_teacher({{'strategy': …, …}}) for the whole."
        )
    return (
        f"{start} a {type(value).__name__}. Take a strategy of opsd.teachers, a name from `opsd teachers`, or extend "
        "opsd.Teacher: docs/your_own_teacher.md."
    )


class CompositeTeacher(Teacher):
    """A teacher made of others, each with its own context.

    Args:
        parts: the others by name; one object may have several names.
        prompts: what each part reads, where that is not its own; made of `parts` otherwise.
        context: the context of parts that have none.

    Raises:
        ConfigError: a part that is no Teacher object.

    Example:
        >>> class First(CompositeTeacher):
        ...     def score(self, rollouts):
        ...         return self.view("first").score(rollouts)
        >>> First({"first": EMATeacher(0.99), "second": LiveTeacher()}, context="answer_only")
    """

    def __init__(
        self,
        parts: Mapping[str, Teacher],
        *,
        prompts: TeacherPrompts | None = None,
        context: ContextLike = None,
    ):
        super().__init__()
        self.parts = {
            name: as_teacher(part, f"part {name!r} of this {self.strategy} teacher") for name, part in parts.items()
        }
        if prompts is None:
            prompts = CompositePrompts(self, {name: part.prompts for name, part in self.parts.items()})
        self.prompts = prompts if context is None else prompts.with_default(context)

    def view(self, name: str) -> TeacherView:
        """Return a part and the prompts that it reads here."""
        prompts = self.prompts
        assert isinstance(prompts, CompositePrompts)
        return TeacherView(self.parts[name], prompts.parts[name])

    @property
    def distinct_parts(self) -> list[Teacher]:
        """The parts, each object once."""
        return list({id(part): part for part in self.parts.values()}.values())

    @property
    def members(self) -> list[Teacher]:
        """The teachers that hold weights, each once, at whatever depth."""
        members = [member for part in self.distinct_parts for member in part.members]
        return list({id(member): member for member in members}.values())

    def prepare(self, student: StudentHandle) -> None:
        """Prepare every member once."""
        for member in self.members:
            member.prepare(student)
        self._tell_composites(student)

    def _tell_composites(self, student: StudentHandle) -> None:
        """Give the student to this composite and those inside it, whose members are prepared."""
        super().prepare(student)
        for part in self.distinct_parts:
            if isinstance(part, CompositeTeacher):
                part._tell_composites(student)

    def shard(self) -> None:
        """Shard every member."""
        for member in self.members:
            member.shard()

    def after_step(self, step: int) -> str | None:
        """Let every member follow the student."""
        return "\n".join(filter(None, [member.after_step(step) for member in self.members])) or None

    def before_step(self, done: int, history: History) -> str | None:
        """Let every member follow the student."""
        return "\n".join(filter(None, [member.before_step(done, history) for member in self.members])) or None

    def left_undone(self, done: int, steps: int) -> str | None:
        """Return what never comes of any member's schedule."""
        return "; ".join(filter(None, [member.left_undone(done, steps) for member in self.members])) or None

    def state_dict(self) -> dict[str, Tensor]:
        """Return every member's state; its names stand behind the member's number."""
        return {
            f"{number}{SEPARATOR}{name}": value
            for number, member in enumerate(self.members)
            for name, value in member.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            CheckpointError: the state of another teacher.
        """
        states: list[dict[str, Tensor]] = [{} for _ in self.members]
        for key, value in state.items():
            number, _, name = key.partition(SEPARATOR)
            if not number.isdecimal() or int(number) >= len(states):
                raise CheckpointError(
                    f"teacher {self.strategy!r} was given a state with {key!r}, and has {len(states)} member(s), whose "
                    f"names begin with 0{SEPARATOR}, 1{SEPARATOR}, … It would go on as another teacher. Resume with "
                    "the teacher that wrote the checkpoint."
                )
            states[int(number)][name] = value
        for member, its_state in zip(self.members, states, strict=True):
            member.load_state_dict(its_state)

    @property
    def tensors(self) -> list[Tensor]:
        """The weights of every member."""
        return [tensor for member in self.members for tensor in member.tensors]

    @property
    def starts_as_student(self) -> bool:
        """Whether all members do."""
        return all(member.starts_as_student for member in self.members)

    @property
    def cautions(self) -> list[str]:
        """The cautions of every member."""
        return [caution for member in self.members for caution in member.cautions]

    @property
    def lists(self) -> int | None:
        """The shortest list of any part; None where all give whole distributions."""
        return min((part.lists for part in self.distinct_parts if part.lists is not None), default=None)

    @property
    def needs_given_rollouts(self) -> bool:
        """Whether any part does."""
        return any(part.needs_given_rollouts for part in self.distinct_parts)

    @property
    def can_fail(self) -> bool:
        """Whether any part can."""
        return any(part.can_fail for part in self.distinct_parts)

    @property
    def noise(self) -> float:
        """The largest of any part."""
        return max((part.noise for part in self.distinct_parts), default=0.0)

    @property
    def collective(self) -> bool:
        """Whether any part exchanges weights between processes."""
        return any(part.collective for part in self.distinct_parts)

    @property
    def watches(self) -> dict[str, int]:
        """The metrics that any part reads, at the shortest of their intervals."""
        watched = [item for part in self.distinct_parts for item in part.watches.items()]
        return {name: min(steps for other, steps in watched if other == name) for name, _ in watched}

    @property
    def metrics(self) -> Mapping[str, float]:
        """The metrics of every member, numbered where several have the same name."""
        logged = [(number, *item) for number, member in enumerate(self.members) for item in member.metrics.items()]
        names = [name for _, name, _ in logged]
        return {name if names.count(name) == 1 else f"{name}/{number}": value for number, name, value in logged}

    @property
    def max_length(self) -> int | None:
        """The shortest of the parts'."""
        return min((n for part in self.distinct_parts if (n := part.max_length) is not None), default=None)

    @property
    def settings(self) -> dict[str, Any]:
        """Strategy and settings of every part; their contexts stand with the prompts."""
        return {"parts": {name: {"strategy": part.strategy, **part.settings} for name, part in self.parts.items()}}
