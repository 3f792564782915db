"""Several levels of help, one of which a teacher is shown per row and step.

The levels are contexts by name, from the most to the least that a teacher may know; a schedule says which of them a
row gets: always the first, drawn by weights, by the step (a curriculum), or by how often the row is answered right.
Knows contexts; nothing of models, rewards or training but the step that it is told.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from opsd.contexts.base import Context, ContextCounts
from opsd.contexts.privileged import PrivilegedContext
from opsd.contexts.renderer import PromptRenderer
from opsd.errors import ConfigError, DataError, TemplateError, as_number, did_you_mean

# The levels that can be named without being spelt out, from methods that differ in the dose (AMPLE-Math, arXiv
# 2609.20612; ATESD, arXiv 2605.11458) or the kind of what is shown; the last two are controls.
LEVELS: dict[str, Mapping[str, Any] | None] = {
    "none": None,
    "rule": {"template": "system_rule"},
    "answer": {"template": "answer_only"},
    "hint": {"template": "hint"},
    "outline": {"template": "outline"},
    "part": {"template": "partial_solution", "reveal": 0.3, "truncate_at": "sentence"},
    "trace": {"template": "worked_solution"},
    "critique": {"template": "critique"},
    "demonstration": {"template": "demonstration"},
    "own_success": {"template": "own_success"},
    "feedback": {"template": "feedback"},
    "wrong_answer": {"template": "answer_only", "fields": {"answer": "wrong_answer"}},
    "other_answer": {"template": "answer_only", "fields": {"answer": "other_answer"}},
}


class ContextSchedule(Context):
    """Picks a level per row and step.

    Args:
        levels: contexts by name; a list of names from `LEVELS` takes those. None as a context is the student's own
            prompt.
        weights: {level: weight}: each row's level is drawn anew at each step, repeatably; rollouts of one prompt share
            it.
        until_step: {level: step}: a level is used while fewer steps are done, in the order given; a level of
            `levels` that is not named comes after them.
        until_pass_rate: {level: rate}: likewise by the share of right answers to the row, rates included.
        pass_rate: the column that holds that share. With reward functions and several rollouts per prompt, training
            makes `pass_rate` itself.
        fallback: {level: level}: what a row gets that lacks what its level needs. How often is counted.
        seed: of the draws.

    Without `weights`, `until_step` and `until_pass_rate` every row gets the first level (or what it falls back to).

    Raises:
        ConfigError: levels that do not exist, two rules at once, or a fallback that leads back to itself.
    """

    name = "schedule"

    def __init__(
        self,
        levels: Sequence[str] | Mapping[str, Any],
        *,
        weights: Mapping[str, float] | None = None,
        until_step: Mapping[str, int] | None = None,
        until_pass_rate: Mapping[str, float] | None = None,
        pass_rate: str = "pass_rate",
        fallback: Mapping[str, str] | None = None,
        seed: int = 0,
    ) -> None:
        self.levels = _read_levels(levels)
        self._weights = dict(weights or {})
        self._until_step = dict(until_step or {})
        self._until_rate = dict(until_pass_rate or {})
        self._rate, self._seed = pass_rate, seed
        self._fallback = dict(fallback or {})
        self._counts = self._no_counts()
        self._check_settings()
        needed = [context.fields if context else frozenset() for context in self.levels.values()]
        optional = [context.optional_fields for context in self.levels.values() if context]
        self.fields = frozenset.intersection(*needed)
        self.optional_fields = frozenset().union(*needed, *optional) - self.fields
        if self._until_rate:
            self.optional_fields |= {pass_rate}
        self.name = f"schedule of {', '.join(self.levels)}"
        text = json.dumps(self.description, sort_keys=True, default=str)
        self.digest = hashlib.sha256(text.encode()).hexdigest()[:16]

    def pick(self, row: Mapping[str, Any], rollout_fields: Mapping[str, Any] | None = None) -> str:
        """Return the level of a row at this step, before any fallback.

        Raises:
            DataError: the row's pass rate is needed and is no number from 0 to 1.
        """
        if self._weights:
            text = json.dumps([self._seed, self.step, row["prompt"]], default=str)
            drawn = random.Random(hashlib.sha256(text.encode()).digest())
            return drawn.choices(list(self._weights), list(self._weights.values()))[0]
        if self._until_step:
            return next((level for level, end in self._until_step.items() if self.step < end), self._last)
        if self._until_rate:
            rate = {**row, **(rollout_fields or {})}.get(self._rate)
            if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
                raise DataError(
                    f"a schedule by pass rate reads the column {self._rate!r}, and this row has {rate!r} there. It is "
                    "the share of right answers to the row, from 0 to 1: measure it with several samples per row."
                )
            return next((level for level, end in self._until_rate.items() if rate <= end), self._last)
        return next(iter(self.levels))

    def render(
        self, row: Mapping[str, Any], rollout_fields: Mapping[str, Any] | None = None, *, side: PromptRenderer
    ) -> list[int]:
        """Return the ids of the prompt at the row's level, and count which it was.

        Raises:
            TemplateError: the row has too little for its level and for what that falls back to.
            DataError: as the level's own `render`.
        """
        picked = self.pick(row, rollout_fields)
        level = self._usable_level(row, rollout_fields)
        context = self.levels[level]
        ids = side.ids(row["prompt"]) if context is None else context.render(row, rollout_fields, side=side)
        self._counts.rendered += context is None
        self._counts.levels[level] += 1
        self._counts.fell_back += level != picked
        return ids

    def level_of(self, row: Mapping[str, Any], rollout_fields: Mapping[str, Any] | None = None) -> Context | None:
        """Return what a row is shown at this step, fallbacks included.

        Raises:
            TemplateError: the row has too little for its level and for what that falls back to.
        """
        return self.levels[self._usable_level(row, rollout_fields)]

    def check_columns(self, columns: Iterable[str], rollout_fields: Iterable[str] = ()) -> None:
        """Check that every level that may be picked, or one it falls back to, has its columns."""
        columns, rollout_fields = list(columns), list(rollout_fields)
        if self._until_rate and self._rate not in [*columns, *rollout_fields]:
            raise DataError(
                f"a schedule by pass rate reads the column {self._rate!r}, and the dataset has: {', '.join(columns)}."
                f"{did_you_mean(self._rate, columns)} Measure it with several samples per row, or pick levels by step."
            )
        for level in self._picked:
            if not any(self._has(each, [*columns, *rollout_fields]) for each in self._chain(level)):
                context = self.levels[level]
                assert context is not None, "a level without a context needs no column"
                try:
                    context.check_columns(columns, rollout_fields)
                except TemplateError as error:
                    raise TemplateError(f"level {level!r} of a schedule: {error}\n{self._way_out(level)}") from error

    def check_rows(self, rows: Iterable[Mapping[str, Any]], rollout_fields: Iterable[str] = ()) -> None:
        """Check that every row has enough for every level that may be picked, or for what that falls back to."""
        made = dict.fromkeys(rollout_fields, "made during training")
        for number, row in enumerate(rows):
            for level in self._picked:
                if self._usable(level, {**row, **made}) is None:
                    raise TemplateError(
                        f"row {number} has too little for level {level!r} of a schedule. {self._way_out(level)}"
                    )

    def of_other_rows(self) -> ContextSchedule:
        """Return the same schedule, every level shown what belongs to another row."""
        levels = {name: context and context.of_other_rows() for name, context in self.levels.items()}
        rules = {"weights": self._weights, "until_step": self._until_step, "until_pass_rate": self._until_rate}
        return ContextSchedule(levels, pass_rate=self._rate, fallback=self._fallback, seed=self._seed, **rules)  # type: ignore[arg-type]

    def missing(self, available: Iterable[str]) -> list[tuple[str, ...]]:
        """Return what the first level that cannot be shown lacks, where it falls back to none that can."""
        available = list(available)
        for level in self._picked:
            if not any(self._has(each, available) for each in self._chain(level)):
                context = self.levels[level]
                assert context is not None
                return context.missing(available)
        return []

    def has_fields(self, values: Mapping[str, Any]) -> bool:
        """Tell whether the row's level, or what that falls back to, has what it needs."""
        return self._usable(self.pick(values), values) is not None

    def possible_contexts(
        self, row: Mapping[str, Any], rollout_fields: Mapping[str, Any] | None = None
    ) -> list[Context]:
        """Return the contexts of every level that may be picked for a row, and of what it falls back to."""
        usable = {self._usable(level, {**row, **(rollout_fields or {})}) for level in self._picked}
        return [context for level, context in self.levels.items() if level in usable and context is not None]

    def untruncated_fields(self, names: Iterable[str]) -> set[str]:
        """Return those of these fields that some level shows at any length."""
        names = list(names)
        return set().union(*(context.untruncated_fields(names) for context in self.levels.values() if context))

    @property
    def counts(self) -> ContextCounts:
        """What happened at all levels together."""
        return sum((context.counts for context in self.levels.values() if context), self._counts)

    def forget_counts(self) -> None:
        """Count from here."""
        self._counts = self._no_counts()
        for context in self.levels.values():
            if context:
                context.forget_counts()

    @property
    def description(self) -> dict[str, Any]:
        """Levels, rule and fallbacks."""
        levels = {name: context and context.description for name, context in self.levels.items()}
        rule = {"weights": self._weights, "until_step": self._until_step, "until_pass_rate": self._until_rate}
        return {"levels": levels, "fallback": self._fallback, "seed": self._seed, "pass_rate": self._rate, **rule}

    def _no_counts(self) -> ContextCounts:
        return ContextCounts(levels=dict.fromkeys(self.levels, 0))

    @property
    def _rule(self) -> Mapping[str, float]:
        return self._weights or self._until_step or self._until_rate

    @property
    def _last(self) -> str:
        """The level behind the last bound: the first that has none, else the one with the highest."""
        return next((level for level in self.levels if level not in self._rule), list(self._rule)[-1])

    @property
    def _picked(self) -> list[str]:
        """Every level that `pick` may return."""
        if not self._rule:
            return [next(iter(self.levels))]
        if self._weights:
            return [level for level, weight in self._weights.items() if weight > 0]
        return list(dict.fromkeys([*self._rule, self._last]))

    def _chain(self, level: str) -> Iterator[str]:
        """Yield a level and what it falls back to, one after the other."""
        yield level
        while level in self._fallback:
            level = self._fallback[level]
            yield level

    def _usable_level(self, row: Mapping[str, Any], rollout_fields: Mapping[str, Any] | None) -> str:
        picked = self.pick(row, rollout_fields)
        level = self._usable(picked, {**row, **(rollout_fields or {})})
        if level is None:
            raise TemplateError(f"a row has too little for level {picked!r} of a schedule. {self._way_out(picked)}")
        return level

    def _usable(self, level: str, values: Mapping[str, Any]) -> str | None:
        for each in self._chain(level):
            context = self.levels[each]
            if context is None or context.has_fields(values):
                return each
        return None

    def _has(self, level: str, available: Iterable[str]) -> bool:
        context = self.levels[level]
        return context is None or not context.missing(available)

    def _way_out(self, level: str) -> str:
        return f"Name what it falls back to: fallback={{{level!r}: 'none'}} and the level none; or fill the rows."

    def _check_settings(self) -> None:
        rules: dict[str, Mapping[str, float]] = {
            "weights": self._weights,
            "until_step": self._until_step,
            "until_pass_rate": self._until_rate,
        }
        given = [name for name, rule in rules.items() if rule]
        if len(given) > 1:
            raise ConfigError(f"a schedule picks by one rule, and has {' and '.join(given)}. Keep one of them.")
        links = [*self._fallback, *self._fallback.values()]
        for level in [*self._rule, *links]:
            if level not in self.levels:
                raise ConfigError(
                    f"a schedule names the level {level!r} and has: {', '.join(self.levels)}."
                    f"{did_you_mean(level, self.levels)}"
                )
        for level in self._fallback:
            chain: list[str] = []
            for each in self._chain(level):
                if each in chain:
                    raise ConfigError(f"the fallback of level {level!r} leads back to it: {' -> '.join(chain)}.")
                chain.append(each)
        for name, rule in rules.items():
            bounds = [as_number(f"{name} of {level!r}", bound) for level, bound in rule.items()]
            if name == "weights":
                if bounds and (min(bounds) < 0 or sum(bounds) <= 0):
                    raise ConfigError(f"weights are not negative and not all 0, and these are {dict(rule)}.")
            elif bounds != sorted(set(bounds)):
                raise ConfigError(f"the bounds of {name} must rise from level to level, and these are {dict(rule)}.")


def _read_levels(levels: Sequence[str] | Mapping[str, Any]) -> dict[str, Context | None]:
    """Return contexts by name; names alone are those of `LEVELS`."""
    if isinstance(levels, str) or not isinstance(levels, Sequence | Mapping) or not levels:
        raise ConfigError(f"levels is a list of names ({', '.join(LEVELS)}), or a mapping of names to contexts.")
    chosen: dict[str, Any] = {}
    for level in levels:
        if not isinstance(levels, Mapping) and level not in LEVELS:
            raise ConfigError(
                f"no level is called {level!r}.{did_you_mean(str(level), LEVELS)} Levels: {', '.join(LEVELS)}; or "
                "write your own: {name: context}."
            )
        chosen[level] = levels[level] if isinstance(levels, Mapping) else LEVELS[level]
    found = {name: Context.of(value) for name, value in chosen.items()}
    for name, context in found.items():
        if isinstance(context, ContextSchedule):
            raise ConfigError(f"level {name!r} is itself a schedule. A level is one context: list the levels in one.")
    return found


def contexts_of(context: Context | None) -> list[PrivilegedContext]:
    """Return the templates that a context may show."""
    if isinstance(context, ContextSchedule):
        return [level for level in context.levels.values() if isinstance(level, PrivilegedContext)]
    return [context] if isinstance(context, PrivilegedContext) else []
