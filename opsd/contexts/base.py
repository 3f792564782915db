"""What every context can do, whatever it shows: render a row's prompt, check rows before training, count.

Knows rows and renderers; `context.py` and `schedule.py` have the two kinds.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

from opsd.contexts.renderer import PromptRenderer
from opsd.errors import ConfigError, did_you_mean

# What training adds to a row for its contexts, one value per rollout (training/groups.py).
ROLLOUT_FIELDS = ("sibling", "feedback", "attempt", "pass_rate")


@dataclasses.dataclass
class ContextCounts:
    """What happened to the teacher's prompts so far."""

    rendered: int = 0
    # prompts in which the template added nothing to the student's own: no optional field had a value
    bare: int = 0
    # prompts whose `truncate` field was shortened, and the tokens that this saved
    shortened: int = 0
    tokens_cut: int = 0
    # of a schedule: prompts per level, and prompts whose row lacked what the level picked for it needs
    levels: dict[str, int] = dataclasses.field(default_factory=dict)
    fell_back: int = 0

    def __add__(self, other: ContextCounts) -> ContextCounts:
        """Return both together."""
        return self._with(other, 1)

    def __sub__(self, other: ContextCounts) -> ContextCounts:
        """Return what was counted since the other."""
        return self._with(other, -1)

    def _with(self, other: ContextCounts, sign: int) -> ContextCounts:
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
    """What a teacher is shown: a `PrivilegedContext`, or a `ContextSchedule` that picks one per row and step."""

    name: str
    digest: str
    fields: frozenset[str]
    optional_fields: frozenset[str]
    step: int = 0
    """Optimizer steps done; whoever trains says so before each one."""

    @classmethod
    def of(cls, value: Any) -> Context | None:
        """Return the context that a user meant by a name, a path, a mapping of arguments, a context or None.

        Raises:
            ConfigError: another type, an unknown key, or a mapping without "template" or "levels".
        """
        if value is None or isinstance(value, Context):
            return value
        from opsd.contexts.privileged import PrivilegedContext  # both are contexts, so they import this file
        from opsd.contexts.schedule import ContextSchedule

        if isinstance(value, (str, os.PathLike)):
            return PrivilegedContext(value)
        if not isinstance(value, Mapping):
            raise ConfigError(
                "a context is a template's name, a path, a mapping, a PrivilegedContext or a ContextSchedule, not "
                f"{type(value).__name__}."
            )
        kind = ContextSchedule if "levels" in value else PrivilegedContext
        known = list(inspect.signature(kind).parameters)
        for key in value:
            if key not in known:
                hint = did_you_mean(str(key), known)
                raise ConfigError(f"a context has no setting {key!r}.{hint} It has: {', '.join(known)}.")
        if kind is PrivilegedContext and "template" not in value:
            raise ConfigError(
                "a context needs the key 'template', the name of one of opsd's own or a path to a .jinja file; or "
                "'levels', of which one is picked per row and step."
            )
        return kind(**value)

    @abstractmethod
    def render(
        self, row: Mapping[str, Any], rollout_fields: Mapping[str, Any] | None = None, *, side: PromptRenderer
    ) -> list[int]:
        """Return the ids of the teacher's prompt for a row, and count what happened.

        Args:
            row: a dataset row.
            produced: what training made for this row; it wins over a column of the same name.
            side: the teacher's renderer; the context's own keywords go over its.
        """

    @abstractmethod
    def check_columns(self, columns: Iterable[str], rollout_fields: Iterable[str] = ()) -> None:
        """Check that a dataset with these columns, and what training produces, has every field that is needed.

        Raises:
            TemplateError: it has not.
        """

    @abstractmethod
    def check_rows(self, rows: Iterable[Mapping[str, Any]], rollout_fields: Iterable[str] = ()) -> None:
        """Check that no row leaves a needed field empty: None, a blank string or an empty list.

        Raises:
            TemplateError: some do; the message gives their numbers, counted from 0.
        """

    @abstractmethod
    def of_other_rows(self) -> Context:
        """Return the same, shown what belongs to another row: the form of the help, and none of its information.

        Raises:
            ConfigError: it shows nothing of a row's own, or what training makes for that row.
        """

    @abstractmethod
    def missing(self, available: Iterable[str]) -> list[tuple[str, ...]]:
        """Return the fields that these names leave open: of each group, one would be enough."""

    @abstractmethod
    def has_fields(self, values: Mapping[str, Any]) -> bool:
        """Tell whether a row has what is needed; the values are its own and what training made."""

    @abstractmethod
    def possible_contexts(
        self, row: Mapping[str, Any], rollout_fields: Mapping[str, Any] | None = None
    ) -> list[Context]:
        """Return what a row may be shown at any step."""

    @abstractmethod
    def untruncated_fields(self, names: Iterable[str]) -> set[str]:
        """Return those of these fields that may be shown at any length."""

    @property
    @abstractmethod
    def counts(self) -> ContextCounts:
        """What happened so far."""

    @abstractmethod
    def forget_counts(self) -> None:
        """Count from here."""

    @property
    @abstractmethod
    def description(self) -> dict[str, Any]:
        """What it shows and how, in plain values: what a resume compares."""
