"""A teacher per kind of row, chosen by a column of the dataset (multi-teacher distillation)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from opsd.data.needs import Need, Row
from opsd.errors import ConfigError, DataError, did_you_mean
from opsd.rollouts import Ids, Rollouts
from opsd.signals import RoutedSignal
from opsd.teachers.base import Teacher, TeacherView
from opsd.teachers.composite import CompositeTeacher
from opsd.teachers.local import LocalTeacher
from opsd.teachers.prompting import CompositePrompts, ContextLike, PromptReader, TeacherPrompts


class RoutedPrompts(CompositePrompts):
    """The prompts of a route: each row is rendered for its own teacher only.

    Args:
        teacher: the route.
        parts: the prompts of its teachers by the column's values.
        column: the column that names a row's teacher.

    Example:
        >>> route.prompts.part_of({"domain": "math", "prompt": "…"})
        "math"
    """

    def __init__(self, teacher: PromptReader, parts: Mapping[str, TeacherPrompts], column: str):
        super().__init__(teacher, parts)
        self.column = column

    def part_of(self, row: Row) -> str:
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

    def leaves_of(self, row: Row) -> list[TeacherPrompts]:
        """Return the prompts that the row's teacher reads."""
        return self.parts[self.part_of(row)].leaves_of(row)

    def needs(self, rollout_fields: Sequence[str] = ()) -> list[Need]:
        """Return the need of a teacher for every row, and what that teacher's context needs of its rows."""
        needs = [
            Need(
                (self.column,),
                "a teacher per kind of row",
                "Rows without a teacher could not be scored.",
                f"name a teacher for every value of the column, now: {', '.join(self.parts)}",
                find_problem=self._find_problem,
            )
        ]
        for part in self.distinct:
            needs += [need.only_where(partial(self._is_scored_by, part)) for need in part.needs(rollout_fields)]
        return needs

    def _find_problem(self, row: Row) -> str | None:
        value = str(row.get(self.column))
        if value in self.parts:
            return None
        hint = did_you_mean(value, self.parts).strip()
        return f"holds {value!r} ({hint})" if hint else f"holds {value!r}"

    def _is_scored_by(self, part: TeacherPrompts, row: Row) -> bool:
        return self.parts.get(str(row.get(self.column))) is part

    def render(self, rollouts: Rollouts) -> Rollouts:
        """Return the rollouts with the prompt of each row's own teacher."""
        names = [self.part_of(row) for row in rollouts.rows]
        for prompts in self.distinct:
            # For other teachers' rows it renders nothing: they get one token, which fits any model and is not scored.
            is_other = [self.parts[name] is not prompts for name in names]
            short = [ids[-1:] if other else ids for ids, other in zip(rollouts.prompt_ids, is_other, strict=True)]
            rendered = prompts.render(replace(rollouts.mask_rows(is_other), prompt_ids=short))
            rollouts = replace(rollouts, teacher_prompt_ids=rendered.teacher_prompt_ids)
        return rollouts


class RoutedTeacher(CompositeTeacher):
    """Each row is scored by the teacher that its column names.

    Args:
        column: the column.
        teachers: the column's values (compared as text) -> Teacher objects.
        context: the context of teachers that have none.

    Raises:
        ConfigError: no teachers, or a route among them.

    Example:
        >>> RoutedTeacher("domain", {"math": SiblingTeacher("Qwen/Qwen3-8B"), "chat": SameCheckpointTeacher()})
    """

    strategy = "routed"

    def __init__(self, column: str, teachers: Mapping[Any, Teacher], *, context: ContextLike = None):
        if not isinstance(teachers, Mapping) or not teachers:
            raise ConfigError(
                f"a route needs a teacher for each value of the column {column!r}: {{value: teacher}}, and was given "
                f"{teachers!r:.80}."
            )
        self.column = column
        super().__init__({str(value): teacher for value, teacher in teachers.items()})
        for name, part in self.parts.items():
            if isinstance(part, RoutedTeacher):
                raise ConfigError(
                    f"part {name!r} of this {self.strategy} is itself one. Name its parts here instead: the result is "
                    "the same, and the weights are in one place."
                )
        self.prompts = RoutedPrompts(self, {name: part.prompts for name, part in self.parts.items()}, column)
        if context is not None:
            self.prompts = self.prompts.with_default(context)

    def _groups(self, rows: Sequence[Row]) -> list[tuple[TeacherView, list[int]]]:
        """Return each distinct part, and the numbers of the rows that it scores."""
        prompts = self.prompts
        assert isinstance(prompts, RoutedPrompts)
        names = [prompts.part_of(row) for row in rows]
        views = {id(prompts.parts[name]): self.view(name) for name in self.parts}
        return [
            (view, [number for number, name in enumerate(names) if prompts.parts[name] is view.prompts])
            for view in views.values()
        ]

    def expect(self, rollouts: Rollouts) -> None:
        """Let each teacher begin with its rows."""
        for view, rows in self._groups(rollouts.rows):
            if rows:
                view.expect(rollouts.select(rows))

    def settle(self, rollouts: Rollouts, seconds: float) -> Rollouts | None:
        """Return the rollouts without those that their own teacher cannot score."""
        for view, rows in self._groups(rollouts.rows):
            if rows and view.teacher.can_fail:
                settled = view.settle(rollouts.select(rows), seconds)
                if settled is None:
                    return None
                is_lost = dict(zip(rows, settled.unscored or [], strict=True))
                rollouts = rollouts.without_scores([is_lost.get(row, False) for row in range(len(rollouts))])
        return rollouts

    def score(self, rollouts: Rollouts) -> RoutedSignal:
        """Return each teacher's signal of its rows; one whose weights are sharded is asked in any case."""
        row_N = [number for number, mask in enumerate(rollouts.loss_mask or ()) for _ in range(sum(mask))]
        signals: list[Any] = []
        indices: list[torch.Tensor] = []
        for view, rows in self._groups(rollouts.rows):
            if not rows and not view.teacher.collective:
                continue
            part = rollouts.select(rows) if rows else rollouts.select([0]).mask_rows([True])
            signals.append(view.score(part))
            own_rows = set(rows)
            tokens = [n for n, row in enumerate(row_N) if row in own_rows]
            indices.append(torch.tensor(tokens, dtype=torch.long, device=self.student.device))
        return RoutedSignal(signals, indices)

    @property
    def can_sample(self) -> bool:
        """Whether all its teachers can."""
        return all(part.can_sample for part in self.distinct_parts)

    def sample(self, rows: Sequence[Row], *, max_new_tokens: int, **sampling: Any) -> list[Ids]:
        """Return the completion of each row's own teacher."""
        completions: dict[int, Ids] = {}
        for view, numbers in self._groups(rows):
            if numbers or (isinstance(view.teacher, LocalTeacher) and view.teacher.samples_together):
                sampled = view.sample([rows[n] for n in numbers], max_new_tokens=max_new_tokens, **sampling)
                completions |= dict(zip(numbers, sampled, strict=True))
        return [completions[number] for number in range(len(rows))]

    @property
    def settings(self) -> dict[str, Any]:
        """Column and parts."""
        return {"column": self.column, **super().settings}

    def describe(self) -> str:
        """Return which teacher scores which rows."""
        return f"by column {self.column!r}: " + "; ".join(
            f"{name}: {part.describe()}" for name, part in self.parts.items()
        )
