"""The interface of all contexts, and what is counted of their prompts.

A plain context renders one template (privileged.py); a schedule picks one of several plain contexts for a row and a
step (schedule.py). Knows rows and needs; nothing of templates, teachers or training.
"""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from opsd.contexts.renderer import PromptRenderer
from opsd.data.needs import Need, Row
from opsd.errors import ConfigError, did_you_mean

# What training adds to a row for its contexts, one value per rollout (training/groups.py).
ROLLOUT_FIELDS = ("sibling", "feedback", "attempt", "pass_rate")


@dataclasses.dataclass
class ContextCounts:
    """What was counted of the teacher's prompts.

    Args:
        rendered: prompts.
        bare: prompts that are the student's own, because no optional field had a value.
        shortened: prompts whose `truncate` field was shortened.
        tokens_cut: tokens that this saved.
        levels: of a schedule: prompts per level.
        fell_back: of a schedule: prompts whose row lacked a column of its level and got a later level.

    Example:
        >>> (ContextCounts(rendered=4, shortened=1) - ContextCounts(rendered=2)).metrics["context/shortened"]
        (1, 2)
    """

    rendered: int = 0
    bare: int = 0
    shortened: int = 0
    tokens_cut: int = 0
    levels: dict[str, int] = dataclasses.field(default_factory=dict)
    fell_back: int = 0

    def __add__(self, other: ContextCounts) -> ContextCounts:
        """Return the sum of both."""
        return self._combine(other, 1)

    def __sub__(self, other: ContextCounts) -> ContextCounts:
        """Return what was counted since the other."""
        return self._combine(other, -1)

    def _combine(self, other: ContextCounts, sign: int) -> ContextCounts:
        names = [f.name for f in dataclasses.fields(self) if f.name != "levels"]
        levels = {k: self.levels.get(k, 0) + sign * other.levels.get(k, 0) for k in {**self.levels, **other.levels}}
        return ContextCounts(**{n: getattr(self, n) + sign * getattr(other, n) for n in names}, levels=levels)

    @property
    def metrics(self) -> dict[str, tuple[float, int]]:
        """What is logged of the prompts rendered, as (sum, number of prompts)."""
        logged: dict[str, float] = {"context/shortened": self.shortened, "context/tokens_cut": self.tokens_cut}
        if self.levels:
            logged["context/fell_back"] = self.fell_back
            logged |= {f"context/level/{name}": count for name, count in sorted(self.levels.items())}
        return {name: (total, self.rendered) for name, total in logged.items()}


class Context(ABC):
    """What a teacher is given for a row beside the prompt: one plain context, or a schedule of several.

    A kind of context says which plain contexts it has, picks one for a row, and renders it; the rest is written here
    once, over plain contexts and needs.

    Example::

        context = as_context("answer_only")  # opsd.contexts.reading
        check_columns(dataset.column_names, context.needs)  # opsd.data.needs
        prompt_ids = context.render(row, renderer=renderer)
    """

    name: str
    digest: str
    """16 hexadecimal digits over the text of its templates; of a schedule, over settings and rule too."""
    fields: frozenset[str]
    """Columns that every plain context reads and needs."""
    optional_fields: frozenset[str]
    """Columns that are read beside `fields`."""
    needs: tuple[Need, ...]
    """What a row must have, unless rollouts provide it."""
    step: int = 0
    """Optimizer steps done; the trainer sets it before and after each step."""
    truncated_column: str | None = None
    """The column that may be shortened, of a plain context."""

    def __init__(self) -> None:
        self._own_counts = ContextCounts()

    @property
    @abstractmethod
    def contexts(self) -> Sequence[Context]:
        """The plain contexts that it may pick; of a plain context, itself."""

    @abstractmethod
    def pick(self, row: Row, rollout_fields: Row | None = None) -> Context | None:
        """Return the plain context of a row at this step; None is the student's own prompt."""

    @abstractmethod
    def possible_contexts(self, row: Row, rollout_fields: Row | None = None) -> Sequence[Context]:
        """Return the plain contexts that may be picked for a row at any step."""

    def left_undone(self, steps: int) -> str | None:
        """Return which of its contexts a run of `steps` steps never comes to; None for none."""
        return None

    @abstractmethod
    def render(self, row: Row, rollout_fields: Row | None = None, *, renderer: PromptRenderer) -> list[int]:
        """Return the ids of the teacher's prompt for a row, and count it.

        Args:
            row: a dataset row.
            rollout_fields: what training adds for this rollout; it wins over a column of the same name.
            renderer: the teacher's; the context's keywords go over its keywords.

        Raises:
            TemplateError: a needed field is empty, or the template fails on this row.
            DataError: the prompt cannot be used, or is too long.
        """

    @abstractmethod
    def of_other_rows(self) -> Context:
        """Return the same context filled from another row: the form of the help without its information.

        Raises:
            ConfigError: it reads nothing of the row, or a rollout field that no other row has.
        """

    @property
    @abstractmethod
    def description(self) -> dict[str, Any]:
        """Templates and settings as plain values; a resumed run must have the same."""

    @property
    def columns(self) -> frozenset[str]:
        """All columns and rollout fields that may be read."""
        return self.fields | self.optional_fields

    def missing(self, available: Iterable[str]) -> list[Need]:
        """Return the needs that none of these names can meet: columns, or what rollouts provide."""
        names = list(available)
        return [need for need in self.needs if need.is_open(names)]

    def has_fields(self, values: Row) -> bool:
        """Return whether a row meets the needs of the context picked for it; rollout fields are among the values."""
        picked = self.pick(values)
        return picked is None or all(need.is_met_by(values) for need in picked.needs)

    def untruncated_fields(self, names: Iterable[str]) -> set[str]:
        """Return which of `names` are inserted untruncated, so length checks must allow for their full size."""
        return {
            name
            for name in names
            for context in self.contexts
            if name in context.columns and name != context.truncated_column
        }

    @property
    def counts(self) -> ContextCounts:
        """What was counted so far, in all its contexts together."""
        return sum((context._own_counts for context in self._counting), ContextCounts())

    def forget_counts(self) -> None:
        """Count from 0 again."""
        for context in self._counting:
            context._own_counts = ContextCounts(levels=dict.fromkeys(context._own_counts.levels, 0))

    @property
    def _counting(self) -> list[Context]:
        """This context and those that it picks, each once."""
        return list({id(context): context for context in (self, *self.contexts)}.values())


def check_keys(settings: Mapping[str, Any], kind: type[Context]) -> None:
    """Refuse a mapping with a key that is no argument of a kind of context.

    Raises:
        ConfigError: it has one.
    """
    known = list(inspect.signature(kind).parameters)
    for key in settings:
        if key not in known:
            hint = did_you_mean(str(key), known)
            raise ConfigError(f"a context has no setting {key!r}.{hint} It has: {', '.join(known)}.")
