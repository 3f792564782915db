"""The order in which a generation batch is cut into micro-batches: of two orders, the one that computes fewer tokens.

Longest first, rows of a micro-batch need little padding. With the rollouts of a prompt beside each other, teachers
compute it once for them. Knows rollouts and the plans of passes; nothing of models, teachers or losses.
"""

from __future__ import annotations

from functools import partial

from opsd.models.passes import PASS, tokens_of
from opsd.rollouts import Rollouts

STUDENT = 3  # forward and backward, in forward passes


def in_order(
    rollouts: Rollouts, parts: int, *, divides_student: bool = True, shares: bool = True, a_pass: int = PASS
) -> Rollouts:
    """Return the rows in the order in which `parts` equal micro-batches compute the fewest tokens.

    Args:
        rollouts: with the prompts of all teachers.
        parts: number of micro-batches.
        divides_student: whether the student may divide a micro-batch into passes.
        shares: whether passes may share prefixes.
        a_pass: tokens that one more pass must save.
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
    count = partial(tokens_of, shares=shares, a_pass=a_pass)

    def computed(ordered: Rollouts) -> int:
        """Return the tokens of a step, padding included, as tokens of forward passes."""
        tokens = 0
        for part in ordered.split(parts):
            completions = part.trimmed_completions
            tokens += STUDENT * count(part.prompt_ids, completions, divides=divides_student)
            tokens += sum(count(prompts, completions) for prompts in part.teacher_prompt_ids.values())
        return tokens

    return min(by_length, together, key=computed)
