"""Reads a row's prompt as chat turns.

Knows messages; nothing of tokenizers, templates or rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from opsd.data.values import text_of
from opsd.errors import DataError

Prompt: TypeAlias = list[dict[str, Any]] | str


def turns_of(prompt: Any) -> list[dict[str, Any]]:
    """Return a prompt as chat turns, one user turn where it is plain text; the turns are copies.

    Raises:
        DataError: the prompt is neither text nor a list of text messages.
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not all(isinstance(turn, Mapping) and "role" in turn for turn in prompt):
        raise DataError(
            f"a prompt is text, or a list of messages with role and content; this row's is {prompt!r:.80}.\n"
            "The student has nothing to answer without it.\nFill the column 'prompt', or drop the row."
        )
    for turn in prompt:
        text_of(turn)  # raises where a turn holds anything but text
    return [dict(turn) for turn in prompt]
