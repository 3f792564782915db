"""The data of the token heat-map: rollouts with what both sides said of each token, as plain values for the page.

Text of models and datasets is data here: the page sets it as text, never as markup. Knows traced rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from opsd.health.rollout import Alternatives, TracedRollout
from opsd.health.text import printable

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


def chosen(rollouts: Sequence[TracedRollout], most: int = MOST_TOKENS) -> list[int]:
    """Return places of rollouts, as many as a page can hold, in their order.

    The one with the worst token comes first, then those of the first and the last step, then those of steps between.
    """
    by_step: dict[int, list[int]] = {}
    for place, rollout in enumerate(rollouts):
        by_step.setdefault(rollout.step, []).append(place)
    steps, left, found = sorted(by_step), most, set[int]()
    worst = max(range(len(rollouts)), key=lambda place: _worst(rollouts[place]), default=None)
    for place in [*([] if worst is None else [worst]), *(p for step in _halving(steps) for p in by_step[step])]:
        size = len(rollouts[place].ids)
        if place not in found and (size <= left or not found):
            found.add(place)
            left -= size
    return sorted(found)


def _halving(steps: Sequence[int]) -> Iterator[int]:
    """Yield the first, the last, the middle one, the quarters, and so on."""
    seen, parts = set[int](), 1
    while len(seen) < len(steps):
        for part in range(parts + 1):
            place = round(part * (len(steps) - 1) / parts)
            if place not in seen:
                seen.add(place)
                yield steps[place]
        parts *= 2


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
        "text": printable(rollout.text, keep="\n"),
        "tokens": [printable(token, keep="\n") for token in rollout.tokens],
        "nats": [_number(value) for value in rollout.divergence],
        "entropy": [_number(value) for value in rollout.entropy],
        "teacher_entropy": [_number(value) for value in rollout.teacher_entropy or [math.nan] * len(rollout.ids)],
        "student": [_number(value) for value in rollout.logprob],
        "teacher": [_number(value) for value in rollout.teacher_logprob],
        "heavy": sorted(rollout.carriers),
        "size": _number(rollout.size),
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
