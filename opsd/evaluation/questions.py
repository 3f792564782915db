"""Decides which questions are the same: splits must share none, and two runs must share all.

Two rows ask the same question if their user turns are equal, ignoring case, spacing, punctuation at the end, and the
system turn.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from opsd.contexts.messages import turns_of
from opsd.data.values import text_of
from opsd.errors import DataError

QUOTED = 3  # questions in a message


def question_of(row: Mapping[str, Any]) -> str:
    """Return the question of a prepared row in a normalised form: equal for rows that ask the same.

    Example:
        >>> question_of({"prompt": "What is  2 + 2 ?"})
        'what is 2 + 2'
    """
    asked = [text_of(turn) for turn in turns_of(row["prompt"]) if turn["role"] == "user"]
    text = re.sub(r"\s+", " ", unicodedata.normalize("NFKC", " ".join(asked))).strip().casefold()
    return re.sub(r" (?=[?!.,;:])", "", text).rstrip("?!.,;: ")


def check_disjoint(splits: Mapping[str, Iterable[str]]) -> None:
    """Refuse splits that share a question.

    Args:
        splits: questions (`question_of` each row) by the name of their split, those of training first.

    Raises:
        DataError: some do; the message counts and quotes them for each pair of splits.
    """
    questions = {name: dict.fromkeys(asked) for name, asked in splits.items()}
    overlaps = []
    for first, second in itertools.combinations(questions, 2):
        shared = [question for question in questions[second] if question in questions[first]]
        if shared:
            count = f"{len(shared)} of the {len(questions[second])} questions of {second!r}"
            overlaps.append(f"  {count} are also in {first!r}{name_few(shared)}")
    if overlaps:
        raise DataError(
            "splits share questions:\n" + "\n".join(overlaps) + "\nOn questions that were used for training, or for "
            "choosing a checkpoint, an accuracy measures memory. Remove them from one of the splits."
        )


def name_few(questions: Sequence[str]) -> str:
    """Return the first few questions for a message, " (such as '…', …)", or an empty text."""
    if not questions:
        return ""
    few = ", ".join(repr(question if len(question) <= 80 else f"{question[:79]}…") for question in questions[:QUOTED])
    return f" (such as {few})"
