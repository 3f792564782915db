"""Rollouts: what was asked, what was sampled, and which of its tokens are scored.

Ragged lists of ids all the way; padding and micro-batching happen here and nowhere else. It knows nothing of models,
teachers or losses. A completion is the very ids that were sampled: never decoded, never tokenised again.

Shapes: B rows · L tokens of a padded sequence · N scored tokens of a micro-batch (packed, row by row).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

Ids = list[int]
PAD = 0  # any id will do: padded positions are masked, to the right of all tokens, and never kept

# What a row has where nothing else is said.
USUAL: dict[str, Any] = {"row_weights": 1.0, "rollout_fields": {}, "distill_weight": 1.0, "advantages": 0.0}


@dataclass(frozen=True)
class PaddedBatch:
    """Prompts ++ completions, padded on the right.

    Args:
        ids_BL: int64.
        mask_BL: int64, 1 for tokens.
        predicts_scored_BL: bool, True where the *next* token is scored.
        scored_ids_N: int64, the scored tokens themselves, packed like `predicts_scored_BL`.
        row_N: int64, the row of each.
    """

    ids_BL: Tensor
    mask_BL: Tensor
    predicts_scored_BL: Tensor
    scored_ids_N: Tensor
    row_N: Tensor


@dataclass(frozen=True)
class Rollouts:
    """Rows, their student prompts and their completions, as lists of equal length.

    Args:
        rows: dataset rows, with every privileged column.
        prompt_ids: the student's prompts.
        completion_ids: sampled ids (or the row's own, off-policy).
        loss_mask: per completion, 1 for tokens that are scored, 0 for tool output; None scores all.
        teacher_prompt_ids: teacher prompts by the teacher's key (`Teacher.render_prompts` fills it).
        num_loss_tokens: scorable tokens of the whole generation batch over all processes; the loss divides by it.
        row_weights: what each row counts; empty counts all alike.
        rollout_fields: per row, fields for the teacher's context that training makes (a correct sibling's text,
            feedback); empty for none.
        distill_weight: per row, 1 where the teacher trains it and 0 where only its reward does; empty for all 1.
        advantages: per row, what its reward is worth beside its group's; empty for all 0.
        rollout_logprobs: per completion, log p in nats of each token where it was sampled, NaN where unknown; None
            where no engine told.
    """

    rows: Sequence[Mapping[str, Any]]
    prompt_ids: Sequence[Ids]
    completion_ids: Sequence[Ids]
    loss_mask: Sequence[Ids] | None = None
    teacher_prompt_ids: Mapping[str, Sequence[Ids]] = field(default_factory=dict)
    num_loss_tokens: float | None = None
    row_weights: Sequence[float] = ()
    rollout_fields: Sequence[Mapping[str, Any]] = ()
    distill_weight: Sequence[float] = ()
    advantages: Sequence[float] = ()
    rollout_logprobs: Sequence[Sequence[float]] | None = None

    def __post_init__(self) -> None:
        if self.loss_mask is None:
            object.__setattr__(self, "loss_mask", [[1] * len(ids) for ids in self.completion_ids])
        for name, usual in USUAL.items():
            if not getattr(self, name):
                object.__setattr__(self, name, [usual] * len(self.rows))
        assert self.loss_mask is not None
        assert len(self.rows) == len(self.prompt_ids) == len(self.completion_ids) == len(self.loss_mask)
        assert all(len(a) == len(b) for a, b in zip(self.completion_ids, self.loss_mask, strict=True))
        # The first token is predicted from the last prompt token: without one it could not be scored.
        assert all(self.prompt_ids), "an empty prompt cannot predict a first token"

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_scorable(self) -> int:
        """Number of tokens that are scored in these rows."""
        return sum(map(sum, self.loss_mask or ()))

    @property
    def scored_ids(self) -> Ids:
        """The scored tokens, row by row: what both sides must agree on."""
        return self._of_scored(self.completion_ids)

    @property
    def sampled_logprobs(self) -> list[float] | None:
        """The scored tokens' log-probabilities where they were sampled, or None where no engine told."""
        return None if self.rollout_logprobs is None else self._of_scored(self.rollout_logprobs)

    def _of_scored(self, values: Sequence[Sequence[Any]]) -> list[Any]:
        return [
            value
            for row, scored in zip(values, self.loss_mask or (), strict=True)
            for value, is_scored in zip(row, scored, strict=True)
            if is_scored
        ]

    @property
    def needed_ids(self) -> list[Ids]:
        """Completions up to their last scored token: with causal attention nothing after it is needed."""
        return [
            ids[: max((n for n, is_scored in enumerate(scored, 1) if is_scored), default=0)]
            for ids, scored in zip(self.completion_ids, self.loss_mask or (), strict=True)
        ]

    def select(self, indices: Sequence[int]) -> Rollouts:
        """Return the rows at `indices`, in that order."""

        def pick(values: Any) -> Any:
            if values is None or isinstance(values, float):  # nothing said, or said of the whole generation batch
                return values
            if isinstance(values, Mapping):
                return {key: pick(each) for key, each in values.items()}
            return [values[i] for i in indices]

        return Rollouts(**{f.name: pick(getattr(self, f.name)) for f in fields(self)})

    @property
    def is_distilled(self) -> list[bool]:
        """Whether a teacher's answer for a row counts: it has scored tokens, and is distilled."""
        return [
            any(mask) and bool(share) for mask, share in zip(self.loss_mask or (), self.distill_weight, strict=True)
        ]

    def without(self, rows: Sequence[bool]) -> Rollouts:
        """Return the rollouts with no token scored in the rows that are marked."""
        masks = zip(self.loss_mask or (), rows, strict=True)
        return replace(self, loss_mask=[[0] * len(mask) if drop else mask for mask, drop in masks])

    def stacked(self, keys: Sequence[str], key: str) -> Rollouts:
        """Return the rows once for each of several teachers, one after the other, as shown to one called `key`."""
        teacher_prompt_ids = {key: [prompt for each in keys for prompt in self.teacher_prompt_ids[each]]}
        again = self.select(list(range(len(self))) * len(keys))
        return replace(again, teacher_prompt_ids=teacher_prompt_ids)

    def sorted_by_length(self) -> Rollouts:
        """Return the rows longest first, so that rows of one micro-batch need little padding."""
        lengths = [len(p) + len(c) for p, c in zip(self.prompt_ids, self.needed_ids, strict=True)]
        return self.select(sorted(range(len(self)), key=lambda i: -lengths[i]))

    def split(self, parts: int) -> Iterator[Rollouts]:
        """Yield exactly `parts` micro-batches of equal size, in order."""
        size, rest = divmod(len(self), parts)
        assert rest == 0, f"{len(self)} rows do not make {parts} equal micro-batches"
        return (self.select(range(start, start + size)) for start in range(0, size * parts, size))

    def with_teacher_prompts(self, key: str, prompts: Sequence[Ids]) -> Rollouts:
        """Return these rollouts with the teacher prompts of `key` added."""
        assert len(prompts) == len(self)
        return replace(self, teacher_prompt_ids={**self.teacher_prompt_ids, key: list(prompts)})

    def with_num_loss_tokens(self, tokens: float) -> Rollouts:
        """Return these rollouts with the number of scored tokens that the loss divides by."""
        return replace(self, num_loss_tokens=float(tokens))

    def pad(self, device: torch.device | str, seen_by: str | None = None) -> PaddedBatch:
        """Lay prompts ++ completions out as tensors.

        Padding goes to the right: with causal attention no token ever sees it, and all prompts start at position 0.

        Args:
            device: where the tensors go.
            seen_by: key of the teacher whose prompts are used; None uses the student's.
        """
        prompts = self.prompt_ids if seen_by is None else self.teacher_prompt_ids[seen_by]
        assert self.loss_mask is not None
        completions = self.needed_ids
        length = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
        ids_BL = torch.full((len(self), length), PAD)
        mask_BL = torch.zeros((len(self), length), dtype=torch.long)
        predicts_scored_BL = torch.zeros((len(self), length), dtype=torch.bool)
        for b, (prompt, completion, scored) in enumerate(zip(prompts, completions, self.loss_mask, strict=True)):
            start, end = len(prompt), len(prompt) + len(completion)
            ids_BL[b, :end] = torch.tensor(prompt + completion)
            mask_BL[b, :end] = 1
            predicts_scored_BL[b, start - 1 : end - 1] = torch.tensor(scored[: len(completion)], dtype=torch.bool)
        scored_ids_N = ids_BL.roll(-1, dims=1)[predicts_scored_BL]
        row_N = predicts_scored_BL.nonzero()[:, 0]
        return PaddedBatch(*(t.to(device) for t in (ids_BL, mask_BL, predicts_scored_BL, scored_ids_N, row_N)))

    def row_of_token(self, n: int) -> int:
        """Return the row that packed scored token `n` belongs to."""
        for row, scored in enumerate(self.loss_mask or ()):
            if n < sum(scored):
                return row
            n -= sum(scored)
        raise IndexError("there are fewer scored tokens")
