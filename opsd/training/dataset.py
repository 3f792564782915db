"""The dataset of a run: checked against contexts and settings, prepared, and seen to fit the models.

Knows rows, contexts and settings. `prepare_dataset` runs before a model loads, `check_rows_fit` after.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import islice
from typing import Any

from datasets import Dataset

from opsd.contexts.base import Context
from opsd.data.prepare import ready_rows
from opsd.data.rows import check_completions, row_columns
from opsd.errors import ConfigError, DataError, OPSDWarning
from opsd.evaluation.questions import check_held_out
from opsd.models.forward import check_lengths, context_length, embedded_tokens
from opsd.rollouts import Ids
from opsd.teachers import StudentHandle, Teacher
from opsd.teachers.prompting import TeacherPrompts
from opsd.training.controls import control_of
from opsd.training.groups import Groups, placeholders
from opsd.training.loss import Scorer

# Rows whose prompts are rendered for both sides before step 1: about ten seconds of one core.
CHECKED_ROWS = 20_000


def prepare_datasets(train: Any, evaluated: Any, args: Any, scorer: Scorer, groups: Groups) -> tuple[Any, Any]:
    """Return training and evaluation rows as the run uses them; see `prepare_dataset`.

    Raises:
        DataError: a question is in both.
    """
    train = prepare_dataset(train, "train", args, scorer, groups)
    evaluated = prepare_dataset(evaluated, "eval", args, scorer, groups)
    check_held_out(train, evaluated)
    return train, evaluated


def prepare_dataset(dataset: Any, name: str, args: Any, scorer: Scorer, groups: Groups) -> Any:
    """Return rows as the run uses them, checked against contexts and settings.

    Args:
        dataset: map-style, streaming, None, or several by name.
        name: "train", or what errors call it.
        args: training arguments.
        scorer: the loss, whose contexts and weights read columns.
        groups: how rollouts are graded.

    Raises:
        OPSDError: rows that cannot be used, or that lack what a context, a grader or a setting reads.
    """
    if isinstance(dataset, dict) and name != "train":
        return {each: prepare_dataset(rows, each, args, scorer, groups) for each, rows in dataset.items()}
    if dataset is None:
        return None
    dataset = ready_rows(dataset, name=name, system_prompt=args.student_system_prompt, needed=scorer.columns)
    control = control_of(args.control)
    if control is not None and name == "train":
        dataset = control.rows(dataset)
    # With seq_kd the teacher samples before there is a rollout to take fields from.
    scorer.check_rows(dataset, () if args.seq_kd else groups.rollout_fields)
    check_groups(dataset, scorer.teacher, groups, trains=name == "train")
    if name == "train" and not args.seq_kd:
        check_completions(dataset, off_policy=1.0 - args.lmbda)
    return dataset


def check_groups(dataset: Any, teacher: Teacher, groups: Groups, *, trains: bool) -> None:
    """Refuse groups of rollouts that these rows cannot have; warn where evaluation has no siblings to show.

    Args:
        dataset: prepared rows.
        teacher: the teacher, whose contexts may read what a group provides.
        groups: how rollouts are graded.
        trains: whether these are the training rows.

    Raises:
        DataError: groups of a stream, or rows without what a grader reads.
        ConfigError: a context that needs siblings, and groups of one.
    """
    groups.rewards.check_columns(row_columns(dataset))
    if not trains:
        _warn_of_missing_siblings(teacher, groups)
    elif groups.num_generations == 1 and groups.rewards.functions:
        _check_siblings(teacher)
    elif groups.num_generations > 1 and not isinstance(dataset, Dataset):
        raise DataError(
            "num_generations is above 1, and the training rows are a stream, whose shuffling would tear groups apart. "
            "Load them as a Dataset, or set num_generations to 1."
        )


def _check_siblings(teacher: Teacher) -> None:
    """Refuse a context that only siblings can fill, and warn of one that they fill mostly: groups of one have none."""
    for context in teacher.prompts.contexts:
        rule = f"template {context.name!r} shows correct siblings of a rollout, and num_generations is 1: there is none"
        if "sibling" in context.fields:
            raise ConfigError(f"{rule}, so nothing would be trained. Set num_generations to 8 or so.")
        if "sibling" in context.optional_fields and context.missing(()):
            warnings.warn(
                f"{rule}. Rollouts without feedback from the verifier (log_extra) will train nothing. Set "
                "num_generations to 8 or so.",
                OPSDWarning,
                stacklevel=2,
            )


def _warn_of_missing_siblings(teacher: Teacher, groups: Groups) -> None:
    for context in teacher.prompts.contexts:
        if (context.fields | context.optional_fields) & set(groups.rollout_fields):
            warnings.warn(
                f"template {context.name!r} shows what a group of rollouts provides, and evaluation samples each row "
                "once: there are no siblings, and rows with nothing to show are not counted, so eval_loss may be 0. "
                "Read eval_reward instead.",
                OPSDWarning,
                stacklevel=2,
            )


def check_rows_fit(
    dataset: Any, student: StudentHandle, teacher: Teacher, max_new_tokens: int, rollout_fields: Sequence[str] = ()
) -> None:
    """Render the prompts of the first rows for both sides: find templates that fail and prompts that are too long.

    Args:
        dataset: prepared rows; a stream is checked row by row as it is used.
        student: the student.
        teacher: the teacher, prepared.
        max_new_tokens: tokens of a completion at most.
        rollout_fields: names of fields that rollouts provide to contexts; a few words stand for each here.

    Raises:
        DataError: a prompt leaves no room for its completion; names the row.
        TemplateError: the template fails on a row.
    """
    if not isinstance(dataset, Dataset):
        return
    limit, embedded = context_length(student.model), embedded_tokens(student.model)
    for number, row in enumerate(islice(dataset, CHECKED_ROWS)):
        prompt_ids = student.renderer.ids(row["prompt"])
        check_lengths(limit, [prompt_ids], [max_new_tokens], "student", first_row=number)
        _check_embedded(prompt_ids, embedded, student, number)
        for leaf in teacher.prompts.leaves_of(row):
            if leaf.context is not None:
                _check_teacher_prompts(leaf, row, number, max_new_tokens, rollout_fields)
    teacher.prompts.forget_counts()


def _check_embedded(prompt_ids: Ids, embedded: int, student: StudentHandle, number: int) -> None:
    if max(prompt_ids) >= embedded:
        token = student.tokenizer.decode([max(prompt_ids)])
        raise DataError(
            f"row {number}: the prompt has the token {token!r} with id {max(prompt_ids):,}, and the model embeds "
            f"{embedded:,}. Model and tokenizer do not belong together, or tokens were added to one of them: "
            "model.resize_token_embeddings(len(tokenizer))."
        )


def _check_teacher_prompts(
    leaf: TeacherPrompts, row: Any, number: int, max_new_tokens: int, rollout_fields: Sequence[str]
) -> None:
    """Render a row under every context that it may get, and check the lengths."""
    assert leaf.context is not None
    fields = placeholders(rollout_fields, row)
    for context in leaf.context.possible_contexts(row, fields):
        try:
            prompt_ids = context.render(row, fields, renderer=leaf.renderer)
        except DataError as error:
            raise DataError(f"row {number}: {error}") from error
        # A field that a rollout provides may be as long as a completion.
        longest = max_new_tokens * (1 + _untruncated_rollouts(context, rollout_fields))
        check_lengths(leaf.teacher.max_length, [prompt_ids], [longest], "teacher", first_row=number)


def _untruncated_rollouts(context: Context, rollout_fields: Sequence[str]) -> int:
    """Return how many rollouts a context shows at full length."""
    return len(context.untruncated_fields({"sibling", "attempt"} & set(rollout_fields)))


def check_trained(steps: int, rows_per_step: int) -> None:
    """Refuse a training that did nothing.

    Raises:
        DataError: there were too few rows for a step.
    """
    if steps == 0:
        raise DataError(
            f"the dataset ended before one step of {rows_per_step} rows (batch per device × accumulation steps × "
            "processes), so nothing was trained. Lower one of these, or add rows."
        )
