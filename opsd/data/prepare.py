"""Rows made ready for a run: checked, with the student's system turn, and with columns that only controls need.

Controls show what a dataset does not have: wrong answers, and what belongs to another row. `wrong_answer` is made from
`answer`; `other_X` is the X of another row that differs. A teacher that is shown these knows the form of the help and
none of its information (OP2SD, arXiv 2608.09228; AMPLE-Math, arXiv 2609.20612).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from typing import Any

from datasets import Dataset, IterableDataset

from opsd.data.rows import prepare_rows, row_columns, with_system_prompt
from opsd.data.values import OTHER, WRONG
from opsd.errors import DataError

_INTEGER = re.compile(r"[-+]?\d+")


def ready_rows(
    dataset: Any, *, name: str, system_prompt: str | None, needed: Iterable[str]
) -> Dataset | IterableDataset:
    """Return rows as a run uses them.

    Args:
        dataset: map-style or streaming.
        name: what errors call it.
        system_prompt: the student's system turn, where a row has none of its own.
        needed: what contexts read.

    Raises:
        DataError: rows that cannot be used, or from which nothing can be made.
    """
    rows = with_system_prompt(prepare_rows(dataset, name=name), system_prompt)
    return with_derived(rows, needed, row_columns(rows))


def derived_columns(needed: Iterable[str], columns: Iterable[str]) -> list[str]:
    """Return those of the needed names that are no columns and can be made from them."""
    have = set(columns)
    heads = {name.split(".")[0] for name in needed}  # of "other_reward.truth" the column is "other_reward"
    return [
        name
        for name in sorted(heads - have)
        if (name == WRONG and "answer" in have) or name.removeprefix(OTHER) in have - {name}
    ]


def with_derived(dataset: Dataset | IterableDataset, needed: Iterable[str], columns: Iterable[str]) -> Any:
    """Return the dataset with the columns that contexts need and that can be made.

    Args:
        dataset: prepared rows.
        needed: the fields of all contexts.
        columns: the dataset's columns.

    Raises:
        DataError: a stream, or rows that are all alike.
    """
    for name in derived_columns(needed, columns):
        if not isinstance(dataset, Dataset):
            raise DataError(f"{name!r} is made from other rows, and a stream knows one at a time. Load a Dataset.")
        base = "answer" if name == WRONG else name.removeprefix(OTHER)
        values, prompts = list(dataset[base]), list(dataset["prompt"])
        made = [
            _near_miss(number, value) if name == WRONG and _is_whole(value) else _other(number, values, prompts, base)
            for number, value in enumerate(values)
        ]
        dataset = dataset.add_column(name, made)
    return dataset


def _other(number: int, values: list[Any], prompts: list[Any], base: str) -> Any:
    """Return the value of a row drawn for this one, or of the next one after it that differs."""
    start = random.Random(number).randrange(1, max(len(values), 2))
    for step in range(len(values)):
        other = (number + start + step) % len(values)
        if values[other] not in (values[number], None, "") and prompts[other] != prompts[number]:
            return values[other]
    raise DataError(
        f"no other row has a {base!r} that differs from row {number}'s, so there is nothing wrong to show. "
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
