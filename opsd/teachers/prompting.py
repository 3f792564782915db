"""The prompts of a teacher: their contexts, and how a row becomes the ids it reads.

A strategy says whose weights score; the objects here say what those weights read. So any strategy takes any context,
one set of weights can score several contexts, and whoever renders, checks columns or counts asks these objects and
never a strategy. Knows contexts, needs, renderers and rollouts; nothing of weights or signals.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self, TypeAlias

from opsd.contexts.base import Context
from opsd.contexts.reading import as_context
from opsd.contexts.renderer import PromptRenderer
from opsd.data.needs import Need, Row
from opsd.errors import ConfigError
from opsd.models.forward import check_lengths
from opsd.rollouts import Ids, Rollouts
from opsd.teachers.student import StudentHandle

ContextLike: TypeAlias = Context | str | Mapping[str, Any] | None


class PromptReader(Protocol):
    """What prompts need to know of the teacher that reads them."""

    @property
    def student(self) -> StudentHandle:
        """The student."""
        ...

    @property
    def renderer(self) -> PromptRenderer:
        """Turns this teacher's prompts into ids."""
        ...

    @property
    def max_length(self) -> int | None:
        """Tokens of prompt and completion that it can score; None for any number."""
        ...


class TeacherPrompts:
    """The prompts of one teacher under one context.

    The object is also the key of these prompts in a rollout: `rollouts.pad(device, teacher.prompts)`.

    Args:
        teacher: reads the prompts, with its own renderer and its own longest sequence.
        context: what the prompt contains beside the row's: a context, a shipped template's name, a path or a mapping;
            None for the student's own prompt.
        is_final: whether a context of None stays None when a default is given (`with_default`).

    Example:
        >>> teacher = SameCheckpointTeacher(context="answer_only")
        >>> teacher.prepare(student)
        >>> teacher.prompts.ids({"prompt": "What is 2 + 2?", "answer": "4"})
    """

    def __init__(self, teacher: PromptReader, context: ContextLike = None, *, is_final: bool = False):
        self.teacher = teacher
        self.context = as_context(context)
        self.is_final = is_final

    @property
    def leaves(self) -> list[TeacherPrompts]:
        """The prompts that are rendered: itself, or for a composite those of every part."""
        return [self]

    def leaves_of(self, row: Row) -> list[TeacherPrompts]:
        """Return the prompts that are rendered for this row."""
        return self.leaves

    @property
    def contexts(self) -> list[Context]:
        """The contexts of its leaves, where they have one."""
        return [leaf.context for leaf in self.leaves if leaf.context is not None]

    @property
    def renderer(self) -> PromptRenderer:
        """The renderer of the teacher that reads these prompts."""
        return self.teacher.renderer

    # ---- rendering --------------------------------------------------------------------------------------------

    def ids(self, row: Row, rollout_fields: Mapping[str, Any] | None = None) -> Ids:
        """Return the ids of the teacher's prompt for a row.

        Args:
            row: a dataset row.
            rollout_fields: what training made for this row; it wins over a column of the same name.
        """
        if self.context is None:
            return self.renderer.ids(row["prompt"])
        return self.context.render(row, rollout_fields, renderer=self.renderer)

    def render(self, rollouts: Rollouts) -> Rollouts:
        """Return the rollouts with the teacher's prompt of every row; call it before any sort or split.

        Raises:
            DataError: a prompt and its completion are longer than the teacher can score.
        """
        if self.context is None and self.renderer == self.teacher.student.renderer:
            # The very ids the student saw, tools and all; nothing to render again.
            return rollouts.with_teacher_prompts(self, rollouts.prompt_ids)
        rows = zip(rollouts.rows, rollouts.rollout_fields, rollouts.prompt_ids, rollouts.is_distilled, strict=True)
        prompts = [
            self.ids(row, fields) if is_distilled else student_ids for row, fields, student_ids, is_distilled in rows
        ]
        check_lengths(self.teacher.max_length, prompts, list(map(len, rollouts.trimmed_completions)), "teacher")
        return rollouts.with_teacher_prompts(self, prompts)

    # ---- rows -------------------------------------------------------------------------------------------------

    def needs(self, rollout_fields: Sequence[str] = ()) -> list[Need]:
        """Return what a row must have for its context.

        Args:
            rollout_fields: names that training adds, which rows need not have.
        """
        return [] if self.context is None else self.context.missing(rollout_fields)

    def has_fields(self, row: Row, rollout_fields: Mapping[str, Any]) -> bool:
        """Tell whether every context of this row has the fields it needs."""
        fields = {**row, **rollout_fields}
        return all(leaf.context is None or leaf.context.has_fields(fields) for leaf in self.leaves_of(row))

    def forget_counts(self) -> None:
        """Set what its contexts counted back to zero."""
        for context in self.contexts:
            context.forget_counts()

    # ---- other contexts ---------------------------------------------------------------------------------------

    def map(self, change: Callable[[TeacherPrompts], TeacherPrompts]) -> TeacherPrompts:
        """Return the same prompts with each leaf replaced by `change(leaf)`."""
        return change(self)

    def with_context(self, context: ContextLike) -> TeacherPrompts:
        """Return the same teachers' prompts, all under one context (or none)."""
        given = as_context(context)
        return self.map(lambda leaf: TeacherPrompts(leaf.teacher, given))

    def with_contexts(self, change: Callable[[Context | None], Context | None]) -> TeacherPrompts:
        """Return the same teachers' prompts with each context replaced by `change(context)`."""
        return self.map(lambda leaf: TeacherPrompts(leaf.teacher, change(leaf.context), is_final=leaf.is_final))

    def with_default(self, context: ContextLike) -> TeacherPrompts:
        """Return the same prompts, with a context for those that have none and are not final."""
        default = as_context(context)
        return self.map(
            lambda leaf: leaf if leaf.is_final or leaf.context is not None else TeacherPrompts(leaf.teacher, default)
        )

    def read_by(self, teacher: PromptReader) -> TeacherPrompts:
        """Return the same prompts for another teacher."""
        return TeacherPrompts(teacher, self.context, is_final=self.is_final)

    # ---- in words ---------------------------------------------------------------------------------------------

    def describe(self) -> str:
        """Return the names of the contexts, as a run prints them."""
        names = ["the student's own prompt" if leaf.context is None else leaf.context.name for leaf in self.leaves]
        return ", ".join(dict.fromkeys(names))

    @property
    def description(self) -> Any:
        """The contexts in plain values, which a resumed run compares."""
        return None if self.context is None else self.context.description


class CompositePrompts(TeacherPrompts):
    """The prompts of a teacher that is made of others: those of its parts.

    Args:
        teacher: the composite.
        parts: the prompts of its parts by name; a part that has two names may have one object under both.
    """

    def __init__(self, teacher: PromptReader, parts: Mapping[str, TeacherPrompts]):
        super().__init__(teacher)
        self.parts = dict(parts)

    @property
    def distinct(self) -> list[TeacherPrompts]:
        """The parts' prompts, each object once."""
        return list({id(part): part for part in self.parts.values()}.values())

    @property
    def leaves(self) -> list[TeacherPrompts]:
        """The leaves of every part, in order."""
        return [leaf for part in self.parts.values() for leaf in part.leaves]

    def leaves_of(self, row: Row) -> list[TeacherPrompts]:
        """Return the leaves of every part for this row, in order."""
        return [leaf for part in self.parts.values() for leaf in part.leaves_of(row)]

    def ids(self, row: Row, rollout_fields: Mapping[str, Any] | None = None) -> Ids:
        """Return the ids of the one prompt that is rendered for a row.

        Raises:
            ConfigError: the parts read several.
        """
        leaves = self.leaves_of(row)
        if len(leaves) != 1:
            raise ConfigError(
                f"this teacher reads {len(leaves)} prompts of a row, one for each part, so it has no single one. Ask "
                "its parts: [leaf.ids(row) for leaf in teacher.prompts.leaves_of(row)]."
            )
        return leaves[0].ids(row, rollout_fields)

    def render(self, rollouts: Rollouts) -> Rollouts:
        """Return the rollouts with every part's prompt of every row."""
        for part in self.distinct:
            rollouts = part.render(rollouts)
        return rollouts

    def needs(self, rollout_fields: Sequence[str] = ()) -> list[Need]:
        """Return what a row must have for the contexts of every part."""
        return [need for part in self.distinct for need in part.needs(rollout_fields)]

    def map(self, change: Callable[[TeacherPrompts], TeacherPrompts]) -> Self:
        """Return the same tree with each leaf replaced; a part that has two names stays one."""
        changed = {id(part): part.map(change) for part in self.distinct}
        other = copy.copy(self)
        other.parts = {name: changed[id(part)] for name, part in self.parts.items()}
        return other

    @property
    def description(self) -> dict[str, Any]:
        """Every part's contexts."""
        return {name: part.description for name, part in self.parts.items()}
