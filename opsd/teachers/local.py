"""Teachers whose weights are in this process: one forward pass over the teacher's prompts and the same completions.

A strategy says which module scores and how it comes to hold the teacher's weights; the pass itself is here, once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import nn

from opsd.errors import AlignmentError
from opsd.models.forward import check_model, context_length, evaluating
from opsd.models.generation import generate, stop_ids_of
from opsd.models.head import Head
from opsd.models.passes import may_divide, scored_hidden
from opsd.models.sharding import is_sharded, reshard, run_in_forward
from opsd.rollouts import Ids, PaddedBatch, Rollouts
from opsd.signals import HiddenSignal
from opsd.teachers.base import Teacher
from opsd.teachers.prompting import Row
from opsd.teachers.student import StudentHandle


class LocalTeacher(Teacher):
    """A teacher that scores with a transformers model of this process; the base of most strategies.

    Example:
        >>> class Frozen(LocalTeacher):
        ...     def load_weights(self, student):
        ...         self._model = load_model("organisation/model")[0]
        ...
        ...     @property
        ...     def model(self):
        ...         return self._model
        ...
        ...     def active_weights(self):
        ...         return nullcontext()
    """

    @property
    @abstractmethod
    def model(self) -> nn.Module:
        """The module that scores: the student itself, or another one."""

    @abstractmethod
    def load_weights(self, student: StudentHandle) -> None:
        """Load, copy or borrow the weights; called by `prepare`."""

    @abstractmethod
    def active_weights(self) -> AbstractContextManager[None]:
        """Let `model` hold the teacher's weights for a block: adapter off, average swapped in, …"""

    def prepare(self, student: StudentHandle) -> None:
        """Load the weights, and check that their logits can be computed from hidden states and head.

        Raises:
            UnsupportedModelError: they cannot.
        """
        super().prepare(student)
        self.load_weights(student)
        with self.active_weights():
            check_model(self.model, len(self.renderer.tokenizer))

    def score(self, rollouts: Rollouts) -> HiddenSignal:
        """Return the teacher's last hidden states for the scored tokens, packed like the rollouts.

        Raises:
            AlignmentError: the tokens it scored are not the tokens that the student sampled.
        """
        batch = rollouts.pad("cpu", self.prompts)  # compared there: a GPU would have to be waited for
        if batch.scored_ids_N.tolist() != rollouts.scored_ids:
            raise AlignmentError(
                f"teacher {self.strategy!r} scored other tokens than the student sampled. Every loss computed from "
                "them would be noise. This is a bug in opsd or in a custom teacher: a completion's ids must reach "
                "both sides unchanged."
            )
        is_students = self.model is self.student.model and is_sharded(self.model)
        head = Head.from_model(self.model)
        with self.active_weights(), evaluating(self.model):
            # A module that an adapter saves whole is another one while the adapter is off.
            shares = is_students and Head.from_model(self.model).weight_VD is head.weight_VD
            shares = shares and not head.weight_VD.requires_grad
            signal = run_in_forward(self.model, lambda: self._signal(rollouts, batch, copies_head=not shares))
            reshard(self.model)
        return replace(signal, head=replace(head.detach(), is_students=True)) if shares else signal

    def _signal(self, rollouts: Rollouts, batch: PaddedBatch, *, copies_head: bool) -> HiddenSignal:
        """Run the passes on the teacher's device, and move their result to the student's."""
        prompts = rollouts.prompts_of(self.prompts)
        # With the student's own prompts it makes the student's passes: equal weights give equal numbers, to the bit.
        divides = list(prompts) != list(rollouts.prompt_ids) or may_divide(self.student.model)
        padded = (batch.ids_BL, batch.row_N, batch.position_N)
        sequences = (prompts, rollouts.trimmed_completions)
        hidden_ND = scored_hidden(self.model, *sequences, padded, divides=divides)
        head = Head.from_model(self.model).detach()
        if is_sharded(self.model) and copies_head:
            # What a pass gathered is dropped after it; the loss reads the head later.
            head = head.gathered().copy()
        device = self.student.device
        return HiddenSignal(hidden_ND.to(device), head.to(device))

    def sample(self, rows: Sequence[Row], *, max_new_tokens: int, **sampling: Any) -> list[Ids]:
        """Return this teacher's own completions, one per row."""
        prompts = [self.prompts.ids(row) for row in rows]
        # Completions end where the student's do as well: what it would write next is not part of an answer.
        sampling["stop_ids"] = stop_ids_of(self.student.model, self.student.tokenizer)
        sampling["max_new_tokens"] = max_new_tokens
        with self.active_weights():
            if self.model is self.student.model:
                return self.student.complete(prompts, **sampling)
            return generate(self.model, prompts, self.renderer.tokenizer, **sampling)

    @property
    def max_length(self) -> int | None:
        """Tokens of prompt and completion that the model's positions reach."""
        return context_length(self.model)

    @property
    def collective(self) -> bool:
        """Whether the model is sharded, so that its processes exchange weights while it scores."""
        return is_sharded(self.model)

    @property
    def samples_together(self) -> bool:
        """Whether it samples through the student's engine, which all processes ask at once."""
        return self.model is self.student.model and self.student.engine is not None
