"""The one interface of all teachers, and what a teacher is told of the student.

A teacher says *whose weights* score a rollout; its `context` says *what they are shown*. Any teacher takes any
context, or none. This file knows rollouts, contexts and signals; it knows nothing of losses or trainers.

Shapes: N scored tokens of a micro-batch (packed).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from opsd.contexts.base import Context
from opsd.contexts.reading import as_context
from opsd.contexts.renderer import PromptRenderer
from opsd.errors import ConfigError
from opsd.models.forward import check_lengths
from opsd.rollouts import Ids, Rollouts
from opsd.signals import TeacherSignal
from opsd.teachers.weight_copy import megabytes

Row: TypeAlias = Mapping[str, Any]
History: TypeAlias = Sequence[Mapping[str, Any]]  # what a run has logged: entries with their `step`


@dataclass(frozen=True)
class StudentHandle:
    """What a teacher is told of the student, once, before the first step.

    Args:
        model: the student, without any distributed wrapper.
        renderer: how the student's own prompts become ids.
        trust_remote_code: whether loading a teacher may run code that came with its weights.
    """

    model: nn.Module
    renderer: PromptRenderer
    trust_remote_code: bool = False

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's tokenizer."""
        return self.renderer.tokenizer


@dataclass(frozen=True)
class Cost:
    """What a teacher costs beside the student.

    Args:
        megabytes: memory of the weights it holds, counted from its tensors; on this process, where they are sharded.
        offloaded: of these, in CPU memory.
        passes: sequences it sends through a model per rollout, counted on a probe; None before that.
        micro_batches: of an optimizer step.
    """

    megabytes: float
    offloaded: float = 0.0
    passes: float | None = None
    micro_batches: int = 1

    def __str__(self) -> str:
        away = f" ({self.offloaded:,.0f} of them in CPU memory)" if self.offloaded else ""
        counted = ""
        if self.passes is not None:
            counted = f"; forward passes per step: {self.passes * self.micro_batches:g}, per rollout: {self.passes:g}"
        return f"{self.megabytes:,.0f} MB of weights beside the student's{away}{counted}"


class Teacher(ABC):
    """Scores rollouts; see `opsd.teachers` for the table of strategies.

    Args:
        context: what the teacher is shown beside the prompt: a PrivilegedContext, a shipped template's name, a path
            to a template, or None for the student's own prompt.
    """

    strategy: str  # its name in the table

    def __init__(self, *, context: Context | str | Mapping[str, Any] | None = None):
        self.context = as_context(context)
        self._renderer: PromptRenderer | None = None

    # ---- what a strategy writes -------------------------------------------------------------------------------

    def prepare(self, student: StudentHandle) -> None:
        """Get ready, once: place weights, compare tokenizers, state the cost. Strategies extend this."""
        self._student = student
        self._renderer = student.renderer

    @abstractmethod
    def score(self, rollouts: Rollouts) -> TeacherSignal:
        """Return the teacher's distributions for the scored tokens, without gradient, packed like the rollouts.

        Args:
            rollouts: a micro-batch that went through `show`.
        """

    @abstractmethod
    def describe(self) -> str:
        """Whose weights these are and how they move, in one sentence; printed before the first step."""

    @property
    def max_length(self) -> int | None:
        """Tokens of prompt and completion that it can score; None where nothing limits it."""
        return None

    @property
    def starts_as_student(self) -> bool:
        """Whether it is the student's own weights at step 0: without a context it then says what the student says."""
        return False

    @property
    def cautions(self) -> list[str]:
        """What a user should know of its settings before training, in sentences."""
        return []

    @property
    def collective(self) -> bool:
        """Whether `score` must be called in every process at the same time, rows or no rows."""
        return False

    @property
    def tensors(self) -> list[Tensor]:
        """The weights that it holds beside the student's; what it costs is counted from them."""
        return []

    def after_step(self, step: int) -> str | None:
        """Follow the student after optimizer step number `step` (1, 2, …), before it is logged and saved.

        Returns:
            What the user is told, or None.
        """
        return None

    def before_step(self, done: int, history: History) -> str | None:
        """Follow the student before the next step, when all of the steps done was logged and evaluated.

        Args:
            done: optimizer steps done.
            history: what was logged of them.

        Returns:
            What the user is told, or None.
        """
        return None

    def shard(self) -> None:  # noqa: B027 - most teachers have nothing that could be sharded
        """Follow the student into its sharded form; called once, after it was prepared for training."""

    @property
    def watches(self) -> Mapping[str, int]:
        """Logged metrics that `before_step` reads, and in how many steps it must find an entry of each."""
        return {}

    @property
    def can_sample(self) -> bool:
        """Whether `sample` works."""
        return False

    @property
    def metrics(self) -> Mapping[str, float]:
        """What it says of itself in the log, the same in every process."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resume needs and cannot make again."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        assert not state, f"{type(self).__name__} keeps no state, and was given {sorted(state)}"

    @property
    def settings(self) -> dict[str, Any]:
        """The numbers that define it, for the checkpoint and the log."""
        return {}

    # ---- whose prompts are rendered, for which rows -----------------------------------------------------------

    @property
    def views(self) -> list[Teacher]:
        """Everyone who is shown a prompt: itself, or the parts it is made of."""
        return [self]

    @property
    def contexts(self) -> list[Context]:
        """What its views are shown, of those that are shown anything."""
        return [view.context for view in self.views if view.context is not None]

    @property
    def shown(self) -> str:
        """What it is shown, in words."""
        return self.context.name if self.context is not None else "the student's own prompt"

    def forget_counts(self) -> None:
        """Let its contexts count from here."""
        for context in self.contexts:
            context.forget_counts()

    def views_of(self, row: Row) -> list[Teacher]:
        """Return those of its views that score this row."""
        return self.views

    def check_rows(self, dataset: Any, columns: Sequence[str], rollout_fields: Sequence[str] = ()) -> None:
        """Check that rows have what contexts read, before a model loads; of a stream only the columns.

        Args:
            dataset: prepared rows.
            columns: their columns.
            produced: names that training will add.

        Raises:
            TemplateError: a template needs a column, or finds it empty.
            DataError: a row that no teacher can score.
        """
        if self.context is not None:
            self.context.check_columns(columns, rollout_fields)
            if isinstance(dataset, Dataset):
                self.context.check_rows(dataset, rollout_fields)

    def has_fields(self, row: Row, rollout_fields: Mapping[str, Any]) -> bool:
        """Tell whether there is anything to show beside the prompt, where that is made during training."""
        contexts = [view.context for view in self.views_of(row)]
        return all(context is None or context.has_fields({**row, **rollout_fields}) for context in contexts)

    # ---- what every strategy can do ---------------------------------------------------------------------------

    @property
    def cost(self) -> Cost:
        """What it costs beside the student."""
        away = [t for t in self.tensors if t.device.type == "cpu"] if torch.cuda.is_available() else []
        return Cost(megabytes(self.tensors), megabytes(away))

    @property
    def description(self) -> dict[str, Any]:
        """Strategy, numbers and context: what a resume compares."""
        context = None if self.context is None else self.context.description
        return {"strategy": self.strategy, **self.settings, "context": context}

    @property
    def key(self) -> str:
        """Its own prompts' name among a rollout's: two teachers of one strategy are shown different things."""
        return f"{self.strategy} {id(self):x}"

    def with_context(self, context: Context | str | Mapping[str, Any] | None) -> Self:
        """Return the same teacher, weights and all, shown something else; it follows this one, not the student."""
        other = copy.copy(self)
        other.context = as_context(context)
        return other

    def with_contexts(self, change: Callable[[Context | None], Context | None]) -> Teacher:
        """Return the same teacher, each of its contexts changed; call it before `prepare`."""
        return self.with_context(change(self.context))

    def with_default_context(self, context: Context) -> Teacher:
        """Return the teacher with a context for those of its views that were given none."""
        return self if self.context is not None else self.with_context(context)

    @property
    def renderer(self) -> PromptRenderer:
        """How this teacher's prompts become ids: its own tokenizer and chat template."""
        assert self._renderer is not None, "call prepare(student) first"
        return self._renderer

    def prompt_ids(self, row: Row, rollout_fields: Mapping[str, Any] | None = None) -> Ids:
        """Return the ids of the prompt this teacher sees for a row."""
        if self.context is None:
            return self.renderer.ids(row["prompt"])
        return self.context.render(row, rollout_fields, renderer=self.renderer)

    def render_prompts(self, rollouts: Rollouts) -> Rollouts:
        """Render this teacher's prompt for every rollout, before any sort or split."""
        if self.context is None and self.renderer == self._student.renderer:
            # The very ids the student saw, tools and all; nothing to render again.
            return rollouts.with_teacher_prompts(self.key, rollouts.prompt_ids)
        prompts = [
            self.prompt_ids(row, made) if is_distilled else rollouts.prompt_ids[number]
            for number, (row, made, is_distilled) in enumerate(
                zip(rollouts.rows, rollouts.rollout_fields, rollouts.is_distilled, strict=True)
            )
        ]
        check_lengths(self.max_length, prompts, [len(ids) for ids in rollouts.needed_ids], "teacher")
        return rollouts.with_teacher_prompts(self.key, prompts)

    def sample(self, rows: Sequence[Row], *, max_new_tokens: int, **sampling: Any) -> list[Ids]:
        """Return this teacher's own completions for rows, seen through its context.

        Args:
            rows: dataset rows.
            max_new_tokens: tokens per completion at most.
            sampling: `do_sample`, `temperature`, `batch_size`, … of `opsd.models.generation.generate`.

        Raises:
            ConfigError: this strategy scores and cannot sample.
        """
        raise ConfigError(
            f"teacher {self.strategy!r} scores tokens and cannot sample its own: that takes one model at hand. Use "
            "another teacher, or set seq_kd to false."
        )

    def logprobs(self, rows: Sequence[Row], completions: Sequence[Ids]) -> list[list[float]]:
        """Return log p in nats of every completion token under this teacher; needs no trainer.

        Args:
            rows: dataset rows.
            completions: their completions as token ids, in the same order.
        """
        prompts = [self._student.renderer.ids(row["prompt"]) for row in rows]
        rollouts = self.render_prompts(Rollouts(rows, prompts, completions))
        signal = self.score(rollouts)
        device = next(self._student.model.parameters()).device
        values = iter(signal.logprobs(torch.tensor(rollouts.scored_ids, device=device)).tolist())
        return [[next(values) for _ in completion] for completion in completions]
