"""Log-probabilities of completions: of traces under student and teacher, and the student's drift during training.

Neither needs a graded answer: both change where accuracy is too coarse, or too costly to measure.
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
    """Return the log-probability in nats of every completion token under a teacher, `batch_size` rows per pass."""
    values: list[list[float]] = []
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        values += teacher.logprobs(list(rows[part]), list(completions[part]))
    return values


@dataclass(frozen=True)
class Drift:
    """How far training moved a student on prompts unrelated to the task.

    KL(before ‖ now), estimated on continuations that the student sampled before training (Schulman's k3 per token:
    never negative, unbiased).

    Args:
        per_token: nats per token, mean over prompts.
        per_sequence: nats per continuation, mean over prompts.
        tokens: number of tokens in all continuations.

    Example:
        >>> drift(before=[[-1.0, -2.0], [-0.5]], now=[[-1.0, -2.0], [-0.5]]).per_token.value
        0.0
    """

    per_token: Estimate
    per_sequence: Estimate
    tokens: int


def drift(before: Sequence[Sequence[float]], now: Sequence[Sequence[float]]) -> Drift:
    """Return the drift from the log-probabilities of the same tokens before training and now."""
    sums, means = [], []
    for logprobs_before, logprobs_now in zip(before, now, strict=True):
        nats = k3(log_ratio(torch.tensor(logprobs_before), torch.tensor(logprobs_now)))
        sums.append(float(nats.sum()))
        means.append(float(nats.mean()))
    return Drift(estimate(means, is_share=False), estimate(sums, is_share=False), sum(map(len, before)))
