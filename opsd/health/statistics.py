"""What monitors read of rollouts: shares of the divergence, repetition, diversity, leaks. Each a number by name.

Costs a pass over the tokens of a few rollouts, in Python. Knows traced rollouts; judges nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from statistics import fmean, median

from opsd.health.rollout import TracedRollout
from opsd.health.tokens import CLASSES, LEAKS, THINKING, class_of

OPENING = 3  # tokens
LONG = 9  # tokens of a rollout whose opening is compared with its rest
GRAM = 4  # tokens of a stretch that repeats
COPIED = 6  # words of a stretch that a rollout shares with the teacher's prompt alone
LARGE = 2.0  # nats at an ordinary token
PAIRS = 28  # of a step that are compared for similarity: of 8 rollouts all
STYLE = ("hedges", "punctuation", "space")


def statistics_of(rollouts: Sequence[TracedRollout]) -> dict[str, float]:
    """Return the statistics of some rollouts; none of what no token tells.

    Args:
        rollouts: of one step or a few.

    Example:
        >>> statistics_of(rollouts)["kl/style"]
        0.31
    """
    # What others wrote says nothing of the student, and a divergence there is what SFT begins with.
    known = [rollout for rollout in rollouts if len(rollout.ids) and rollout.on_policy]
    others = [nats for rollout in rollouts if not rollout.on_policy for nats in _scored(rollout)]
    of_others = {"kl/off_policy": fmean(others)} if others else {}
    if not known:
        return {}
    return {**of_others, **_divergence(known), **_teacher(known), **_repetition(known), **_text(known)}


def _teacher(rollouts: Sequence[TracedRollout]) -> dict[str, float]:
    known = [nats for rollout in rollouts for nats in rollout.teacher_entropy if not math.isnan(nats)]
    return {"teacher_entropy": fmean(known)} if known else {}


def _scored(rollout: TracedRollout) -> list[float]:
    """Return the sizes of the divergence at the tokens that were scored."""
    return [abs(nats) for nats in rollout.divergence if not math.isnan(nats)]


def _divergence(rollouts: Sequence[TracedRollout]) -> dict[str, float]:
    """Return where the divergence is: by class of token and by position."""
    by_class: dict[str, list[float]] = {name: [] for name in CLASSES}
    first: list[float] = []
    rest: list[float] = []
    for rollout in rollouts:
        for place, (token, nats) in enumerate(zip(rollout.tokens, rollout.divergence, strict=True)):
            if not math.isnan(nats):
                by_class[class_of(token)].append(abs(nats))
                if len(rollout.ids) >= LONG:  # of a short answer the opening is most of it
                    (first if place < OPENING else rest).append(abs(nats))
    total, words = sum(map(sum, by_class.values())), by_class["words"]
    count = sum(map(len, by_class.values()))
    if not total:
        return {"kl/mean": 0.0} if count else {}
    shares = {f"kl/{name}": sum(by_class[name]) / total for name in CLASSES}
    values = {
        "kl/mean": total / count,
        **shares,
        "kl/style": sum(shares[f"kl/{name}"] for name in STYLE),
    }
    if first and rest and sum(first) + sum(rest):
        values["kl/opening"] = sum(first) / (sum(first) + sum(rest))
        # A median near 0 would make any opening look large: a hundredth of a nat is what an ordinary token has.
        values["kl/opening_ratio"] = fmean(first) / max(median(rest), 0.01)
    for number, quarter in enumerate(zip(*map(_quarters, rollouts), strict=True), 1):
        if of_quarter := [each for part in quarter for each in part]:
            values[f"kl/quarter_{number}"] = fmean(of_quarter)
    if words:
        values["kl/large"] = sum(nats > LARGE for nats in words) / len(words)
    return values


def _quarters(rollout: TracedRollout) -> list[list[float]]:
    """Return the divergence of the first, second, third and last quarter of a rollout."""
    nats = _scored(rollout)
    return [nats[len(nats) * part // 4 : len(nats) * (part + 1) // 4] for part in range(4)]


def _repetition(rollouts: Sequence[TracedRollout]) -> dict[str, float]:
    """Return how much rollouts repeat themselves, and each other."""
    repeated = grams = 0
    inside: list[float] = []
    outside: list[float] = []
    for rollout in rollouts:
        seen = set[tuple[int, ...]]()
        for start in range(len(rollout.ids) - GRAM + 1):
            gram = tuple(rollout.ids[start : start + GRAM])
            is_again = gram in seen
            seen.add(gram)
            grams, repeated = grams + 1, repeated + is_again
            nats = rollout.divergence[start + GRAM - 1]
            (inside if is_again else outside).extend([] if math.isnan(nats) else [nats])
    values = {"repetition": repeated / grams} if grams else {}
    if inside and outside:
        values["agreement_in_loops"] = fmean(outside) / max(fmean(inside), 1e-3)
    bigrams = [pair for rollout in rollouts for pair in itertools.pairwise(rollout.ids)]
    if bigrams:
        values["distinct_2"] = len(set(bigrams)) / len(bigrams)
    pairs = list(_pairs(rollouts))
    alike = [_overlap(a, b) for a, b in pairs if a.prompt != b.prompt]
    if alike:
        values["similarity"] = fmean(alike)
    siblings = [_overlap(a, b) for a, b in pairs if a.prompt == b.prompt]
    if siblings:
        values["sibling_similarity"] = fmean(siblings)
    return values


def _pairs(rollouts: Sequence[TracedRollout]) -> Iterator[tuple[TracedRollout, TracedRollout]]:
    """Yield pairs of rollouts of a step: a prompt that comes again later is no sibling."""
    for _, of_step in itertools.groupby(rollouts, key=lambda rollout: rollout.step):
        yield from itertools.islice(itertools.combinations(of_step, 2), PAIRS)


def _overlap(a: TracedRollout, b: TracedRollout) -> float:
    """Return the share of pairs of neighbouring tokens that two rollouts have in common (Jaccard)."""
    first, second = (set(itertools.pairwise(rollout.ids)) for rollout in (a, b))
    return len(first & second) / max(len(first | second), 1)


def _text(rollouts: Sequence[TracedRollout]) -> dict[str, float]:
    tokens = sum(len(rollout.ids) for rollout in rollouts)
    return {
        "traced_tokens": float(tokens),
        "thinking": 1000 * sum(len(THINKING.findall(rollout.text)) for rollout in rollouts) / tokens,
        "leak/phrases": fmean(_names_solution(rollout) for rollout in rollouts),
        "leak/copied": fmean(bool(copied(rollout)) for rollout in rollouts),
    }


def _names_solution(rollout: TracedRollout) -> bool:
    """Tell whether a rollout names a solution that its own prompt does not name."""
    return bool(LEAKS.search(rollout.text)) and not LEAKS.search(rollout.prompt)


def copied(rollout: TracedRollout) -> list[str]:
    """Return stretches of words that a rollout shares with the teacher's prompt, and not with the student's."""
    words = rollout.text.lower().split()
    theirs, own = (f" {' '.join(text.lower().split())} " for text in (rollout.context, rollout.prompt))
    stretches = (" ".join(words[start : start + COPIED]) for start in range(len(words) - COPIED + 1))
    return [stretch for stretch in stretches if f" {stretch} " in theirs and f" {stretch} " not in own]
