"""Picks one of several plain contexts, the levels, for a row and a step.

Levels stand in the order from most to least help. A schedule uses the first one for every row, draws one by weights,
changes level with the step (a curriculum), or picks by how often the row is answered right.
Knows plain contexts; nothing of models, rewards or training but the step.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from opsd.contexts.base import Context, ContextCounts
from opsd.contexts.privileged import REASON, PrivilegedContext, as_plain_context
from opsd.contexts.renderer import PromptRenderer
from opsd.data.needs import Need, Row
from opsd.errors import ConfigError, DataError, TemplateError, did_you_mean
from opsd.settings import as_number

NONE = "none"  # the level that is the student's own prompt
WAY_OUT = f"end `levels` with {NONE}, the student's own prompt"
# Levels were once named by aliases; an error says how each is written now.
OLD_LEVELS = {
    "rule": "system_rule",
    "answer": "answer_only",
    "trace": "worked_solution",
    "part": "{template: partial_solution, reveal: 0.3, truncate_at: sentence}",
    "wrong_answer": "{template: answer_only, fields: {answer: wrong_answer}}",
    "other_answer": "{template: answer_only, fields: {answer: other_answer}}",
}


class ContextSchedule(Context):
    """Picks a level per row and step; a row that lacks a column of its level gets the next level that it can fill.

    Args:
        levels: contexts, the most help first, which is also the order of fallback: templates' names, paths, mappings
            of arguments, plain contexts, or "none" for the student's own prompt. A level is called by the name of its
            template; a mapping {name: context} gives names of your own.
        weights: {level: weight}: draw each row's level anew at each step, repeatably; rollouts of a prompt share it.
        until_step: {level: step}: use a level while fewer optimizer steps are done, in the order given; a level that is
            not named follows the last one.
        until_pass_rate: {level: rate}: likewise by the share of right answers to the row, rates included.
        pass_rate: the column that holds this share, from 0 to 1. With reward functions and several rollouts per prompt
            training computes `pass_rate` itself.
        seed: seed of the draws.

    Without `weights`, `until_step` and `until_pass_rate` every row gets the first level.

    Raises:
        ConfigError: unknown levels, two levels of one name, or two rules at once.

    Example:
        >>> schedule = ContextSchedule(["worked_solution", "answer_only", "none"], until_step={"worked_solution": 100})
        >>> schedule.pick({"prompt": "What is 12 + 7?", "solution": "12 + 8 - 1 = 19", "answer": "19"}).name
        'worked_solution'
        >>> schedule.pick({"prompt": "What is 12 + 7?", "answer": "19"}).name
        'answer_only'
    """

    def __init__(
        self,
        levels: Sequence[Any] | Mapping[str, Any],
        *,
        weights: Mapping[str, float] | None = None,
        until_step: Mapping[str, int] | None = None,
        until_pass_rate: Mapping[str, float] | None = None,
        pass_rate: str = "pass_rate",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.levels = _read_levels(levels)
        self._weights = dict(weights or {})
        self._until_step = dict(until_step or {})
        self._until_rate = dict(until_pass_rate or {})
        self._rate_column, self._seed = pass_rate, seed
        self._own_counts = ContextCounts(levels=dict.fromkeys(self.levels, 0))
        self._check_settings()
        needed = [context.fields if context else frozenset() for context in self.levels.values()]
        self.fields = frozenset.intersection(*needed)
        self.optional_fields = frozenset().union(*(context.columns for context in self.contexts)) - self.fields
        if self._until_rate:
            self.optional_fields |= {pass_rate}
        self.needs = tuple(self._read_needs())
        self.name = f"schedule of {', '.join(self.levels)}"
        text = json.dumps(self.description, sort_keys=True, default=str)
        self.digest = hashlib.sha256(text.encode()).hexdigest()[:16]

    # ---- what it is -------------------------------------------------------------------------------------------

    @property
    def contexts(self) -> Sequence[PrivilegedContext]:
        """The plain contexts of its levels, in their order."""
        return [context for context in self.levels.values() if context is not None]

    @property
    def description(self) -> dict[str, Any]:
        """Levels, their order, and the rule."""
        levels = {name: context and context.description for name, context in self.levels.items()}
        order = list(self.levels)  # apart, since a comparison of mappings ignores their order
        return {"levels": levels, "order": order, "seed": self._seed, "pass_rate": self._rate_column, **self._rules}

    def of_other_rows(self) -> ContextSchedule:
        """Return the same schedule, every level filled from another row."""
        levels = {name: context and context.of_other_rows() for name, context in self.levels.items()}
        return ContextSchedule(levels, pass_rate=self._rate_column, seed=self._seed, **self._rules)  # type: ignore[arg-type]

    def left_undone(self, steps: int) -> str | None:
        """Return the levels that begin at or after the last step."""
        following = list(dict.fromkeys([*self._until_step, self._last]))[1:]
        begins = zip(following, self._until_step.values(), strict=False)  # each where the one before it ends
        late = [level for level, start in begins if start >= steps]
        return f"levels that begin after the run's {steps} steps: {', '.join(late)}" if late else None

    # ---- which level ------------------------------------------------------------------------------------------

    def scheduled_level(self, row: Row, rollout_fields: Row | None = None) -> str:
        """Return the name of a row's level at this step, whether or not the row can fill it.

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
            rate = self._pass_rate({**row, **(rollout_fields or {})})
            return next((level for level, end in self._until_rate.items() if rate <= end), self._last)
        return next(iter(self.levels))

    def pick(self, row: Row, rollout_fields: Row | None = None) -> PrivilegedContext | None:
        """Return the context of a row's level, or of the next level that the row can fill; None for "none".

        Where the row can fill none of them, this is the level itself, which `render` refuses.
        """
        level = self.scheduled_level(row, rollout_fields)
        return self.levels[self._first_filled(level, {**row, **(rollout_fields or {})}) or level]

    def possible_contexts(self, row: Row, rollout_fields: Row | None = None) -> Sequence[PrivilegedContext]:
        """Return the plain contexts that may be picked for a row at any step."""
        values = {**row, **(rollout_fields or {})}
        names = {self._first_filled(level, values) for level in self._scheduled}
        return [context for level, context in self.levels.items() if level in names and context is not None]

    def render(self, row: Row, rollout_fields: Row | None = None, *, renderer: PromptRenderer) -> list[int]:
        """Return the ids of the prompt at the row's level, and count the level.

        Raises:
            TemplateError: the row can fill neither its level nor a later one.
            DataError: as the `render` of the level.
        """
        scheduled = self.scheduled_level(row, rollout_fields)
        level = self._first_filled(scheduled, {**row, **(rollout_fields or {})})
        if level is None:
            raise TemplateError(
                f"a row has too little for level {scheduled!r} of a schedule and for every later level.\n{REASON}\n"
                f"Fill the row, drop it, or {WAY_OUT}."
            )
        context = self.levels[level]
        if context is None:
            ids = renderer.ids(row["prompt"])
            self._own_counts.rendered += 1
        else:
            ids = context.render(row, rollout_fields, renderer=renderer)
        self._own_counts.levels[level] += 1
        self._own_counts.fell_back += level != scheduled
        return ids

    @property
    def _rules(self) -> dict[str, dict[str, float]]:
        return {"weights": self._weights, "until_step": self._until_step, "until_pass_rate": self._until_rate}  # type: ignore[dict-item]

    @property
    def _rule(self) -> Mapping[str, float]:
        """The rule that is set, or an empty one."""
        return next((rule for rule in self._rules.values() if rule), {})

    @property
    def _last(self) -> str:
        """The level after the last bound: the first that has no bound, else the one with the highest."""
        return next((level for level in self.levels if level not in self._rule), list(self._rule)[-1])

    @property
    def _scheduled(self) -> list[str]:
        """The levels that `scheduled_level` may return."""
        if not self._rule:
            return [next(iter(self.levels))]
        if self._weights:
            return [level for level, weight in self._weights.items() if weight > 0]
        return list(dict.fromkeys([*self._rule, self._last]))

    def _from(self, level: str) -> list[str]:
        """Return a level and those after it, in the order of fallback."""
        names = list(self.levels)
        return names[names.index(level) :]

    def _first_filled(self, level: str, values: Row) -> str | None:
        """Return the first level from this one on that a row can fill."""
        for name in self._from(level):
            context = self.levels[name]
            if context is None or context.has_fields(values):
                return name
        return None

    def _pass_rate(self, values: Row) -> float:
        rate = values.get(self._rate_column)
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
            raise DataError(
                f"a schedule by pass rate reads the column {self._rate_column!r}, which is {rate!r} in this row. It is "
                "the share of right answers to the row, from 0 to 1.\nMeasure it with several samples per row."
            )
        return rate

    # ---- settings ---------------------------------------------------------------------------------------------

    def _read_needs(self) -> Iterator[Need]:
        """Yield what a row must have: for each level, that level's columns or a later level's.

        "(a and b) or c" becomes the needs "a or c" and "b or c". A need that another one implies is left out.
        """
        needs: dict[frozenset[str], Need] = {}
        for level in self._scheduled:
            alternatives = [context.needs if context else () for context in map(self.levels.get, self._from(level))]
            needed_by = f"level {level!r} of a schedule" + " (or a later level)" * (len(alternatives) > 1)
            for combination in product(*alternatives):
                names = tuple(dict.fromkeys(name for need in combination for name in need.names))
                needs.setdefault(frozenset(names), Need(names, needed_by, REASON, WAY_OUT))
        yield from (need for names, need in needs.items() if not any(other < names for other in needs))
        if self._until_rate:
            yield Need(
                (self._rate_column,),
                "a schedule by pass rate",
                "It picks a row's level by this column, the share of right answers to the row.",
                "measure it with several samples per row, or pick levels by step",
            )

    def _check_settings(self) -> None:
        given = [name for name, rule in self._rules.items() if rule]
        if len(given) > 1:
            raise ConfigError(f"a schedule picks levels by one rule, and has {' and '.join(given)}. Keep one of them.")
        for level in self._rule:
            if level not in self.levels:
                raise ConfigError(
                    f"a schedule names the level {level!r} and has: {', '.join(self.levels)}."
                    f"{did_you_mean(level, self.levels) or _renamed(level)}"
                )
        for name, rule in self._rules.items():
            bounds = [as_number(f"{name} of {level!r}", bound) for level, bound in rule.items()]
            if name == "weights":
                if bounds and (min(bounds) < 0 or sum(bounds) <= 0):
                    raise ConfigError(f"weights are not negative and not all 0, and these are {rule}.")
            elif bounds != sorted(set(bounds)):
                raise ConfigError(f"the bounds of {name} must rise from level to level, and these are {rule}.")


def _read_levels(levels: Sequence[Any] | Mapping[str, Any]) -> dict[str, PrivilegedContext | None]:
    """Return plain contexts by the names of their levels."""
    if isinstance(levels, str) or not isinstance(levels, Sequence | Mapping) or not levels:
        raise ConfigError(
            f"levels is a list of contexts, the most help first: [worked_solution, answer_only, {NONE}]; or a mapping "
            "of names to contexts."
        )
    if isinstance(levels, Mapping):
        return {str(name): _read_level(value) for name, value in levels.items()}
    contexts = [_read_level(value) for value in levels]
    names = [context.name if context else NONE for context in contexts]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two levels are called {name!r}. Name them: levels: {{first: …, second: …}}.")
    return dict(zip(names, contexts, strict=True))


def _read_level(value: Any) -> PrivilegedContext | None:
    if value is None or value == NONE:
        return None
    if isinstance(value, ContextSchedule) or (isinstance(value, Mapping) and "levels" in value):
        raise ConfigError("a level is one context, and this one is itself a schedule. List the levels in one schedule.")
    if isinstance(value, str) and value in OLD_LEVELS:
        raise ConfigError(f"a level is a template's name or a mapping, and {value!r} is neither.{_renamed(value)}")
    return as_plain_context(value)


def _renamed(level: str) -> str:
    return f" The level {level!r} is now written {OLD_LEVELS[level]}." if level in OLD_LEVELS else ""
