"""Several teachers on one token: as one distribution, their arithmetic or geometric mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opsd.contexts.base import Context
from opsd.errors import ConfigError, as_number
from opsd.rollouts import Rollouts
from opsd.signals import HiddenSignal, MixtureSignal, check_mixture
from opsd.teachers.base import StudentHandle, Teacher
from opsd.teachers.composite import CompositeTeacher
from opsd.teachers.local import LocalTeacher


class MixtureTeacher(CompositeTeacher):
    """Σ w·p or ∏ p^w (normalised) of several teachers, or of one set of weights under several contexts.

    Args:
        teachers: the teachers (objects, names or mappings, as `load_teacher` takes them), each with its own context;
            or with `contexts` a single one, whose weights exist once and score all contexts in one batched pass.
        weights: one per teacher or context, adding up to 1; a geometric mixture may have negative ones.
        kind: "arithmetic" or "geometric".
        contexts: what the single teacher is shown, one by one.
        context: what teachers without a context of their own are shown.

    Raises:
        ConfigError: weights that do not add up to 1, or teachers that cannot be mixed.
    """

    strategy = "mixture"

    def __init__(
        self,
        teachers: Any,
        weights: Sequence[float],
        *,
        kind: str = "arithmetic",
        contexts: Sequence[Context | str | Mapping[str, Any] | None] | None = None,
        context: Context | str | Mapping[str, Any] | None = None,
    ):
        from opsd.teachers import load_teacher  # its table has this class in it

        several = isinstance(teachers, Sequence) and not isinstance(teachers, str)
        loaded = [load_teacher(teacher) for teacher in (teachers if several else [teachers])]
        self._owner: Teacher | None = None
        if contexts is not None:
            if len(loaded) != 1:
                raise ConfigError(
                    f"contexts= shows one teacher several things, and {len(loaded)} teachers were given. Give each "
                    "teacher its own context, or a single teacher."
                )
            self._owner = loaded[0]
            if self._owner.context is not None or context is not None:
                raise ConfigError(
                    "contexts= says one by one what the teacher of this mixture is shown, and a context was given "
                    "beside it. Name it among the contexts."
                )
            loaded = [self._owner.with_context(each) for each in contexts]
        for part in loaded:
            if not isinstance(part, LocalTeacher):
                raise ConfigError(
                    f"a mixture needs each teacher's whole distribution, and teacher {part.strategy!r} does not run in "
                    "this process as one model. Mix models, or route rows to teachers instead: RoutedTeacher."
                )
        if isinstance(weights, str) or not isinstance(weights, Sequence):
            raise ConfigError(f"weights is a list, one number for each part, and not {weights!r}.")
        self.weights, self.kind = [as_number("a weight", weight) for weight in weights], kind
        check_mixture(len(loaded), self.weights, kind)
        super().__init__({str(number): part for number, part in enumerate(loaded)}, context=context)

    @property
    def owners(self) -> list[Teacher]:
        """The teachers that hold weights."""
        return super().owners if self._owner is None else [self._owner]

    def with_default_context(self, context: Context) -> Teacher:
        """Return it with a context for parts without one; where `contexts` were given, all was said."""
        return self if self._owner is not None else super().with_default_context(context)

    def compose(self, student: StudentHandle) -> None:
        """Take hold of the teachers; one that is shown several things gets its weights once."""
        super().compose(student)
        if self._owner is not None:
            self.parts = {name: self._owner.with_context(part.context) for name, part in self.parts.items()}

    def render_prompts(self, rollouts: Rollouts) -> Rollouts:
        """Render every part's prompt for every rollout."""
        for part in self.parts.values():
            rollouts = part.render_prompts(rollouts)
        return rollouts

    def score(self, rollouts: Rollouts) -> MixtureSignal:
        """Ask every part, those that share weights in one pass."""
        parts: list[Any] = list(self.parts.values())
        signals: list[HiddenSignal]
        if self._owner is None:
            signals = [part.score(rollouts) for part in parts]
        else:
            signals = parts[0].score_views(parts, rollouts)
        return MixtureSignal(signals, self.weights, self.kind)

    @property
    def settings(self) -> dict[str, Any]:
        """Kind, weights and parts."""
        return {"kind": self.kind, "weights": self.weights, **super().settings}

    def describe(self) -> str:
        """Who is mixed, and how."""
        parts = self.parts.values()
        if self._owner is None:
            said, end = [f"({part.describe()})" for part in parts], ""
        else:
            said = [f"shown {part.context.name if part.context else 'nothing more'}" for part in parts]
            end = f"; all are {self._owner.describe()}"
        shares = [f"{weight:g} × {words}" for weight, words in zip(self.weights, said, strict=True)]
        return f"the {self.kind} mean of {', '.join(shares)}{end}"
