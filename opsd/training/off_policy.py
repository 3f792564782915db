"""Off-policy rows: how many of a step, and with which completions.

Knows rows, the student and a teacher; nothing of losses.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from opsd.contexts.completions import completion_ids
from opsd.contexts.renderer import PromptRenderer
from opsd.data.needs import Need
from opsd.data.rows import completion_of, completion_problem
from opsd.errors import DataError
from opsd.models.forward import embedded_tokens
from opsd.models.generation import cut_after_stop
from opsd.rollouts import Ids
from opsd.teachers import StudentHandle, Teacher, TeacherView
from opsd.teachers.prompting import Row
from opsd.training.config import OPSDConfig
from opsd.training.together import failing_together


def completion_needs(args: OPSDConfig) -> list[Need]:
    """Return the need of a completion in every row, where some are trained on with their own."""
    if not trains_on_completions(args):
        return []
    lmbda, setting = args.on_policy_share.least, "lmbda" if args.lmbda_schedule is None else "lmbda_schedule"
    return [
        Need(
            ("completion", "completion_ids"),
            f"{setting}: {lmbda:g}" if setting == "lmbda" else f"{setting} ({args.on_policy_share.describe()})",
            f"It sends {1.0 - lmbda:.0%} of the rows off-policy, and any row may be drawn.",
            "set seq_kd to use the teacher's own samples, or set lmbda to 1",
            find_problem=completion_problem,
        )
    ]


def row_completion(row: Row, renderer: PromptRenderer, embedded: int) -> Ids:
    """Return a row's completion as ids: `completion_ids` as they are, else `completion` as the student would sample it.

    Args:
        row: a row whose completion was checked.
        renderer: the student's.
        embedded: ids that the model embeds.

    Raises:
        DataError: the completion does not fit behind the prompt (`completion_ids` of opsd.contexts.completions), or
            has ids that the model does not embed.
    """
    completion = completion_of(row)
    assert completion is not None, "checked before training"
    ids = completion if isinstance(completion, list) else completion_ids(renderer, row["prompt"], completion)
    beyond = [token for token in ids if not 0 <= token < embedded]
    if beyond:
        raise DataError(
            f"the completion has the id {beyond[0]}, and the model embeds 0 to {embedded - 1}. It would be scored as "
            "no token of the model. Make `completion_ids` with the student's own tokenizer, or give `completion` as "
            "text."
        )
    return ids


def trains_on_completions(args: OPSDConfig) -> bool:
    """Return whether some rows are trained on with their own completion."""
    return args.on_policy_share.least < 1.0 and not args.seq_kd


def teacher_answers(teacher: Teacher, args: OPSDConfig, limit: int, rows: Sequence[Row]) -> list[Ids]:
    """Return one answer per row, sampled from the teacher with its context, of `limit` tokens at most."""
    sampling = {"do_sample": True, "temperature": args.temperature, "batch_size": len(rows)}
    if not teacher.can_fail:
        return TeacherView(teacher).sample(rows, max_new_tokens=limit, **sampling)
    with failing_together():
        # A server has a generator of its own: a seed of this process's makes a resumed run ask for the same answers.
        seed = int(torch.randint(2**31, ()))
        return TeacherView(teacher).sample(rows, max_new_tokens=limit, seed=seed, **sampling)


def answers_of_teacher(trainer: Any) -> Callable[[Sequence[Row]], list[Ids]]:
    """Return a function that samples one answer per row from the trainer's teacher, as long as a rollout may be."""

    def answers(rows: Sequence[Row]) -> list[Ids]:
        with trainer.accelerator.autocast():
            return teacher_answers(trainer.teacher, trainer.args, trainer.generation_config.max_new_tokens, rows)

    return answers


def off_policy_completions(
    rows: Sequence[Row],
    args: OPSDConfig,
    limit: int,
    teacher: Teacher,
    student: StudentHandle,
    end_ids: Collection[int],
) -> tuple[list[Ids], int]:
    """Return completions for off-policy rows, and how many were cut at their longest length or behind their end.

    Args:
        rows: prepared.
        args: settings.
        limit: tokens of the longest completion at this step.
        teacher: samples, with seq_kd.
        student: the student.
        end_ids: ids at which a rollout of the student would end.
    """
    if args.seq_kd:
        return teacher_answers(teacher, args, limit, rows), 0
    embedded = embedded_tokens(student.model)
    completions = [row_completion(row, student.renderer, embedded) for row in rows]
    kept = [cut_after_stop(ids[:limit], end_ids) for ids in completions]
    return kept, sum(len(ids) > len(rest) for ids, rest in zip(completions, kept, strict=True))
