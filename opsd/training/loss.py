"""Scorer: rollouts and a teacher in, a loss out.

Selects the tokens to train on, renders the teacher's prompts, collects the teacher's signal, and calls the objective.
Knows no steps (the trainer's) and no formulas (the losses').

Shapes: N scored tokens of a micro-batch (packed).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from opsd.contexts.base import Context, ContextCounts
from opsd.data.needs import Need
from opsd.errors import ServerError
from opsd.losses import LossOutput, Tokens
from opsd.models.head import Head
from opsd.models.passes import can_share_prefixes, may_divide, pass_on, scored_hidden
from opsd.models.sharding import is_sharded
from opsd.rollouts import PaddedBatch, Rollouts
from opsd.signals import HiddenSignal, TeacherSignal
from opsd.teachers import SameCheckpointTeacher, StudentHandle, Teacher, TeacherView
from opsd.training.averages import Tally
from opsd.training.config import OPSDConfig
from opsd.training.micro_batches import in_order
from opsd.training.together import failing_together
from opsd.training.token_selection import TokenSelection, pass_rate_need

SLICE = 15.0  # seconds after which processes that wait for a server ask each other


@dataclass(frozen=True)
class Scored:
    """A micro-batch with the signals that its loss needs; crosses FSDP's wrapper as one opaque object.

    >>> scored = scorer.score(rollouts)  # a Scored
    >>> scorer(student, scored, device, processes=1).loss.backward()

    Args:
        rollouts: the micro-batch.
        signal: the teacher's.
        reference: of the student at step 0, with ref_kl_coef.
        contrast_signal: of the teacher under contrast_context, if that is set.
    """

    rollouts: Rollouts
    signal: TeacherSignal
    reference: HiddenSignal | None = None
    contrast_signal: TeacherSignal | None = None


class Scorer:
    """Computes the loss of a run.

    >>> scorer = Scorer(args, teacher)
    >>> scorer.prepare(student, end_ids)
    >>> scored = scorer.score(scorer.prepare_rollouts(rollouts))
    >>> scorer(student.model, scored, device, processes=1).loss.backward()

    Args:
        args: settings.
        teacher: the teacher.
    """

    def __init__(self, args: OPSDConfig, teacher: Teacher):
        self._args = args
        self.teacher = teacher
        self.objective = args.objective
        self.reference = TeacherView(SameCheckpointTeacher()) if args.ref_kl_coef else None
        self.contrast: TeacherView | None = None
        if args.contrast_context is not None:
            self.contrast = TeacherView(teacher, teacher.prompts.with_context(args.contrast_context))
        self.selection = TokenSelection()
        self._logged_counts = ContextCounts()  # of the contexts, at the last log entry
        self.is_stopped: Callable[[], bool] = lambda: False

    @property
    def views(self) -> list[TeacherView]:
        """The teacher, the reference and the contrast, as far as the run has them."""
        return [view for view in (TeacherView(self.teacher), self.reference, self.contrast) if view is not None]

    @property
    def contexts(self) -> list[Context]:
        """The contexts of all views."""
        return [context for view in self.views for context in view.prompts.contexts]

    def forget_counts(self) -> None:
        """Set the counts of all contexts to zero."""
        for view in self.views:
            view.prompts.forget_counts()

    @property
    def columns(self) -> set[str]:
        """The columns that contexts and row weights read, beside the prompt."""
        fields = (context.columns for context in self.contexts)
        return set().union(*fields, (self._args.pass_rate_column and {self._args.pass_rate_column}) or ())

    def needs(self, rollout_fields: Sequence[str] = ()) -> list[Need]:
        """Return what a row must have for contexts, routes and weights.

        Args:
            rollout_fields: names that training adds for contexts, which rows need not have.
        """
        needs = [need for view in self.views for need in view.prompts.needs(rollout_fields)]
        return needs if self._args.pass_rate_column is None else [*needs, pass_rate_need(self._args.pass_rate_column)]

    def describe(self) -> str:
        """The objective and the tokens it is computed on; a resumed run must have the same."""
        text = f"{self.objective.describe()}; tokens: {self.selection.describe()}"
        contrast = self.contrast and self.contrast.prompts.leaves[0].context
        return f"{text}, weighted against the context {contrast.name}" if contrast else text

    def prepare(self, student: StudentHandle, end_ids: Sequence[int]) -> None:
        """Prepare teacher, reference and token selection, once, for this student."""
        self.selection = TokenSelection.from_config(self._args, student.tokenizer, end_ids)
        self.teacher.prepare(student)
        if self.reference is not None and isinstance(self.teacher, SameCheckpointTeacher):
            # The same weights: one copy serves both.
            self.reference = TeacherView(self.teacher, self.teacher.prompts.with_context(None))
        elif self.reference is not None:
            self.reference.teacher.prepare(student)

    def prepare_rollouts(self, rollouts: Rollouts) -> Rollouts:
        """Select the tokens to train on, and render the prompts of all views; before any sort or split."""
        rollouts = self.selection.apply(rollouts)
        for view in self.views:
            rollouts = view.prompts.render(rollouts)
        for view in self.views:
            view.expect(rollouts)
        return self.teacher.adjust_rollouts(rollouts)

    def in_order(self, rollouts: Rollouts, parts: int) -> Rollouts:
        """Return the rows in the order in which micro-batches compute the fewest tokens, here and in local teachers."""
        student = self.teacher.student.model
        if self.teacher.lists or is_sharded(student):  # no passes here, or one over all rows of a micro-batch
            return rollouts.sorted_by_length()
        shares, a_pass = can_share_prefixes(student), pass_on(student)
        return in_order(rollouts, parts, divides_student=may_divide(student), shares=shares, a_pass=a_pass)

    def context_metrics(self) -> dict[str, Tally]:
        """Return the context metrics since the last call."""
        contexts = {id(context): context for context in self.teacher.prompts.contexts}.values()
        counts = sum((context.counts for context in contexts), ContextCounts())
        metrics = (counts - self._logged_counts).metrics if contexts else {}
        self._logged_counts = counts
        return {name: Tally(*sum_and_count) for name, sum_and_count in metrics.items()}

    def score(self, rollouts: Rollouts) -> Scored:
        """Return a micro-batch with the signals of all views; it went through `prepare_rollouts`."""
        for view in self.views if self.teacher.can_fail else ():
            rollouts = self._settled(view, rollouts)
        signal = TeacherView(self.teacher).score(rollouts)
        reference: Any = None if self.reference is None else self.reference.score(rollouts)
        contrast_signal = None if self.contrast is None else self.contrast.score(rollouts)
        return Scored(rollouts, signal, reference, contrast_signal)

    def _settled(self, view: TeacherView, rollouts: Rollouts) -> Rollouts:
        """Return the rollouts that have a score, when every process has its own; a collective every few seconds.

        Raises:
            ServerError: a process has none, or was told to stop while it waited.
        """
        while True:
            with failing_together():  # the others would wait for a process whose server does not answer
                settled = view.settle(rollouts, SLICE)
                if settled is None and self.is_stopped():
                    raise ServerError("the run was told to stop while it waited for a teacher's server.")
            if all(gather_object([settled is not None])):
                assert settled is not None
                return settled

    def __call__(self, student: nn.Module, scored: Scored, device: torch.device, processes: int) -> LossOutput:
        """Compute the loss, in one forward pass of the student.

        Args:
            student: the model that trains.
            scored: a micro-batch with its signals.
            device: of the student.
            processes: number of processes. DDP averages gradients over them, and num_loss_tokens counts the tokens of
                all of them, so the loss is multiplied by it.
        """
        batch = scored.rollouts.pad("cpu")
        hidden_ND = self.hidden(student, scored.rollouts, batch)
        tokens = self._tokens(scored.rollouts, batch.to(device), processes)
        head = Head.from_model(student)
        return self.objective(
            hidden_ND, head, scored.signal, tokens, reference=scored.reference, contrast_signal=scored.contrast_signal
        )

    def hidden(self, student: nn.Module, rollouts: Rollouts, batch: PaddedBatch) -> Tensor:
        """Return the student's last hidden states for the scored tokens, (N, D), in its dtype and on its device.

        Args:
            student: the model that trains.
            rollouts: a micro-batch.
            batch: the same, padded on the CPU.
        """
        padded = (batch.ids_BL, batch.row_N, batch.position_N)
        sequences = (rollouts.prompt_ids, rollouts.trimmed_completions)
        return scored_hidden(student, *sequences, padded, divides=may_divide(student))

    @staticmethod
    def _tokens(rollouts: Rollouts, batch: PaddedBatch, processes: int) -> Tokens:
        share = (
            processes / rollouts.num_loss_tokens if rollouts.num_loss_tokens else 1.0 / max(rollouts.num_scorable, 1)
        )
        device = batch.ids_BL.device
        logprobs = rollouts.scored_rollout_logprobs

        def on_device(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32).to(device, non_blocking=True)

        def of_row(values: Sequence[float]) -> Tensor:
            return on_device(values)[batch.row_N]

        # The teacher saw no prompt of a row that is only reinforced.
        traced = [is_traced and w > 0 for is_traced, w in zip(rollouts.is_traced, rollouts.distill_weight, strict=True)]
        return Tokens(
            weight_N=share * of_row(rollouts.row_weights),
            ids_N=batch.scored_ids_N,
            row_N=batch.row_N,
            rollout_logprobs_N=None if logprobs is None else on_device(logprobs),
            advantage_N=of_row(rollouts.advantages) if any(rollouts.advantages) else None,
            distill_weight_N=None if all(rollouts.distill_weight) else of_row(rollouts.distill_weight),
            is_traced_N=of_row(traced) > 0 if any(traced) else None,
        )
