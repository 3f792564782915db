"""What health and reports know of a rollout: its text, and what student and teacher gave each token.

Every sampled token is there; one that was not scored has NaN for what its loss would be made of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

CARRIED = 0.8  # share of a rollout's divergence that its marked tokens carry


@dataclass(frozen=True)
class Alternatives:
    """What both sides would have sampled at a token.

    >>> Alternatives([" 7", " 8"], [-0.1, -2.9], [" 19", " 7"], [-0.2, -2.0], 1, 2)

    Args:
        student_tokens: the student's likeliest tokens as text, the likeliest first.
        student_logprobs: of these, nats.
        teacher_tokens, teacher_logprobs: the teacher's.
        student_rank: of the sampled token among all of the student's, from 1.
        teacher_rank: among all of the teacher's; 0 where a top-k list does not have it.
    """

    student_tokens: Sequence[str]
    student_logprobs: Sequence[float]
    teacher_tokens: Sequence[str]
    teacher_logprobs: Sequence[float]
    student_rank: int
    teacher_rank: int


@dataclass(frozen=True)
class TracedRollout:
    """One rollout of a step, in plain values.

    Args:
        step: the step that trained on it, from 1.
        prompt: the student's prompt, as text.
        context: the teacher's prompt, as text; "" where it is the student's.
        ids: the tokens' ids.
        tokens: the same as text, token by token.
        text: the same as one text.
        divergence: nats, per token.
        entropy: the student's, nats, per token.
        logprob: log p of the sampled token under the student, nats.
        teacher_logprob: the same under the teacher.
        reward: NaN where nothing grades it.
        ended: whether it ended before the longest length.
        on_policy: whether the student sampled it.
        teacher_entropy: nats, per token; NaN where it is unknown; empty in a trace of an older version.
        alternatives: per token, where they were kept; else empty.

    Example:
        >>> rollout.text, sum(rollout.divergence)
        ('The answer is 7.', 0.42)
    """

    step: int
    prompt: str
    context: str
    ids: Sequence[int]
    tokens: Sequence[str]
    text: str
    divergence: Sequence[float]
    entropy: Sequence[float]
    logprob: Sequence[float]
    teacher_logprob: Sequence[float]
    reward: float = math.nan
    ended: bool = True
    on_policy: bool = True
    teacher_entropy: Sequence[float] = ()
    alternatives: Sequence[Alternatives | None] = ()

    @property
    def size(self) -> float:
        """The sizes of the divergence of all scored tokens, together."""
        return sum(abs(nats) for nats in self.divergence if not math.isnan(nats))

    @property
    def carriers(self) -> set[int]:
        """The places of the fewest tokens that together carry CARRIED of the divergence."""
        sizes = {place: abs(nats) for place, nats in enumerate(self.divergence) if nats and not math.isnan(nats)}
        found, carried = set[int](), 0.0
        for place in sorted(sizes, key=lambda place: -sizes[place]):
            if carried >= CARRIED * self.size:
                break
            found.add(place)
            carried += sizes[place]
        return found


@dataclass(frozen=True)
class Step:
    """What a monitor looks at: a log entry, and rollouts since the last one.

    Args:
        number: the optimizer step.
        logs: metrics by name, as logged.
        rollouts: of the steps since the last entry; none where no trace is kept.
    """

    number: int
    logs: Mapping[str, Any] = field(default_factory=dict)
    rollouts: Sequence[TracedRollout] = ()
