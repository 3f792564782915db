"""The order in which a generation batch is cut into micro-batches: of two orders, the one that computes fewer tokens.

Longest first, rows of a micro-batch need little padding. With the rollouts of a prompt beside each other, teachers
compute it once for them. Knows rollouts and the plans of passes; nothing of models, teachers or losses.
"""

from __future__ import annotations

from opsd.models.passes import tokens_of
from opsd.rollouts import Rollouts

STUDENT = 3  # forward and backward, in forward passes


def in_order(rollouts: Rollouts, parts: int) -> Rollouts:
    """Return the rows in the order in which `parts` equal micro-batches compute the fewest tokens.

    Args:
        rollouts: with the prompts of all teachers.
        parts: number of micro-batches.
    """
    by_length = rollouts.sorted_by_length()
    prompts = list(zip(*rollouts.teacher_prompt_ids.values(), strict=True))
    groups: dict[str, list[int]] = {}
    for row, shown in enumerate(prompts):
        groups.setdefault(repr(shown), []).append(row)
    if len(groups) in (0, 1, len(rollouts)) or parts == len(rollouts):  # no rollouts that could be brought together
        return by_length
    lengths = [len(p) + len(c) for p, c in zip(rollouts.prompt_ids, rollouts.trimmed_completions, strict=True)]
    longest_first = [sorted(group, key=lambda row: -lengths[row]) for group in groups.values()]
    longest_first.sort(key=lambda group: -lengths[group[0]])
    together = rollouts.select([row for group in longest_first for row in group])
    return min(by_length, together, key=lambda each: _tokens(each, parts))


def _tokens(rollouts: Rollouts, parts: int) -> int:
    """Return the tokens that a step computes, padding included, as tokens of a forward pass."""
    computed = 0
    for part in rollouts.split(parts):
        of_teachers = (tokens_of(prompts, part.trimmed_completions) for prompts in part.teacher_prompt_ids.values())
        computed += STUDENT * tokens_of(part.prompt_ids, part.trimmed_completions) + sum(of_teachers)
    return computed
