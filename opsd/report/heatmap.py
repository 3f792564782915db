"""The data of the token heat-map: rollouts with what both sides said of each token, as plain values for the page.

Text of models and datasets is data here: the page sets it as text, never as markup. Knows traced rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from opsd.health.rollout import Alternatives, TracedRollout
from opsd.health.tokens import printable

MOST_TOKENS = 20_000  # in a page: about 4 MB with the likeliest tokens of both sides
SCALE = 0.95  # share of the tokens that lie below the strongest colour
LEAST = 0.05  # nats of the strongest colour at least: less is no disagreement


@dataclass(frozen=True)
class Shown:
    """A rollout of a heat-map.

    >>> Shown("12", "1", rollout)  # step 12, its first rollout

    Args:
        first: what the first switch chooses: a step, or a row.
        second: what the second one chooses: a rollout, or a teacher and its context.
        rollout: the rollout.
    """

    first: str
    second: str
    rollout: TracedRollout


def by_step(rollouts: Sequence[TracedRollout]) -> list[Shown]:
    """Return the rollouts of a run, those of a step under its name."""
    numbers: dict[int, int] = {}
    shown = []
    for rollout in rollouts:
        numbers[rollout.step] = numbers.get(rollout.step, 0) + 1
        shown.append(Shown(str(rollout.step), str(numbers[rollout.step]), rollout))
    return shown


def chosen(rollouts: Sequence[TracedRollout], most: int = MOST_TOKENS) -> list[TracedRollout]:
    """Return rollouts of steps at equal distances, the first and the last among them, as many as a page can hold.

    The rollout with the worst token of all is always among them.
    """
    steps = sorted({rollout.step for rollout in rollouts})
    by_number: dict[int, list[TracedRollout]] = {step: [] for step in steps}
    for rollout in rollouts:
        by_number[rollout.step].append(rollout)
    count = len(steps)
    while count > 1:
        places = {round(number * (len(steps) - 1) / (count - 1)) for number in range(count)}
        picked = [rollout for place in sorted(places) for rollout in by_number[steps[place]]]
        if sum(len(rollout.ids) for rollout in picked) <= most:
            break
        count = count * 3 // 4
    else:
        picked = list(rollouts)[:most]
    worst = max(rollouts, key=_worst, default=None)
    if worst is not None and not any(rollout is worst for rollout in picked):
        picked = sorted([*picked, worst], key=lambda rollout: rollout.step)
    return picked


def _worst(rollout: TracedRollout) -> float:
    return max((abs(nats) for nats in rollout.divergence if not math.isnan(nats)), default=0.0)


def as_plain(shown: Iterable[Shown], first: str, second: str, divergence: str) -> dict[str, Any]:
    """Return the data of a heat-map.

    Args:
        shown: rollouts.
        first: what the first switch chooses, such as "step".
        second: what the second one chooses.
        divergence: the name of what is coloured.
    """
    rollouts = list(shown)
    sizes = sorted(abs(n) for each in rollouts for n in each.rollout.divergence if not math.isnan(n))
    largest = sizes[min(int(SCALE * len(sizes)), len(sizes) - 1)] if sizes else 0.0
    return {
        "first": first,
        "second": second,
        "divergence": divergence,
        "scale": round(max(largest, LEAST), 3),
        "rollouts": [{"first": each.first, "second": each.second, **_plain(each.rollout)} for each in rollouts],
    }


def _plain(rollout: TracedRollout) -> dict[str, Any]:
    return {
        "prompt": printable(rollout.prompt, keep="\n"),
        "context": printable(rollout.context, keep="\n"),
        "tokens": [printable(token, keep="\n") for token in rollout.tokens],
        "nats": [_number(value) for value in rollout.divergence],
        "entropy": [_number(value) for value in rollout.entropy],
        "student": [_number(value) for value in rollout.logprob],
        "teacher": [_number(value) for value in rollout.teacher_logprob],
        "top": [_top(each) for each in rollout.alternatives or [None] * len(rollout.ids)],
        "reward": _number(rollout.reward),
        "ended": rollout.ended,
        "own": rollout.on_policy,
    }


def _top(alternatives: Alternatives | None) -> dict[str, Any] | None:
    if alternatives is None:
        return None
    sides = {
        side: [[printable(token), _number(value)] for token, value in zip(tokens, values, strict=True)]
        for side, tokens, values in (
            ("student", alternatives.student_tokens, alternatives.student_logprobs),
            ("teacher", alternatives.teacher_tokens, alternatives.teacher_logprobs),
        )
    }
    return {**sides, "student_rank": alternatives.student_rank, "teacher_rank": alternatives.teacher_rank}


def _number(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None
