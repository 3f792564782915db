"""Checks and prepares one row: every row gets a `prompt` that is there, well formed and to be answered.

Knows columns and messages. Knows no tokenizer, template, teacher or rank, and drops no row: what cannot be used is an
error that names the rows. How a whole dataset is prepared stands in `prepare.py`, how files are read in `files.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, Features, IterableDataset, Json, List, Value

from opsd.data.json_columns import as_stored
from opsd.data.values import REASONING, is_empty, is_missing, text_of, without_nan
from opsd.errors import DataError

Row = dict[str, Any]

_IMAGE_COLUMNS = {"image", "images"}
_NO_IMAGES = "version 1 of opsd is text only, and would train as if the images were not there"
# Names under which published datasets keep what we call `prompt`.
_PROMPT_NAMES = ("prompts", "question", "problem", "instruction", "query", "input", "text")
SHOWN_PROBLEMS = 5


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


def completion_of(row: Mapping[str, Any]) -> str | Row | list[int] | None:
    """Return what the row offers for off-policy training.

    Returns:
        `completion_ids`; else the text of `completion`, or its one turn where that has reasoning or tool calls; else
        None.

    Raises:
        DataError: the completion is neither text, nor token ids, nor one assistant turn.
    """
    ids, completion = row.get("completion_ids"), row.get("completion")
    if not is_empty(ids):
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise DataError(f"`completion_ids` must be a list of token ids, and this is {ids!r:.80}.")
        return ids
    if isinstance(completion, str) or completion is None:
        return None if is_empty(completion) else completion
    if not isinstance(completion, list):
        raise DataError(f"a `completion` must be text or messages, and this one is a {type(completion).__name__}.")
    turn: Any = completion[-1] if completion else None
    if _check_message(turn) or turn.get("role") != "assistant" or not text_of(turn):
        raise DataError(
            "a `completion` given as messages must hold an assistant turn with text, since that text is trained on. "
            f"This one does not: {completion!r:.200}."
        )
    if len(completion) > 1:
        raise DataError(
            f"a `completion` given as messages is one assistant turn, and this one has {len(completion)} turns, of "
            "which the last answers those before it. Move those to the end of `prompt`, or give the whole chat in one "
            "column `messages`."
        )
    turn = _normalise_message(turn)
    return turn if _structure_of(turn) else turn["content"]


def _structure_of(turn: Mapping[str, Any]) -> str | None:
    """Return a key under which an assistant's turn has more than its text, or None."""
    return next((key for key in (*REASONING, "tool_calls") if not is_empty(turn.get(key))), None)


def completion_problem(row: Mapping[str, Any]) -> str | None:
    """Return what keeps a row from being used off-policy, in words, or None."""
    try:
        return "is empty" if completion_of(row) is None else None
    except DataError as error:
        return f"cannot be used ({error})"


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
    if "conversations" in columns:
        raise DataError(
            f"the {name} dataset has 'conversations' (ShareGPT), whose turns are {{from, value}}, and opsd reads "
            "'messages' with turns {role, content}. Convert it first: `from` human is the role user, gpt is assistant; "
            "`value` is the content."
        )
    raise DataError(
        f"the {name} dataset has no column 'prompt' (or 'messages'), which is all that the student sees; "
        f"it has: {', '.join(columns)}. {hint}dataset.rename_column({old!r}, 'prompt'), "
        f"or in a run file columns: {{prompt: {old}}}."
    )


class RowPreparation:
    """Checks and prepares the rows of one dataset in order; all rows must be of the first one's kind.

    Args:
        name: what errors call the dataset.
        columns: its columns.
        system_prompt: the student's system turn, for rows that have none; None leaves rows as they are.

    Raises:
        DataError: columns from which no prompt can be made.

    Example:
        >>> preparation = RowPreparation("train", ["prompt", "answer"], system_prompt="Be kind.")
        >>> row = {"prompt": [{"role": "user", "content": "1 + 1?"}], "answer": "2"}
        >>> preparation.find_problem(row, number=0)
        >>> preparation.prepared(row)["prompt"][0]
        {'role': 'system', 'content': 'Be kind.'}
    """

    def __init__(self, name: str, columns: list[str], system_prompt: str | None = None) -> None:
        self.name, self.column = name, _prompt_column(columns, name)
        self._columns, self._system_prompt = columns, system_prompt
        self._first: tuple[str, int] | None = None
        self._stored: Features | None = None  # of the prepared rows
        self._is_stream = False
        self._has_structure = False  # whether answers are kept as turns, for what they have beside a text

    @property
    def columns(self) -> list[str]:
        """The columns of prepared rows."""
        kept = [column for column in self._columns if column != "messages"]
        return [*kept, "prompt", "completion"] if self.column == "messages" else kept

    def look_at_first(self, first: Mapping[str, Any], *, is_stream: bool) -> None:
        """Refuse a system turn for prompts that are plain text, as the first row tells; of a stream it tells the types.

        Raises:
            DataError: they are plain text.
        """
        self._is_stream = is_stream
        if self.column == "messages" and _check_row(first, self.column) is None:
            self._has_structure = _structure_of(first["messages"][-1]) is not None
        if self._system_prompt is not None and isinstance(first.get("prompt"), str):
            raise DataError(
                "student_system_prompt is a turn of a chat, and this dataset's prompts are plain text, which has none. "
                "Give prompts as messages, or write the words into the prompts."
            )

    def find_problem(self, row: Mapping[str, Any], number: int) -> str | None:
        """Return what is wrong with a row's prompt, in words, or None."""
        problem = _check_row(row, self.column)
        if problem is None:
            kind = "text" if isinstance(row[self.column], str) else "messages"
            self._first = self._first or (kind, number)
            if kind != self._first[0]:
                problem = f"`{self.column}` is {kind}, and in row {self._first[1]} it is {self._first[0]}"
            elif self.column == "messages" and not self._has_structure:
                key = _structure_of(row["messages"][-1])
                self._has_structure = key is not None and not self._is_stream
                if key and self._is_stream:
                    problem = f"its answer has {key!r}, and the stream's first row has none, which sets the types"
        return problem and f"row {number}: {problem}"

    def prepared(self, row: Mapping[str, Any]) -> Row:
        """Return the columns that a row without a problem gets; `row` is without NaN."""
        value = row[self.column]
        if isinstance(value, str):
            return {"prompt": value}
        turns = [_normalise_message(message) for message in value]
        if self.column == "prompt":
            return {"prompt": self._open(turns)}
        answer = turns.pop() if turns[-1]["role"] == "assistant" else None
        completion = answer and ([answer] if self._has_structure else answer["content"])
        return {"prompt": self._open(turns), "completion": completion}

    def apply(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """Return the dataset with prepared rows; those of a stream are checked as they are read."""
        features = self._stored = self._features(dataset.features)
        gone = ["messages"] if self.column == "messages" else None
        if isinstance(dataset, IterableDataset):
            return dataset.map(self._prepare_checked, with_indices=True, features=features, remove_columns=gone)
        # A cache made by another version of this file would be found by name.
        return dataset.map(self._prepare, features=features, remove_columns=gone, load_from_cache_file=False)

    def _prepare(self, row: Row) -> Row:
        row = without_nan(row)
        kept = {column: value for column, value in row.items() if column != "messages"}
        return as_stored({**kept, **self.prepared(row)}, self._stored)

    def _prepare_checked(self, row: Row, number: int) -> Row:
        problem = self.find_problem(without_nan(row), number)
        if problem:
            raise self.error([problem], 1)
        return self._prepare(row)

    def _open(self, turns: list[Row]) -> list[Row]:
        """Put the system turn before turns that have none."""
        if self._system_prompt is None or any(turn["role"] == "system" for turn in turns):
            return turns
        return [{"role": "system", "content": self._system_prompt}, *turns]

    def error(self, problems: list[str], count: int) -> DataError:
        """Return the error for `count` rows with a problem, of which the first few are given."""
        more = [f"... and {count - len(problems)} more"] if count > len(problems) else []
        return DataError(
            f"the {self.name} dataset has {count} row{'s' * (count > 1)} without a usable prompt "
            "(the first is row 0):\n  " + "\n  ".join(problems + more) + "\n"
            "Every row must ask something, all in one form, for the student to have something to answer. "
            "Fix these rows, or drop them with dataset.filter(...)."
        )

    def _features(self, before: Features | None) -> Features | None:
        """Return the features of prepared rows; messages become Json, as Arrow structs would get the Nones back."""
        if before is None:
            return None
        after = {column: feature for column, feature in before.items() if column != "messages"}
        if self.column == "messages":
            completion = List(Json()) if self._has_structure else Value("string")
            after |= {"prompt": List(Json()), "completion": completion}
        elif self._system_prompt is not None or not isinstance(before["prompt"], Value | Json):
            after["prompt"] = List(Json())
        return Features(after)


def _check_row(row: Mapping[str, Any], column: str) -> str | None:
    """Return what keeps a row from being answered, in words, or None."""
    if not _IMAGE_COLUMNS.isdisjoint(row):
        return f"it has images: {_NO_IMAGES}"
    value = row.get(column)
    if value is None:
        return f"`{column}` is None"
    if not isinstance(value, list if column == "messages" else str | list):
        return f"`{column}` is a {type(value).__name__}, neither text nor a list of messages"
    if is_empty(value):
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
    if isinstance(message, int):
        return f"is {message}: opsd renders prompts for student and teacher, and reads texts or messages, not token ids"
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
        return {key: _without_none(item) for key, item in value.items() if not is_missing(item)}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
