"""The datasets of a run: what the run needs of their rows, and whether prompts fit the models.

Knows needs, contexts and settings. `prepare_datasets` runs before a model loads; the passes over rows stand in
`opsd/data/prepare.py`. `fitting_rows` runs after, and is the third and last pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from datasets import Dataset

from opsd.contexts.base import Context
from opsd.data.order import EpochSampler
from opsd.data.prepare import prepare_rows
from opsd.errors import ConfigError, DataError, LengthError, OPSDWarning
from opsd.evaluation.questions import check_disjoint, question_of
from opsd.models.forward import check_lengths, context_length, embedded_tokens
from opsd.rollouts import Ids
from opsd.teachers import StudentHandle, Teacher
from opsd.training.config import OPSDConfig
from opsd.training.controls import control_of
from opsd.training.groups import Groups, placeholders
from opsd.training.loss import Scorer
from opsd.training.off_policy import completion_needs, row_completion, trains_on_completions

# Rows whose prompts are rendered for both sides before step 1: about ten seconds of one core.
CHECKED_ROWS = 20_000


def prepare_datasets(
    train: Any, evaluated: Any, args: OPSDConfig, scorer: Scorer, groups: Groups, *, has_plan: bool = False
) -> tuple[Any, Any, list[str]]:
    """Return training and evaluation rows as the run uses them, and the questions of the training rows.

    Args:
        train: map-style, streaming, or None.
        evaluated: the same, or several by name.
        args: training arguments.
        scorer: the loss, whose contexts and weights read columns.
        groups: how rollouts are graded.
        has_plan: whether an evaluation plan will ask for the training questions; without one, and without `evaluated`,
            none are returned.

    Raises:
        OPSDError: rows that cannot be used, or that lack what something reads; a question in both, streams aside.
    """

    def prepare(dataset: Any, name: str, *, trains: bool) -> tuple[Any, list[str]]:
        control = control_of(args.control) if trains else None
        # With seq_kd the teacher samples before there is a rollout to take fields from.
        needs = [*scorer.needs(() if args.seq_kd else groups.rollout_fields), *groups.rewards.needs]
        if trains:
            needs += [*(control.needs if control else ()), *completion_needs(args)]
        questions: list[str] = []
        dataset = prepare_rows(
            dataset,
            name=name,
            system_prompt=args.student_system_prompt,
            reads=scorer.columns,
            imitates=control is not None and control.imitates,
            needs=needs,
            each_row=(lambda row: questions.append(question_of(row))) if has_plan or evaluated is not None else None,
        )
        check_groups(dataset, scorer.teacher, groups, trains=trains)
        if trains:
            _check_stream(dataset, args)
        return dataset, questions

    rows, asked = prepare(train, "train", trains=True) if train is not None else (None, [])
    several = evaluated if isinstance(evaluated, dict) else {"eval": evaluated}
    prepared = {name: prepare(each, name, trains=False) for name, each in several.items() if each is not None}
    for name, (_, questions) in prepared.items():
        check_disjoint({"train": asked, name: questions})
    by_name = {name: prepared[name][0] if name in prepared else None for name in several}
    return rows, by_name if isinstance(evaluated, dict) else by_name["eval"], asked


def check_groups(dataset: Any, teacher: Teacher, groups: Groups, *, trains: bool) -> None:
    """Refuse groups of rollouts that these rows cannot have; warn where evaluation has no siblings to show.

    Args:
        dataset: prepared rows.
        teacher: the teacher, whose contexts may read what a group provides.
        groups: how rollouts are graded.
        trains: whether these are the training rows.

    Raises:
        DataError: groups of a stream.
        ConfigError: a context that needs siblings, and groups of one.
    """
    if not trains:
        _warn_of_missing_siblings(teacher, groups)
    elif groups.num_generations == 1 and groups.rewards.functions:
        _check_siblings(teacher)
    elif groups.num_generations > 1 and not isinstance(dataset, Dataset):
        raise DataError(
            "num_generations is above 1, and the training rows are a stream, whose shuffling would tear groups apart. "
            "Load them as a Dataset, or set num_generations to 1."
        )


def _check_stream(dataset: Any, args: OPSDConfig) -> None:
    """Refuse a stream whose workers would each repeat batches of their own.

    Raises:
        DataError: names the settings.
    """
    repeats, workers = args.gradient_accumulation_steps * args.steps_per_rollouts, args.dataloader_num_workers
    if not isinstance(dataset, Dataset) and workers > 1 and repeats > 1:
        raise DataError(
            f"the training rows are a stream, dataloader_num_workers is {workers}, and a batch of rollouts gives "
            f"{repeats} micro-batches. Each worker would repeat batches of its own, so that some rows would be trained "
            "twice and others never. Load the rows as a Dataset, or set dataloader_num_workers to 1."
        )


def _check_siblings(teacher: Teacher) -> None:
    """Refuse a context that only siblings can fill, and warn of one that they fill mostly: groups of one have none."""
    for context in teacher.prompts.contexts:
        rule = (
            f"template {context.name!r} reads `sibling`, a correct rollout of the same prompt, and num_generations is "
            "1: there is none"
        )
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
        if context.columns & set(groups.rollout_fields):
            warnings.warn(
                f"template {context.name!r} shows what a group of rollouts provides, and evaluation samples each row "
                "once: there are no siblings, and rows with nothing to show are not counted, so eval_loss may be 0. "
                "Read eval_reward instead.",
                OPSDWarning,
                stacklevel=2,
            )


def fitting_rows(
    dataset: Any,
    student: StudentHandle,
    teacher: Teacher,
    args: OPSDConfig,
    rollout_fields: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> Any:
    """Return the training rows whose prompts leave room for a completion.

    Only `drop_long_rows` drops any, and renders every row for it. The prompts of the first rows are then rendered for
    both sides, and their completions, if those are trained on. Finds templates that fail, prompts that are too long,
    and completions that do not fit behind their prompts.

    Args:
        dataset: prepared rows; a stream is checked row by row as it is used.
        student: the student.
        teacher: the teacher, prepared.
        args: training arguments.
        rollout_fields: names of fields that rollouts provide to contexts; a few words stand for each here.
        say: called with how many rows were dropped: their prompts exceed max_prompt_tokens, or leave no room for a
            completion.

    Raises:
        DataError: a prompt leaves no room for its completion, or a completion cannot be used; names the row. Or every
            row is too long, or rows of a stream are to be dropped.
        TemplateError: the template fails on a row.
    """
    if args.drop_long_rows:
        before, dataset = dataset, _without_long_rows(dataset, student, teacher, args, rollout_fields)
        dropped = len(before) - len(dataset)
        say(f"dropped     {dropped:,} of {len(before):,} rows: their prompts are too long")
    if isinstance(dataset, Dataset):
        _check_first_rows(dataset, student, teacher, args, rollout_fields)
    teacher.prompts.forget_counts()
    return dataset


def _without_long_rows(
    dataset: Any, student: StudentHandle, teacher: Teacher, args: OPSDConfig, rollout_fields: Sequence[str]
) -> Dataset:
    if not isinstance(dataset, Dataset):
        raise DataError(
            "drop_long_rows renders every row before training, to count those that it drops, and these rows are a "
            "stream. Load them as a Dataset, or filter the stream yourself."
        )

    def fits(row: Any, number: int) -> bool:
        try:
            for who, limit, ids, room in _prompts(row, number, student, teacher, args, rollout_fields):
                check_lengths(limit, [ids], [room], who, first_row=number)
        except LengthError:
            return False
        return True

    kept = [number for number, row in enumerate(dataset) if fits(row, number)]
    if not kept:
        raise DataError(
            f"drop_long_rows drops all {len(dataset)} rows: every prompt exceeds max_prompt_tokens, or leaves less "
            f"than max_completion_length ({args.max_completion_length}) tokens of the model's context. Raise "
            "max_prompt_tokens, lower max_completion_length, or shorten the prompts."
        )
    return dataset if len(kept) == len(dataset) else dataset.select(kept)


def _check_first_rows(
    dataset: Dataset, student: StudentHandle, teacher: Teacher, args: OPSDConfig, rollout_fields: Sequence[str]
) -> None:
    embedded, has_completion = embedded_tokens(student.model), trains_on_completions(args)
    for number, row in enumerate(islice(dataset, CHECKED_ROWS)):
        _check_embedded(student.renderer.ids(row["prompt"]), embedded, student, number)
        if has_completion:
            _check_completion(row, embedded, student, number)
        for who, limit, ids, room in _prompts(row, number, student, teacher, args, rollout_fields):
            check_lengths(limit, [ids], [room], who, first_row=number)


def _prompts(
    row: Any, number: int, student: StudentHandle, teacher: Teacher, args: OPSDConfig, rollout_fields: Sequence[str]
) -> Iterator[tuple[str, int | None, Ids, int]]:
    """Yield whose prompt, the limit, the ids and the room that a completion needs, under every context it may get."""
    longest, fields = args.max_completion_length or 0, placeholders(rollout_fields, row)
    yield "student", context_length(student.model), student.renderer.ids(row["prompt"]), longest
    for leaf in teacher.prompts.leaves_of(row):
        if leaf.context is None:
            yield "teacher", leaf.teacher.max_length, leaf.renderer.ids(row["prompt"]), longest
            continue
        for context in leaf.context.possible_contexts(row, fields):
            try:
                ids = context.render(row, fields, renderer=leaf.renderer)
            except DataError as error:
                raise type(error)(f"row {number}: {error}") from error
            # A field that a rollout provides may be as long as a completion.
            room = longest * (1 + _untruncated_rollouts(context, rollout_fields))
            yield "teacher", leaf.teacher.max_length, ids, room


def _check_embedded(prompt_ids: Ids, embedded: int, student: StudentHandle, number: int) -> None:
    if max(prompt_ids) >= embedded:
        token = student.tokenizer.decode([max(prompt_ids)])
        raise DataError(
            f"row {number}: the prompt has the token {token!r} with id {max(prompt_ids):,}, and the model embeds "
            f"{embedded:,}. Model and tokenizer do not belong together, or tokens were added to one of them: "
            "model.resize_token_embeddings(len(tokenizer))."
        )


def _check_completion(row: Any, embedded: int, student: StudentHandle, number: int) -> None:
    try:
        row_completion(row, student.renderer, embedded)
    except DataError as error:
        raise DataError(f"row {number}: {error}") from error


def _untruncated_rollouts(context: Context, rollout_fields: Sequence[str]) -> int:
    """Return how many rollouts a context shows at full length."""
    return len(context.untruncated_fields({"sibling", "attempt"} & set(rollout_fields)))


def check_trained(steps: int, rows_per_batch: int) -> None:
    """Refuse a training that did nothing.

    Raises:
        DataError: there were too few rows for a batch of rollouts.
    """
    if steps == 0:
        raise DataError(
            f"the dataset ended before one batch of rollouts of {rows_per_batch} rows (batch per device × accumulation "
            "steps, or steps_per_generation, × processes), so nothing was trained. Lower one of these, or add rows."
        )


def epoch_sampler(dataset: Dataset, args: OPSDConfig, rows_per_step: int, epoch: Callable[[], int]) -> EpochSampler:
    """Return the order of a run's rows, by seed and epoch.

    Args:
        dataset: prepared rows.
        args: settings.
        rows_per_step: rollouts of one step over all processes.
        epoch: returns the epoch under way.
    """
    return EpochSampler(
        len(dataset),
        batch_size=rows_per_step,
        group=args.num_generations,
        repeats=args.gradient_accumulation_steps,
        shuffle=bool(args.shuffle_dataset),
        seed=args.seed,
        epoch=epoch,
    )
