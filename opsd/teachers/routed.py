"""A teacher per kind of row: which one answers stands in a column (multi-teacher distillation)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset

from opsd.contexts.base import Context
from opsd.errors import ConfigError, DataError, did_you_mean
from opsd.rollouts import Ids, Rollouts
from opsd.signals import RoutedSignal
from opsd.teachers.base import Row, Teacher
from opsd.teachers.composite import CompositeTeacher


class RoutedTeacher(CompositeTeacher):
    """Each row is scored by the teacher that its column names.

    Args:
        column: the column.
        teachers: the column's values (compared as text) -> teachers, as `load_teacher` takes them.
        context: what teachers without a context of their own are shown.

    Raises:
        ConfigError: no teachers.
    """

    strategy = "routed"

    def __init__(
        self,
        column: str,
        teachers: Mapping[Any, Any],
        *,
        context: Context | str | Mapping[str, Any] | None = None,
    ):
        from opsd.teachers import load_teacher  # its table has this class in it

        if not isinstance(teachers, Mapping) or not teachers:
            raise ConfigError(
                f"a route needs a teacher for each value of the column {column!r}: {{value: teacher}}, and was given "
                f"{teachers!r:.80}."
            )
        self.column = column
        parts = {str(value): load_teacher(teacher) for value, teacher in teachers.items()}
        for name, part in parts.items():
            if isinstance(part, RoutedTeacher):
                raise ConfigError(
                    f"part {name!r} of this {self.strategy} is itself one. Name its parts here instead: the result is "
                    "the same, and the weights are in one place."
                )
        super().__init__(parts, context=context)

    def route(self, row: Row) -> str:
        """Return the name of the teacher that scores a row.

        Raises:
            DataError: there is none.
        """
        value = str(row.get(self.column))
        if value not in self.parts:
            raise DataError(
                f"column {self.column!r} holds {value!r}, and no teacher is named for it."
                f"{did_you_mean(value, self.parts)} Such rows could not be scored. Teachers: {', '.join(self.parts)}. "
                "Add one, or drop these rows."
            )
        return value

    def views_of(self, row: Row) -> list[Teacher]:
        """Return those who score this row."""
        return self.parts[self.route(row)].views_of(row)

    def check_rows(self, dataset: Any, columns: Sequence[str], rollout_fields: Sequence[str] = ()) -> None:
        """Check that every row has a teacher, and what that teacher's context reads."""
        if self.column not in columns:
            raise DataError(
                f"teachers are chosen by the column {self.column!r}, and the dataset has: {', '.join(columns)}."
                f"{did_you_mean(self.column, columns)}"
            )
        if not isinstance(dataset, Dataset):
            super().check_rows(dataset, columns, rollout_fields)
            return
        routes = [self._route_of(number, value) for number, value in enumerate(dataset[self.column])]
        for name, part in self.parts.items():
            mine = [number for number, route in enumerate(routes) if route == name]
            part.check_rows(dataset.select(mine), columns, rollout_fields)

    def _route_of(self, number: int, value: Any) -> str:
        try:
            return self.route({self.column: value})
        except DataError as error:
            raise DataError(f"row {number}: {error}") from error

    def render_prompts(self, rollouts: Rollouts) -> Rollouts:
        """Render for each row its own teacher's prompt."""
        routes = self._routes(rollouts.rows)
        for part in self.owners:
            # For other teachers' rows it renders nothing: they get one token, which fits any model and nobody scores.
            others = [route is not part for route in routes]
            prompts = [ids[-1:] if other else ids for ids, other in zip(rollouts.prompt_ids, others, strict=True)]
            mine = part.render_prompts(replace(rollouts.without(others), prompt_ids=prompts))
            rollouts = replace(rollouts, teacher_prompt_ids=mine.teacher_prompt_ids)
        return rollouts

    def _routes(self, rows: Sequence[Row]) -> list[Teacher]:
        """Return each row's teacher."""
        return [self.parts[self.route(row)] for row in rows]

    def score(self, rollouts: Rollouts) -> RoutedSignal:
        """Ask each teacher about its rows; one whose weights are sharded is asked in any case."""
        routes = self._routes(rollouts.rows)
        row_N = [number for number, mask in enumerate(rollouts.loss_mask or ()) for _ in range(sum(mask))]
        signals: list[Any] = []
        indices: list[torch.Tensor] = []
        for part in self.owners:
            mine = [number for number, route in enumerate(routes) if route is part]
            if not mine and not part.collective:
                continue
            asked = rollouts.select(mine) if mine else rollouts.select([0]).without([True])
            signal = part.score(asked)
            signals.append(signal)
            tokens = [n for n, row in enumerate(row_N) if routes[row] is part]
            indices.append(torch.tensor(tokens, dtype=torch.long, device=self._device))
        return RoutedSignal(signals, indices)

    @property
    def _device(self) -> torch.device:
        return next(self._student.model.parameters()).device

    @property
    def can_sample(self) -> bool:
        """Whether all its teachers can."""
        return all(part.can_sample for part in self.owners)

    def sample(self, rows: Sequence[Row], *, max_new_tokens: int, **sampling: Any) -> list[Ids]:
        """Return each row's own teacher's completion."""
        found: dict[int, Ids] = {}
        routes = self._routes(rows)
        for part in self.owners:
            mine = [number for number, route in enumerate(routes) if route is part]
            if mine:
                completions = part.sample([rows[n] for n in mine], max_new_tokens=max_new_tokens, **sampling)
                found |= dict(zip(mine, completions, strict=True))
        return [found[number] for number in range(len(rows))]

    @property
    def settings(self) -> dict[str, Any]:
        """Column and parts."""
        return {"column": self.column, **super().settings}

    def describe(self) -> str:
        """Who scores what."""
        return f"by column {self.column!r}: " + "; ".join(
            f"{name}: {part.describe()}" for name, part in self.parts.items()
        )
