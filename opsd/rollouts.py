"""Rollouts: rows, prompts and sampled completions, and which of their tokens are scored.

Keeps ragged lists of ids; padding and micro-batching happen here and nowhere else. Knows nothing of models, teachers or
losses. A completion is the very ids that were sampled: never decoded, never tokenised again.

Shapes: B rows · L tokens of a padded sequence · N scored tokens of a micro-batch (packed, row by row).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from opsd.errors import TeacherError

Ids = list[int]
PAD = 0  # any id will do: padded positions are to the right of all tokens, and never kept

# What every row has where a field was left empty.
DEFAULTS: dict[str, Any] = {
    "row_weights": 1.0,
    "rollout_fields": {},
    "distill_weight": 1.0,
    "advantages": 0.0,
    "on_policy": True,
    "rewards": math.nan,
    "is_traced": False,
}


@dataclass(frozen=True)
class PaddedBatch:
    """Prompts ++ completions as tensors, padded on the right.

    Args:
        ids_BL: int64 token ids.
        row_N: int64, the row of each scored token.
        position_N: int64, the position whose state predicts it: the one before its own.
        scored_ids_N: int64, the scored tokens.

    Example:
        >>> batch = rollouts.pad("cpu")
        >>> last_hidden(model, batch.ids_BL, batch.row_N, batch.position_N)  # (N, D)
    """

    ids_BL: Tensor
    row_N: Tensor
    position_N: Tensor
    scored_ids_N: Tensor

    def to(self, device: torch.device | str) -> PaddedBatch:
        """Return the same tensors on a device; torch need not wait for what a GPU is doing."""
        return PaddedBatch(*(getattr(self, each.name).to(device, non_blocking=True) for each in fields(self)))


@dataclass(frozen=True)
class Rollouts:
    """Rows, their student prompts and their completions, as lists of equal length.

    Args:
        rows: dataset rows, with every privileged column.
        prompt_ids: the student's prompts.
        completion_ids: sampled ids (or the row's completion, off-policy).
        loss_mask: per completion, 1 for tokens that are scored, 0 for tool output; None scores all.
        teacher_prompt_ids: teacher prompts by the object that rendered them (`teacher.prompts.render(rollouts)`).
        num_loss_tokens: scorable tokens of the whole generation batch over all processes; the loss divides by it.
        row_weights: weight of each row in the loss; empty for all 1.
        rollout_fields: per row, fields for the teacher's context that training makes (a correct sibling's text,
            feedback); empty for none.
        distill_weight: per row, 1 where the teacher trains it and 0 where only its reward does; empty for all 1.
        advantages: per row, its reward relative to its group; empty for all 0.
        rollout_logprobs: per completion, log p in nats of each token where it was sampled, NaN where unknown;
            None where no engine reports them.
        on_policy: per row, whether the student sampled its completion; empty for all.
        rewards: per row, the weighted sum of its rewards, NaN where nothing grades it; empty for all NaN.
        is_traced: per row, whether a trace keeps what both sides said of its tokens; empty for none.
        unscored: per row, whether the teacher had no score for it, so that it left the loss; None where every teacher
            has all scores.

    Example:
        >>> rollouts = Rollouts(rows, [[5, 6], [7]], [[8, 2], [9, 9, 2]])
        >>> rollouts.scored_ids
        [8, 2, 9, 9, 2]
    """

    rows: Sequence[Mapping[str, Any]]
    prompt_ids: Sequence[Ids]
    completion_ids: Sequence[Ids]
    loss_mask: Sequence[Ids] | None = None
    teacher_prompt_ids: Mapping[Hashable, Sequence[Ids]] = field(default_factory=dict)
    num_loss_tokens: float | None = None
    row_weights: Sequence[float] = ()
    rollout_fields: Sequence[Mapping[str, Any]] = ()
    distill_weight: Sequence[float] = ()
    advantages: Sequence[float] = ()
    rollout_logprobs: Sequence[Sequence[float]] | None = None
    on_policy: Sequence[bool] = ()
    rewards: Sequence[float] = ()
    is_traced: Sequence[bool] = ()
    unscored: Sequence[bool] | None = None

    def __post_init__(self) -> None:
        if self.loss_mask is None:
            object.__setattr__(self, "loss_mask", [[1] * len(ids) for ids in self.completion_ids])
        for name, default in DEFAULTS.items():
            if not getattr(self, name):
                object.__setattr__(self, name, [default] * len(self.rows))
        assert self.loss_mask is not None
        assert len(self.rows) == len(self.prompt_ids) == len(self.completion_ids) == len(self.loss_mask)
        assert all(len(a) == len(b) for a, b in zip(self.completion_ids, self.loss_mask, strict=True))
        # The first token is predicted from the last prompt token: without one it could not be scored.
        assert all(self.prompt_ids), "an empty prompt cannot predict a first token"

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_scorable(self) -> int:
        """The number of scored tokens."""
        return sum(map(sum, self.loss_mask or ()))

    @property
    def scored_ids(self) -> Ids:
        """The scored tokens, row by row; student and teacher must score these and no others."""
        return self._of_scored_tokens(self.completion_ids)

    @property
    def scored_rollout_logprobs(self) -> list[float] | None:
        """The scored tokens' log-probabilities in the engine that sampled them; None where no engine reports them."""
        return None if self.rollout_logprobs is None else self._of_scored_tokens(self.rollout_logprobs)

    def _of_scored_tokens(self, values: Sequence[Sequence[Any]]) -> list[Any]:
        return [
            value
            for row, scored in zip(values, self.loss_mask or (), strict=True)
            for value, is_scored in zip(row, scored, strict=True)
            if is_scored
        ]

    @property
    def trimmed_completions(self) -> list[Ids]:
        """Completions up to their last scored token: with causal attention no later token changes a score."""
        return [
            ids[: max((n for n, is_scored in enumerate(scored, 1) if is_scored), default=0)]
            for ids, scored in zip(self.completion_ids, self.loss_mask or (), strict=True)
        ]

    def select(self, indices: Sequence[int]) -> Rollouts:
        """Return the rows at `indices`, in that order."""

        def pick(values: Any) -> Any:
            if values is None or isinstance(values, float):  # absent, or one value for the whole generation batch
                return values
            if isinstance(values, Mapping):
                return {key: pick(each) for key, each in values.items()}
            return [values[i] for i in indices]

        return Rollouts(**{f.name: pick(getattr(self, f.name)) for f in fields(self)})

    @property
    def is_distilled(self) -> list[bool]:
        """Per row, whether it needs a teacher's score: it has scored tokens and a distill weight above 0."""
        return [
            any(mask) and bool(share) for mask, share in zip(self.loss_mask or (), self.distill_weight, strict=True)
        ]

    def mask_rows(self, is_masked: Sequence[bool]) -> Rollouts:
        """Return the rollouts with no scored token in the masked rows."""
        masks = zip(self.loss_mask or (), is_masked, strict=True)
        return replace(self, loss_mask=[[0] * len(mask) if masked else mask for mask, masked in masks])

    def without_scores(self, is_lost: Sequence[bool]) -> Rollouts:
        """Return the rollouts without the rows that a teacher could not score."""
        lost = [a or b for a, b in zip(self.unscored or [False] * len(self), is_lost, strict=True)]
        return replace(self.mask_rows(is_lost), unscored=lost)

    def repeat_for(self, prompts: Sequence[Hashable], reader: Hashable) -> Rollouts:
        """Return all rows once per set of teacher prompts, so that one pass of a teacher scores them all.

        Args:
            prompts: the sets of teacher prompts, one copy of the rows after the other.
            reader: the prompts under which that teacher finds them.
        """
        repeated = self if len(prompts) == 1 else self.select(list(range(len(self))) * len(prompts))
        ids = [prompt for each in prompts for prompt in self.prompts_of(each)]
        return replace(repeated, teacher_prompt_ids={reader: ids})

    def sorted_by_length(self) -> Rollouts:
        """Return the rows longest first, so that rows of one micro-batch need little padding."""
        lengths = [len(p) + len(c) for p, c in zip(self.prompt_ids, self.trimmed_completions, strict=True)]
        return self.select(sorted(range(len(self)), key=lambda i: -lengths[i]))

    def split(self, parts: int) -> Iterator[Rollouts]:
        """Yield exactly `parts` micro-batches of equal size, in order."""
        size, rest = divmod(len(self), parts)
        assert rest == 0, f"{len(self)} rows do not make {parts} equal micro-batches"
        return (self.select(range(start, start + size)) for start in range(0, size * parts, size))

    def with_teacher_prompts(self, prompts: Hashable, ids: Sequence[Ids]) -> Rollouts:
        """Return these rollouts with the ids of a teacher's prompts added, one per row."""
        assert len(ids) == len(self)
        return replace(self, teacher_prompt_ids={**self.teacher_prompt_ids, prompts: list(ids)})

    def prompts_of(self, teacher_prompts: Hashable) -> Sequence[Ids]:
        """Return the ids of a teacher's prompts, one per row.

        Raises:
            TeacherError: they were not rendered.
        """
        if teacher_prompts not in self.teacher_prompt_ids:
            raise TeacherError(
                "these rollouts hold no prompts for this teacher. A teacher scores what its prompts were rendered "
                "into. Render them first: rollouts = teacher.prompts.render(rollouts); and pad with the teacher's own "
                "prompts: rollouts.pad(device, self.prompts)."
            )
        return self.teacher_prompt_ids[teacher_prompts]

    def with_num_loss_tokens(self, tokens: float) -> Rollouts:
        """Return these rollouts with the number of tokens that the loss divides by."""
        return replace(self, num_loss_tokens=float(tokens))

    def pad(self, device: torch.device | str, teacher_prompts: Hashable | None = None) -> PaddedBatch:
        """Return prompts ++ completions as tensors.

        Padding goes to the right: with causal attention no token sees it, and all prompts start at position 0.

        Args:
            device: where the tensors go.
            teacher_prompts: the prompts to put before the completions, as in `rollouts.pad(device, teacher.prompts)`;
                None for the student's.

        Raises:
            TeacherError: the prompts of this teacher were not rendered.
        """
        prompts = self.prompt_ids if teacher_prompts is None else self.prompts_of(teacher_prompts)
        assert self.loss_mask is not None
        completions = self.trimmed_completions
        length = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
        ids_BL = torch.full((len(self), length), PAD)
        is_scored_BL = torch.zeros((len(self), length), dtype=torch.bool)
        for b, (prompt, completion, scored) in enumerate(zip(prompts, completions, self.loss_mask, strict=True)):
            start, end = len(prompt), len(prompt) + len(completion)
            ids_BL[b, :end] = torch.tensor(prompt + completion)
            is_scored_BL[b, start:end] = torch.tensor(scored[: len(completion)], dtype=torch.bool)
        row_N, position_N = is_scored_BL.nonzero().unbind(-1)
        return PaddedBatch(ids_BL, row_N, position_N - 1, ids_BL[row_N, position_N]).to(device)

    def row_of_token(self, n: int) -> int:
        """Return the row of the packed scored token `n`."""
        for row, scored in enumerate(self.loss_mask or ()):
            if n < sum(scored):
                return row
            n -= sum(scored)
        raise IndexError("there are fewer scored tokens")
