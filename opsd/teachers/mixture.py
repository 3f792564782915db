"""Several teachers on one token, as one distribution: their arithmetic or geometric mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opsd.errors import ConfigError
from opsd.rollouts import Rollouts
from opsd.settings import as_list, as_number
from opsd.signals import HiddenSignal, MixtureSignal, TeacherSignal, check_mixture
from opsd.teachers.base import Teacher, TeacherView
from opsd.teachers.composite import CompositeTeacher, as_teacher
from opsd.teachers.prompting import CompositePrompts, ContextLike, TeacherPrompts


class MixtureTeacher(CompositeTeacher):
    """Σ w·p or ∏ p^w (normalised) of several teachers, or of one set of weights under several contexts.

    Args:
        teachers: Teacher objects, each with its own context; or with `contexts` a single one, whose weights exist once
            and score all contexts in one batched pass.
        weights: one per teacher or context, adding up to 1; a geometric mixture may have negative ones.
        kind: "arithmetic" or "geometric".
        contexts: the contexts of the single teacher; None among them is the student's own prompt.
        context: the context of teachers that have none.

    Raises:
        ConfigError: weights that do not add up to 1, or teachers that cannot be mixed.

    Example:
        >>> MixtureTeacher([SameCheckpointTeacher(context="hint"), EMATeacher(0.99)], [0.3, 0.7])
        >>> MixtureTeacher(EMATeacher(0.99), [1.5, -0.5], kind="geometric", contexts=["worked_solution", None])
    """

    strategy = "mixture"

    def __init__(
        self,
        teachers: Sequence[Teacher] | Teacher,
        weights: Sequence[float],
        *,
        kind: str = "arithmetic",
        contexts: Sequence[ContextLike] | None = None,
        context: ContextLike = None,
    ):
        given = list(teachers) if isinstance(teachers, list | tuple) else [teachers]
        parts = {
            str(number): as_teacher(each, f"part '{number}' of this mixture teacher")
            for number, each in enumerate(given)
        }
        _check_parts(parts)
        prompts = None
        if contexts is not None:
            prompts = CompositePrompts(
                self, _prompts_of(list(parts.values()), as_list("contexts", contexts, object), context)
            )
            parts = dict.fromkeys(prompts.parts, parts["0"])
        self.weights, self.kind = [as_number("a weight", each) for each in as_list("weights", weights, float)], kind
        check_mixture(len(parts), self.weights, kind)
        super().__init__(parts, prompts=prompts, context=context)

    def score(self, rollouts: Rollouts) -> MixtureSignal:
        """Return the mixture's signal; a teacher that is several parts scores all of them in one pass.

        Raises:
            ConfigError: a part's signal does not hold its whole distribution.
        """
        signals: dict[str, HiddenSignal] = {}
        for teacher in self.distinct_parts:
            names = [name for name, part in self.parts.items() if part is teacher]
            prompts = [self.view(name).prompts for name in names]
            view = TeacherView(teacher, prompts[0])
            signal = _whole(view.score(rollouts.repeat_for(prompts, prompts[0])), teacher)
            size = len(signal) // len(names)
            for number, name in enumerate(names):
                signals[name] = signal.select(slice(number * size, (number + 1) * size))
        return MixtureSignal([signals[name] for name in self.parts], self.weights, self.kind)

    @property
    def settings(self) -> dict[str, Any]:
        """Kind, weights and parts."""
        return {"kind": self.kind, "weights": self.weights, **super().settings}

    def describe(self) -> str:
        """Return which teachers or contexts are mixed, and how."""
        if len(self.parts) > 1 and len(self.distinct_parts) == 1:
            parts = [f"shown {self.view(name).prompts.describe()}" for name in self.parts]
            end = f"; all are {self.distinct_parts[0].describe()}"
        else:
            parts, end = [f"({part.describe()})" for part in self.parts.values()], ""
        shares = [f"{weight:g} × {part}" for weight, part in zip(self.weights, parts, strict=True)]
        return f"the {self.kind} mean of {', '.join(shares)}{end}"


def _check_parts(parts: Mapping[str, Teacher]) -> None:
    for part in parts.values():
        if isinstance(part, CompositeTeacher) or part.lists is not None:
            raise ConfigError(
                f"a mixture needs each teacher's whole distribution, and teacher {part.strategy!r} does not run in "
                "this process as one model. Mix models, or route rows to teachers instead: RoutedTeacher."
            )


def _prompts_of(
    teachers: Sequence[Teacher], contexts: Sequence[ContextLike], context: ContextLike
) -> dict[str, TeacherPrompts]:
    """Return one teacher's prompts under each of several contexts."""
    if len(teachers) != 1:
        raise ConfigError(
            f"contexts= gives one teacher several contexts, and {len(teachers)} teachers were given. Give each "
            "teacher its own context, or a single teacher."
        )
    teacher = teachers[0]
    if teacher.context is not None or context is not None:
        raise ConfigError(
            "contexts= lists all contexts of this mixture's teacher, and a context was given beside it. "
            "Name it among the contexts."
        )
    return {str(number): TeacherPrompts(teacher, each, is_final=True) for number, each in enumerate(contexts)}


def _whole(signal: TeacherSignal, teacher: Teacher) -> HiddenSignal:
    if not isinstance(signal, HiddenSignal):
        raise ConfigError(
            f"a mixture needs each teacher's whole distribution, and teacher {teacher.strategy!r} returned a "
            f"{type(signal).__name__}. Means of partial distributions are no distribution. Mix teachers that return a "
            "HiddenSignal, or route rows to teachers instead: RoutedTeacher."
        )
    return signal
