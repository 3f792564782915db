"""How likely completions are: to the student and its teacher, and to the student before and after training.

Both are read from log-probabilities of tokens, without any answer being graded: where accuracy is too coarse or too
dear, they still move.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from opsd.evaluation.statistics import Estimate, estimate
from opsd.losses.estimators import k3
from opsd.losses.pointwise import log_ratio
from opsd.rollouts import Ids
from opsd.teachers import Teacher


def logprobs(teacher: Teacher, rows: Sequence[Any], completions: Sequence[Ids], batch_size: int) -> list[list[float]]:
    """Return log p in nats of every completion token under a teacher, `batch_size` rows at a time."""
    found: list[list[float]] = []
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        found += teacher.logprobs(list(rows[part]), list(completions[part]))
    return found


@dataclass(frozen=True)
class Drift:
    """How far a student moved from what it was, on prompts of no task.

    KL(before ‖ now), estimated on continuations that the model sampled before training (Schulman's k3 per token: never
    negative, unbiased).

    Args:
        per_token: nats per token, over prompts.
        per_sequence: nats per continuation, over prompts.
        tokens: tokens looked at.
    """

    per_token: Estimate
    per_sequence: Estimate
    tokens: int


def drift(before: Sequence[Sequence[float]], now: Sequence[Sequence[float]]) -> Drift:
    """Return the drift, from the log-probabilities of the same tokens before and now."""
    sums, means = [], []
    for was, becomes in zip(before, now, strict=True):
        nats = k3(log_ratio(torch.tensor(was), torch.tensor(becomes)))
        sums.append(float(nats.sum()))
        means.append(float(nats.mean()))
    return Drift(estimate(means, is_share=False), estimate(sums, is_share=False), sum(map(len, before)))
