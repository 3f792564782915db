"""Off-policy rows: how many of a step, and with which completions.

Knows rows, a tokenizer and a teacher; nothing of losses.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from opsd.data.needs import Need
from opsd.data.rows import completion_of, completion_problem
from opsd.rollouts import Ids
from opsd.teachers import Teacher, TeacherView
from opsd.teachers.prompting import Row
from opsd.training.config import OPSDConfig


def on_policy_rows(rows: int, lmbda: float, step: int) -> int:
    """Return how many of a step's rows are on-policy: the same on every process, λ·rows on average.

    floor(λ·rows·(step+1)) - floor(λ·rows·step): the carry of earlier steps without a counter, so a resume needs none.

    Args:
        rows: rows of one process.
        lmbda: the share.
        step: steps done.
    """
    share = lmbda * rows
    return int(share * (step + 1) + 1e-9) - int(share * step + 1e-9)


def completion_needs(args: OPSDConfig) -> list[Need]:
    """Return the need of a completion in every row, where some are trained on with their own."""
    share = 1.0 - args.lmbda
    if args.seq_kd or share == 0.0:
        return []
    return [
        Need(
            ("completion", "completion_ids"),
            f"lmbda: {args.lmbda:g}",
            f"It sends {share:.0%} of the rows off-policy, and any row may be drawn.",
            "set seq_kd to use the teacher's own samples, or set lmbda to 1",
            find_problem=completion_problem,
        )
    ]


def completion_ids(row: Row, tokenizer: PreTrainedTokenizerBase) -> Ids:
    """Return a row's completion as ids; text gets an end-of-turn token."""
    completion = completion_of(row)
    if isinstance(completion, str):
        return [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert completion, "checked before training"
    return list(completion)


def off_policy_completions(
    rows: Sequence[Row], args: OPSDConfig, teacher: Teacher, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Ids], float]:
    """Return completions for off-policy rows, and the share of them that was cut at max_completion_length."""
    limit = args.max_completion_length
    assert limit is not None
    if args.seq_kd:
        sampling = {"do_sample": True, "temperature": args.temperature, "batch_size": len(rows)}
        return TeacherView(teacher).sample(rows, max_new_tokens=limit, **sampling), 0.0
    completions = [completion_ids(row, tokenizer) for row in rows]
    return [ids[:limit] for ids in completions], sum(len(ids) > limit for ids in completions) / len(rows)
