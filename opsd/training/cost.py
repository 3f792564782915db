"""What a run costs and does, measured and printed before its first step.

Knows the teachers that score and the groups they score; trains nothing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from datasets import Dataset

from opsd.models.forward import counting_passes
from opsd.rollouts import Rollouts
from opsd.teachers import Cost, StudentHandle
from opsd.training.config import OPSDConfig
from opsd.training.groups import Groups, placeholders
from opsd.training.loss import Scorer

PROBED_ROWS = 8  # scored before step 1 to count the forward passes of the teachers


def measured_cost(
    scorer: Scorer, dataset: Any, student: StudentHandle, rollout_fields: Sequence[str] = (), micro_batches: int = 1
) -> Cost:
    """Return the memory of all teachers together, and their forward passes per row, counted on one token of some rows.

    Args:
        scorer: the loss, prepared: its teacher, reference and contrast.
        dataset: prepared rows; None where nothing will be trained: then no pass is counted.
        student: the student.
        rollout_fields: names of fields that rollouts provide to contexts.
        micro_batches: of an optimizer step.
    """
    costs = [teacher.cost for teacher in {id(view.teacher): view.teacher for view in scorer.views}.values()]
    total = Cost(sum(cost.megabytes for cost in costs), sum(cost.offloaded for cost in costs))
    if dataset is None:
        return total
    rows = _probed_rows(dataset)
    fields: list[dict[str, Any]] = [placeholders(rollout_fields, row) for row in rows]
    prompts = [student.renderer.ids(row["prompt"]) for row in rows]
    probe = Rollouts(rows, prompts, [prompt[-1:] for prompt in prompts], rollout_fields=fields)
    with counting_passes() as sequences:
        for view in scorer.views:
            if not view.teacher.needs_given_rollouts:
                view.score(view.prompts.render(probe))
    scorer.forget_counts()
    return replace(total, passes=sum(sequences) / len(rows), micro_batches=micro_batches)


def _probed_rows(dataset: Any) -> list[Any]:
    """Return rows drawn at random: the cost of a routed teacher depends on them, and kinds of rows may alternate."""
    if not isinstance(dataset, Dataset):
        return list(islice(iter(dataset), PROBED_ROWS))
    drawn = random.Random(0).sample(range(len(dataset)), min(PROBED_ROWS, len(dataset)))
    return [dataset[number] for number in drawn]


def summary(scorer: Scorer, groups: Groups, dataset: Any, student: StudentHandle, args: OPSDConfig) -> str:
    """Return what a run prints before its first step: teacher, context, cost, rollouts per prompt, loss."""
    cost = measured_cost(scorer, dataset, student, groups.rollout_fields, args.gradient_accumulation_steps)
    contexts = scorer.teacher.prompts.describe()
    return (
        f"teacher     {scorer.teacher.describe()}\n"
        f"context     {contexts}\n"
        f"cost        {cost}\n"
        f"samples     {groups.describe()}\n"
        f"loss        {scorer.describe()}\n"
        f"            {scorer.objective.formula}"
    )
