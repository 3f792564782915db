"""What a row must be to be trained on: every row gets a `prompt` that is there, well formed and to be answered.

Knows columns and messages. Knows no tokenizer, template, teacher or rank, and drops no row: what cannot be used is an
error that names the rows. How files become datasets stands in `data_files.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from itertools import chain
from typing import Any

from datasets import Dataset, Features, IterableDataset, Json, List, Value

from opsd.data.files import load_rows
from opsd.data.values import text_of
from opsd.errors import DataError

__all__ = ["completion_of", "load_rows", "prepare_rows", "row_columns", "with_system_prompt"]

Row = dict[str, Any]

_IMAGE_COLUMNS = {"image", "images"}
_NO_IMAGES = "version 1 of opsd is text only, and would train as if the images were not there"
# Names under which published datasets keep what we call `prompt`.
_PROMPT_NAMES = ("prompts", "question", "problem", "instruction", "query", "input", "text")
_SHOWN = 5
_BATCH = 1000


def row_columns(dataset: Dataset | IterableDataset) -> list[str]:
    """Return the column names; of a stream that does not declare them, those of its first row.

    Raises:
        DataError: the stream is empty.
    """
    if dataset.column_names is not None:
        return list(dataset.column_names)
    first = next(iter(dataset), None)
    if first is None:
        raise DataError("the dataset is empty: its stream ended before the first row.")
    return list(first)


def prepare_rows(dataset: Dataset | IterableDataset, *, name: str = "train") -> Dataset | IterableDataset:
    """Return the dataset with a checked `prompt` in every row: text, or messages whose contents are strings.

    Rows with chat `messages` give `prompt` and `completion` (the text of the last turn where that is the assistant's,
    else None). In messages, lists of text parts are joined and keys that are None, with which Arrow fills up what
    other rows have, are dropped; other keys stay. A map-style dataset is checked here and now, a stream as it is read.

    Args:
        dataset: map-style or streaming; returned as it is where nothing needs to change.
        name: what errors call it.

    Raises:
        DataError: there is no `prompt`, or rows have a prompt that is missing, malformed, already answered, of another
            kind (text or messages) than those before it, or that comes with images.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        raise DataError(
            f"the {name} dataset is a {type(dataset).__name__}, and must be a datasets.Dataset or IterableDataset. "
            "Of a DatasetDict pass one split: dataset['train']."
        )
    if isinstance(dataset, Dataset) and not len(dataset):
        raise DataError(f"the {name} dataset is empty: it has no rows to train on.")
    checker = _RowChecker(name, _prompt_column(row_columns(dataset), name))
    prepare = _prepare_stream if isinstance(dataset, IterableDataset) else _prepare_table
    return prepare(dataset, checker)


def with_system_prompt(dataset: Dataset | IterableDataset, text: str | None) -> Dataset | IterableDataset:
    """Return prepared rows with a system turn where they have none of their own.

    Args:
        dataset: prepared rows.
        text: what the turn says; None leaves rows as they are.

    Raises:
        DataError: prompts are plain text, which has no turns.
    """
    if text is None:
        return dataset
    first = next(iter(dataset), None)
    if first is not None and isinstance(first["prompt"], str):
        raise DataError(
            "student_system_prompt is a turn of a chat, and this dataset's prompts are plain text, which has none. "
            "Give prompts as messages, or write the words into the prompts."
        )

    def opened(row: Row) -> Row:
        turns = [_without_none(turn) for turn in row["prompt"]]
        own = any(turn["role"] == "system" for turn in turns)
        return {"prompt": turns if own else [{"role": "system", "content": text}, *turns]}

    features = dataset.features and Features({**dataset.features, "prompt": List(Json())})
    cache = {"load_from_cache_file": False} if isinstance(dataset, Dataset) else {}
    return dataset.map(opened, features=features, **cache)


def completion_of(row: Mapping[str, Any]) -> str | list[int] | None:
    """Return what the row offers for off-policy training: `completion_ids`, else the text of `completion`, else None.

    Raises:
        DataError: the completion is neither text, nor token ids, nor messages with an assistant's turn.
    """
    ids, completion = row.get("completion_ids"), row.get("completion")
    if ids is not None:
        return [int(token) for token in ids]
    if completion is None or isinstance(completion, str):
        return completion
    if not isinstance(completion, list):
        raise DataError(f"a `completion` must be text or messages, and this one is a {type(completion).__name__}.")
    turns = [turn for turn in completion if isinstance(turn, dict) and turn.get("role") == "assistant"]
    if not turns or _check_message(turns[-1]) or not text_of(turns[-1]):
        raise DataError(
            "a `completion` given as messages must hold an assistant turn with text, since that text is trained on. "
            f"This one does not: {completion!r:.200}."
        )
    return text_of(turns[-1])


def check_completions(dataset: Dataset | IterableDataset, off_policy: float) -> None:
    """Refuse rows without a completion where a share of them is used off-policy.

    Args:
        dataset: prepared rows.
        off_policy: that share, 1 - lmbda.

    Raises:
        DataError: no column `completion` or `completion_ids`, or nothing in it in some rows.
    """
    if off_policy == 0.0:
        return
    columns = row_columns(dataset)
    way_out = "set seq_kd to use the teacher's own samples, or set lmbda to 1."
    if not {"completion", "completion_ids"} & set(columns):
        raise DataError(
            f"lmbda sends {off_policy:.0%} of the rows off-policy, and the dataset has no column `completion` or "
            f"`completion_ids` (it has: {', '.join(columns)}). Add one, {way_out}"
        )
    if isinstance(dataset, Dataset):
        empty = [number for number, row in enumerate(dataset) if not completion_of(row)]
        if empty:
            raise DataError(
                f"lmbda sends {off_policy:.0%} of the rows off-policy, any row may be drawn, and {len(empty)} row(s) "
                f"have no completion (first: {empty[:5]}). Fill them in, {way_out}"
            )


def _prompt_column(columns: list[str], name: str) -> str:
    """Return the column prompts are made of: "prompt" or "messages"."""
    images = sorted(_IMAGE_COLUMNS.intersection(columns))
    if images:
        raise DataError(f"the {name} dataset has the column {images[0]!r}: {_NO_IMAGES}. Remove the column.")
    if "messages" in columns:
        rivals = [column for column in ("prompt", "completion") if column in columns]
        if rivals:
            raise DataError(
                f"the {name} dataset has both 'messages' and '{rivals[0]}', and opsd makes the one of the other, so "
                f"which one to train on is a guess. Drop one: dataset.remove_columns('messages')."
            )
        return "messages"
    if "prompt" in columns:
        return "prompt"
    near = [column for column in _PROMPT_NAMES if column in columns] or difflib.get_close_matches("prompt", columns, 1)
    hint = f"Is it {near[0]!r}? Then " if near else "Rename the column that holds it: "
    old = near[0] if near else "..."
    raise DataError(
        f"the {name} dataset has no column 'prompt' (or 'messages'), which is all that the student sees; "
        f"it has: {', '.join(columns)}. {hint}dataset.rename_column({old!r}, 'prompt')."
    )


class _RowChecker:
    """Checks and normalises the rows of one dataset in order; all rows must be of the first one's kind."""

    def __init__(self, name: str, column: str) -> None:
        self.name, self.column = name, column
        self.first: tuple[str, int] | None = None

    def check(self, row: Row, number: int) -> str | None:
        """Return what is wrong with a row, in words, or None."""
        problem = _check_row(row, self.column)
        if problem is None:
            kind = "text" if isinstance(row[self.column], str) else "messages"
            self.first = self.first or (kind, number)
            if kind != self.first[0]:
                problem = f"`{self.column}` is {kind}, and in row {self.first[1]} it is {self.first[0]}"
        return problem and f"row {number}: {problem}"

    def normalise_checked(self, row: Row, number: int) -> Row:
        problem = self.check(row, number)
        if problem:
            raise self.error([problem], 1)
        return self.normalise(row)

    def normalise(self, row: Row) -> Row:
        """Return the columns that preparing gives to a checked row."""
        if isinstance(row[self.column], str):
            return {"prompt": row["prompt"]}
        turns = [_normalise_message(message) for message in row[self.column]]
        if self.column == "prompt":
            return {"prompt": turns}
        answer = turns.pop()["content"] if turns[-1]["role"] == "assistant" else None
        return {"prompt": turns, "completion": answer}

    def error(self, problems: list[str], count: int) -> DataError:
        more = [f"... and {count - len(problems)} more"] if count > len(problems) else []
        return DataError(
            f"the {self.name} dataset has {count} row{'s' * (count > 1)} without a usable prompt "
            "(the first is row 0):\n  " + "\n  ".join(problems + more) + "\n"
            "Every row must ask something, all in one form, for the student to have something to answer. "
            "Mend these rows, or drop them with dataset.filter(...)."
        )

    def features(self, before: Features | None) -> Features | None:
        """Return the features after `normalise`; messages become Json, as Arrow structs would get the Nones back."""
        if before is None:
            return None
        after = {column: feature for column, feature in before.items() if column != "messages"}
        if self.column == "messages":
            after |= {"prompt": List(Json()), "completion": Value("string")}
        elif not isinstance(before["prompt"], Value | Json):
            after["prompt"] = List(Json())
        return Features(after)


def _prepare_stream(dataset: IterableDataset, checker: _RowChecker) -> IterableDataset:
    return dataset.map(
        checker.normalise_checked,
        with_indices=True,
        features=checker.features(dataset.features),
        remove_columns=["messages"] if checker.column == "messages" else None,
    )


def _prepare_table(dataset: Dataset, checker: _RowChecker) -> Dataset:
    problems: list[str] = []
    count, changed = 0, checker.column == "messages"
    batches = dataset.with_format(None).select_columns([checker.column]).iter(batch_size=_BATCH)
    for number, value in enumerate(chain.from_iterable(batch[checker.column] for batch in batches)):
        row = {checker.column: value}
        problem = checker.check(row, number)
        if problem:
            count += 1
            if count <= _SHOWN:
                problems.append(problem)
        else:
            changed = changed or checker.normalise(row)["prompt"] != value
    if count:
        raise checker.error(problems, count)
    if not changed:
        return dataset
    return dataset.map(
        checker.normalise,
        features=checker.features(dataset.features),
        remove_columns=["messages"] if checker.column == "messages" else None,
        load_from_cache_file=False,  # a cache made by another version of this file would be found by name
    )


def _check_row(row: Row, column: str) -> str | None:
    """Return what keeps a row from being answered, in words, or None."""
    if not _IMAGE_COLUMNS.isdisjoint(row):
        return f"it has images: {_NO_IMAGES}"
    value = row.get(column)
    if value is None:
        return f"`{column}` is None"
    if not isinstance(value, list if column == "messages" else str | list):
        return f"`{column}` is a {type(value).__name__}, neither text nor a list of messages"
    if not (value.strip() if isinstance(value, str) else value):
        return f"`{column}` is empty"
    return None if isinstance(value, str) else _check_turns(value, column)


def _check_turns(turns: list[Any], column: str) -> str | None:
    for position, message in enumerate(turns):
        problem = _check_message(message)
        if problem:
            return f"message {position} of `{column}` {problem}"
    if column == "messages" and turns[-1]["role"] == "assistant":
        if not text_of(turns[-1]):
            return "`messages` ends with an assistant turn that has no text"
        turns = turns[:-1]
    if not turns:
        return f"`{column}` is an assistant turn only: nothing was asked"
    if turns[-1]["role"] == "assistant":
        return f"`{column}` is already answered by its last assistant turn: nothing is left to answer"
    if turns[-1]["role"] == "user" and not text_of(turns[-1]).strip():
        return f"`{column}` ends with an empty user turn"
    return None


def _check_message(message: Any) -> str | None:
    """Return what is wrong with a message, as the end of a sentence about it, or None."""
    if not isinstance(message, dict):
        return f"is a {type(message).__name__}, not a dict with 'role' and 'content'"
    role, content = message.get("role"), message.get("content")
    if not (isinstance(role, str) and role):
        return f"has no 'role'; it has: {', '.join(map(str, message))}"
    if content is None:
        return None if message.get("tool_calls") else "has no 'content'"
    if not isinstance(content, str | list):
        return f"has a 'content' that is a {type(content).__name__}, neither text nor a list of text parts"
    for part in content if isinstance(content, list) else []:
        if not (isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            return f"has a content part of type {kind!r}: {_NO_IMAGES.partition(',')[0]}"
    return None


def _normalise_message(message: dict[str, Any]) -> dict[str, Any]:
    return {**_without_none(message), "content": text_of(message)}


def _without_none(value: Any) -> Any:
    """Drop the keys that Arrow filled with None, at every depth; a null that was meant cannot be told from those."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
