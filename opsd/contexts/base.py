"""The interface of all contexts, what a context needs of a row, and what is counted of its prompts.

A plain context renders one template (privileged.py); a schedule picks one of several plain contexts for a row and a
step (schedule.py). Knows rows and needs; nothing of templates, teachers or training.
"""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from opsd.contexts.renderer import PromptRenderer
from opsd.data.values import at_path, is_empty
from opsd.errors import ConfigError, TemplateError, did_you_mean

Row: TypeAlias = Mapping[str, Any]

# What training adds to a row for its contexts, one value per rollout (training/groups.py).
ROLLOUT_FIELDS = ("sibling", "feedback", "attempt", "pass_rate")


@dataclasses.dataclass(frozen=True)
class Need:
    """Columns of which every row must fill at least one.

    Args:
        names: alternatives: columns, rollout fields, or dotted paths into nested columns.
        needed_by: what needs them; the subject of an error.
        reason: what goes wrong without, in a sentence.
        way_out: what a user can do besides adding the column or filling the rows, in a sentence, or "".

    Example:
        >>> need = Need(("solution", "feedback"), "template 'feedback'", "Without it the teacher knows nothing more.")
        >>> need.is_met_by({"solution": "", "feedback": "One too few."}), need.is_open(["prompt", "solution"])
        (True, False)
        >>> str(need)
        "template 'feedback' needs the column 'solution' or 'feedback'"
    """

    names: tuple[str, ...]
    needed_by: str
    reason: str
    way_out: str = ""

    def is_open(self, available: Iterable[str]) -> bool:
        """Return whether none of these columns is one of the names."""
        have = set(available)
        return not any(name in have or name.partition(".")[0] in have for name in self.names)

    def is_met_by(self, values: Row) -> bool:
        """Return whether one of the names has a value."""
        return any(not is_empty(at_path(values, name)) for name in self.names)

    def __str__(self) -> str:
        return f"{self.needed_by} needs the column {' or '.join(map(repr, self.names))}"


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
        0.5
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
    def metrics(self) -> dict[str, float]:
        """What is logged: shares of the prompts rendered, and tokens cut per prompt."""
        n = max(self.rendered, 1)
        logged = {"context/shortened": self.shortened / n, "context/tokens_cut": self.tokens_cut / n}
        if self.levels:
            logged["context/fell_back"] = self.fell_back / n
            logged |= {f"context/level/{name}": count / n for name, count in sorted(self.levels.items())}
        return logged


class Context(ABC):
    """What a teacher is given for a row beside the prompt: one plain context, or a schedule of several.

    A kind of context says which plain contexts it has, picks one for a row, and renders it; the rest is written here
    once, over plain contexts and needs.

    Example::

        context = as_context("answer_only")  # opsd.contexts.reading
        context.check_columns(dataset.column_names)
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
    """What a row must have; a dataset can be checked against it in one pass over the rows."""
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
        """Return the needs that none of these names meets."""
        names = list(available)
        return [need for need in self.needs if need.is_open(names)]

    def has_fields(self, values: Row) -> bool:
        """Return whether a row meets the needs of the context picked for it; rollout fields are among the values."""
        picked = self.pick(values)
        return picked is None or all(need.is_met_by(values) for need in picked.needs)

    def check_columns(self, columns: Iterable[str], rollout_fields: Iterable[str] = ()) -> None:
        """Check that a dataset with these columns, and training with these rollout fields, meet every need.

        Raises:
            TemplateError: a column is missing.
        """
        columns = list(columns)
        missing = self.missing([*columns, *rollout_fields])
        if missing:
            hints = "".join(did_you_mean(name, columns) for need in missing for name in need.names)
            raise TemplateError(
                f"{'; '.join(map(str, missing))}, and the dataset has: {', '.join(columns)}.{hints}\n"
                f"{missing[0].reason}\nRename a column, or pick a template for these columns: "
                f"`opsd templates --columns {','.join(columns)}`. {missing[0].way_out}".rstrip()
            )

    def check_rows(self, rows: Iterable[Row], rollout_fields: Iterable[str] = ()) -> None:
        """Check in one pass that every row meets every need that training does not meet.

        Raises:
            TemplateError: some rows do not; the message gives their numbers, counted from 0.
        """
        empty: dict[Need, list[int]] = {need: [] for need in self.missing(rollout_fields)}
        for number, row in enumerate(rows):
            for need in empty:
                if not need.is_met_by(row):
                    empty[need].append(number)
        problems = [f"{need}, empty in {_list_rows(numbers)}" for need, numbers in empty.items() if numbers]
        if problems:
            first = next(need for need, numbers in empty.items() if numbers)
            raise TemplateError(
                f"{'; '.join(problems)}.\n{first.reason}\nFill these rows or drop them. {first.way_out}".rstrip()
            )

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


def _list_rows(numbers: Sequence[int]) -> str:
    """Return "7 rows: 1, 2, 3, 5, 6 and 2 more"."""
    first = ", ".join(map(str, numbers[:5]))
    more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    return f"{len(numbers)} row{'s' * (len(numbers) > 1)}: {first}{more}"
