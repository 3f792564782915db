"""The way of rows to a run: every row is checked once, and what has to change is changed once.

`prepare_rows` reads top to bottom: columns first; then one pass in which each row is checked for a usable prompt and
against the needs of everything that reads it; then, only where something changes, one pass that writes the prompts.

Columns that only controls need are made here too: `wrong_answer` from `answer`; `other_X`, the X of another row that
differs; `completion` from what a row holds to imitate. A teacher that is shown another row's answer knows the form of
the help and none of its information (OP2SD, arXiv 2608.09228; AMPLE-Math, arXiv 2609.20612).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from opsd.data.needs import Need, RowCheck, check_columns
from opsd.data.rows import SHOWN_PROBLEMS, RowPreparation, row_columns
from opsd.data.values import OTHER, WRONG, is_empty, without_nan
from opsd.errors import DataError

# What a row may hold that can be imitated, the most telling first.
DEMONSTRATIONS = ("completion", "completion_ids", "demonstration", "solution", "answer")
BATCH = 1000  # rows that are read at once
_INTEGER = re.compile(r"[-+]?\d+")


def prepare_rows(
    dataset: Any,
    *,
    name: str = "train",
    system_prompt: str | None = None,
    reads: Iterable[str] = (),
    imitates: bool = False,
    needs: Sequence[Need] = (),
    each_row: Callable[[Mapping[str, Any]], None] | None = None,
) -> Dataset | IterableDataset:
    """Return rows as a run uses them, each checked: with a `prompt` that is text, or messages with text.

    Rows with chat `messages` give `prompt` and `completion`: the text of the last turn where that is the assistant's,
    else None; where some of these turns have reasoning or tool calls, the turn itself, as a list of one. In messages,
    lists of text parts are joined and keys that are None, with which Arrow fills up what other rows have, are dropped;
    other keys stay. In every column NaN becomes None. A map-style dataset is checked here and now, a stream as it is
    read (its prompts; of what it needs, only the columns).

    Args:
        dataset: map-style or streaming; returned as it is where nothing needs to change.
        name: what errors call it.
        system_prompt: the student's system turn, where a row has none of its own.
        reads: what contexts read; columns among it that can be made are made.
        imitates: whether rows are trained on as they are, and get a `completion` to imitate.
        needs: what rows must have, for everything that reads them.
        each_row: called with every row as prepared, in the pass that checks them; not for a stream.

    Raises:
        DataError: rows or columns that cannot be used, or that lack what something needs; nothing to make a column of.
    """
    _check_kind(dataset, name)
    columns = row_columns(dataset)
    preparation = RowPreparation(name, columns, system_prompt)
    sources = made_columns(reads, preparation.columns, imitates)
    ready_columns = [*preparation.columns, *sources]
    check_columns(ready_columns, needs, name)
    preparation.look_at_first(next(iter(dataset), {}), is_stream=isinstance(dataset, IterableDataset))
    if isinstance(dataset, IterableDataset):
        _check_stream(sources, imitates)
        return preparation.apply(dataset)

    # The first pass: every row, once.
    problems, count, changes = list[str](), 0, preparation.column == "messages"
    check = RowCheck(needs, name)
    kept: dict[str, list[Any]] = {column: [] for column in (["prompt", *sources.values()] if sources else [])}
    for number, read in enumerate(_read(dataset)):
        row = without_nan(read)
        if problem := preparation.find_problem(row, number):
            count += 1
            problems += [problem] if count <= SHOWN_PROBLEMS else []
            continue
        prepared = {**row, **preparation.prepared(row)}
        changes = changes or row is not read or prepared["prompt"] != row["prompt"]
        check.add(prepared, number)
        for column, values in kept.items():
            values.append(prepared[column])
        if each_row is not None:
            each_row(prepared)
    if count:
        raise preparation.error(problems, count)
    made = {column: _make(column, source, kept) for column, source in sources.items()}
    check.look_again(made)
    check.finish(ready_columns)

    # The second pass, where prompts change. New columns are put beside the others without reading these.
    ready: Any = preparation.apply(dataset) if changes else dataset
    for column, values in made.items():
        ready = ready.add_column(column, values)
    return ready


def made_columns(reads: Iterable[str], columns: Sequence[str], imitates: bool = False) -> dict[str, str]:
    """Return the columns that are read, are not there and can be made, each with the column that it is made from.

    Example:
        >>> made_columns(["wrong_answer", "other_solution", "hint"], ["prompt", "answer", "solution"])
        {'other_solution': 'solution', 'wrong_answer': 'answer'}
    """
    have = set(columns)
    heads = {name.split(".")[0] for name in reads}  # of "other_reward.truth" the column is "other_reward"
    made = {name: "answer" if name == WRONG else name.removeprefix(OTHER) for name in sorted(heads - have)}
    made = {name: source for name, source in made.items() if source in have and source != name}
    source = next((name for name in DEMONSTRATIONS if name in have), None) if imitates else None
    return made if source in (None, "completion", "completion_ids") else {**made, "completion": source}


def _check_kind(dataset: Any, name: str) -> None:
    if not isinstance(dataset, Dataset | IterableDataset):
        raise DataError(
            f"the {name} dataset is a {type(dataset).__name__}, and must be a datasets.Dataset or IterableDataset. "
            "Of a DatasetDict pass one split: dataset['train']."
        )
    if isinstance(dataset, Dataset) and not len(dataset):
        raise DataError(f"the {name} dataset is empty: it has no rows to train on.")


def _check_stream(sources: Mapping[str, str], imitates: bool) -> None:
    """Refuse a stream where columns have to be made."""
    if imitates:
        raise DataError("the control sft reads what rows hold to imitate, and these are a stream. Load a Dataset.")
    for column in sources:
        raise DataError(f"{column!r} is made from other rows, and a stream has one row at a time. Load a Dataset.")


def _read(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Yield rows as plain values."""
    for batch in dataset.with_format(None).iter(batch_size=BATCH):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


# ---- columns that only controls need --------------------------------------------------------------------------------


def _make(column: str, source: str, kept: Mapping[str, list[Any]]) -> list[Any]:
    """Return the values of a column made from another one.

    Raises:
        DataError: rows are all alike.
    """
    values, prompts = kept[source], kept["prompt"]
    if column == "completion":
        # Messages stay as they are: `completion_of` reads them.
        return [None if is_empty(v) else v if isinstance(v, list | dict) else str(v) for v in values]
    return [
        _near_miss(number, value) if column == WRONG and _is_whole(value) else _other(number, values, prompts, source)
        for number, value in enumerate(values)
    ]


def _other(number: int, values: list[Any], prompts: list[Any], base: str) -> Any:
    """Return the value of a row drawn for this one, or of the next one after it that differs."""
    start = random.Random(number).randrange(1, max(len(values), 2))
    for step in range(len(values)):
        other = (number + start + step) % len(values)
        if not is_empty(values[other]) and values[other] != values[number] and prompts[other] != prompts[number]:
            return values[other]
    raise DataError(
        f"no other row has a {base!r} that differs from row {number}'s, so there is no other answer to use. "
        "This control needs rows with different answers."
    )


def _near_miss(number: int, value: Any) -> Any:
    """Return a whole number near another one, in its own type."""
    drawn = random.Random(number)
    step = drawn.choice([-1, 1]) * drawn.randrange(1, 10)
    miss = int(str(value)) + step
    return miss if isinstance(value, int) else str(miss)


def _is_whole(value: Any) -> bool:
    return not isinstance(value, bool) and _INTEGER.fullmatch(str(value).strip()) is not None
