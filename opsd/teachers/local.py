"""Teachers whose weights are in this process: one forward pass over the teacher's prompts and the same completions.

A strategy says which module scores and in which state; the pass itself is here, once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from opsd.errors import AlignmentError
from opsd.models.forward import check_model, context_length, evaluating, last_hidden
from opsd.models.generation import generate
from opsd.models.head import Head
from opsd.models.sharding import is_sharded, reshard, run_in_forward
from opsd.rollouts import Ids, PaddedBatch, Rollouts
from opsd.signals import HiddenSignal
from opsd.teachers.base import Row, StudentHandle, Teacher


class LocalTeacher(Teacher):
    """A teacher that runs in this process."""

    @property
    @abstractmethod
    def model(self) -> nn.Module:
        """The module that scores: the student itself, or another one."""

    @abstractmethod
    def teaching(self) -> AbstractContextManager[None]:
        """Put `model` into the teacher's state for the length of the block (adapter off, average swapped in, …)."""

    @property
    def max_length(self) -> int | None:
        """Tokens of prompt and completion that the model's positions reach."""
        return context_length(self.model)

    @property
    def can_sample(self) -> bool:
        """It has a model at hand."""
        return True

    @property
    def collective(self) -> bool:
        """Whether its processes exchange weights while it scores."""
        return is_sharded(self.model)

    def prepare(self, student: StudentHandle) -> None:
        """Place the weights and prove, in the teacher's own state, that its logits can be reproduced."""
        super().prepare(student)
        self.place(student)
        with self.teaching():
            check_model(self.model, len(self.renderer.tokenizer))

    @abstractmethod
    def place(self, student: StudentHandle) -> None:
        """Load, copy or borrow the weights."""

    def score(self, rollouts: Rollouts) -> HiddenSignal:
        """Return the teacher's last hidden states for the scored tokens, packed like the rollouts.

        Raises:
            AlignmentError: the tokens it scored are not the tokens that the student sampled.
        """
        return self.score_views([self], rollouts)[0]

    def score_views(self, views: Sequence[LocalTeacher], rollouts: Rollouts) -> list[HiddenSignal]:
        """Return what these weights say under several contexts, in one pass over all of them.

        Args:
            views: this teacher, or others made of it by `showing`.
            rollouts: a micro-batch that went through `show` of each.

        Raises:
            AlignmentError: as `score`.
        """
        key = views[0].key
        together = rollouts if len(views) == 1 else rollouts.stacked([view.key for view in views], key)
        batch = together.pad(next(self.model.parameters()).device, key)
        if batch.scored_ids_N.tolist() != rollouts.scored_ids * len(views):
            raise AlignmentError(
                f"teacher {self.strategy!r} scored other tokens than the student sampled. Every loss computed from "
                "them would be noise. This is a bug in opsd or in a custom teacher: a completion's ids must reach "
                "both sides unchanged."
            )
        with self.teaching(), evaluating(self.model):
            found = run_in_forward(self.model, lambda: self._signal(batch))
            reshard(self.model)
        count = len(found) // len(views)
        return [found.select(slice(number * count, (number + 1) * count)) for number in range(len(views))]

    def _signal(self, batch: PaddedBatch) -> HiddenSignal:
        """Run the pass, on the teacher's device, and bring its answer to the student's."""
        hidden_ND = last_hidden(self.model, batch.ids_BL, batch.mask_BL, batch.predicts_scored_BL)
        head = Head.from_model(self.model).detach()
        if is_sharded(self.model):
            # What a pass gathered is dropped after it; the loss reads the head later.
            head = head.gathered().copy()
        device = next(self._student.model.parameters()).device
        return HiddenSignal(hidden_ND.to(device), head.to(device))

    def sample(self, rows: Sequence[Row], *, max_new_tokens: int, **sampling: Any) -> list[Ids]:
        """Return this teacher's own completions for rows, seen through its context."""
        prompts = [self.prompt_ids(row) for row in rows]
        with self.teaching():
            return generate(self.model, prompts, self.renderer.tokenizer, max_new_tokens=max_new_tokens, **sampling)
