"""When are two questions the same? Splits must not share any, and two runs must share all.

Two rows ask the same if the user's turns read the same, whatever their case, spacing and punctuation at the end, and
whatever system turn stands above them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset

from opsd.contexts.messages import turns_of
from opsd.data.values import text_of
from opsd.errors import DataError

SHOWN = 3  # questions that a message quotes


def question_of(row: Mapping[str, Any]) -> str:
    """Return what a prepared row asks, as it is told apart from others."""
    asked = [text_of(turn) for turn in turns_of(row["prompt"]) if turn["role"] == "user"]
    text = re.sub(r"\s+", " ", unicodedata.normalize("NFKC", " ".join(asked))).strip().casefold()
    return re.sub(r" (?=[?!.,;:])", "", text).rstrip("?!.,;: ")


def check_disjoint(splits: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    """Refuse splits that share a question.

    Args:
        splits: prepared rows by the name of their split, the training rows first.

    Raises:
        DataError: some do; the message counts and quotes them for every two splits.
    """
    asked = {name: dict.fromkeys(map(question_of, rows)) for name, rows in splits.items()}
    names, found = list(asked), []
    for number, one in enumerate(names):
        for other in names[number + 1 :]:
            shared = [question for question in asked[other] if question in asked[one]]
            if shared:
                found.append(
                    f"  {len(shared)} of the {len(asked[other])} questions of {other!r} are also in {one!r}"
                    f"{name_few(shared)}"
                )
    if found:
        raise DataError(
            "splits share questions:\n" + "\n".join(found) + "\nA model that was trained, or chosen, on a question "
            "shows what it remembers there, and not what it can do. Take them out of one side."
        )


def check_held_out(train: Any, evaluated: Any) -> None:
    """Refuse training rows among those that a run evaluates on, by name or alone; a stream is not looked through.

    Raises:
        DataError: some questions are in both.
    """
    named = evaluated if isinstance(evaluated, dict) else {"eval": evaluated}
    for name, rows in named.items():
        if isinstance(train, Dataset) and isinstance(rows, Dataset):
            check_disjoint({"train": train, name: rows})


def name_few(questions: Sequence[str]) -> str:
    """Return the first of some questions, for a message: " (such as '…', …)", or nothing."""
    if not questions:
        return ""
    few = ", ".join(repr(question if len(question) <= 80 else f"{question[:79]}…") for question in questions[:SHOWN])
    return f" (such as {few})"
