"""Reads single values of a row: a nested value by its path, whether it is empty, a message's text.

Imports neither datasets nor transformers, because the child process that tries an untrusted template imports this file
and has 512 MB of address space. The names of derived columns stand here for the same reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sized
from typing import Any

from opsd.errors import DataError

# Keys under which an assistant's turn has its thinking, apart from its text.
REASONING = ("reasoning_content", "reasoning", "thinking")
# Columns that prepare.py makes for controls: a near miss of `answer`, and the X of another row under "other_X".
WRONG, OTHER = "wrong_answer", "other_"


def at_path(values: Mapping[str, Any], path: str) -> Any:
    """Return the value at a dotted path such as "reward_model.ground_truth", or None; a plain name comes first.

    Example:
        >>> at_path({"reward_model": {"ground_truth": "19"}}, "reward_model.ground_truth")
        '19'
    """
    if path in values:
        return values[path]
    head, dot, rest = path.partition(".")
    inner = values.get(head) if dot else None
    if isinstance(inner, str) and re.match(r"\s*\{", inner):  # some files hold nested columns as JSON
        try:
            inner = json.loads(inner)
        except ValueError:
            return None
    return at_path(inner, rest) if isinstance(inner, Mapping) else None


def is_missing(value: Any) -> bool:
    """Return whether a value is None or NaN, which is how pandas and Arrow write that there is none.

    Example:
        >>> is_missing(float("nan")), is_missing(""), is_missing(0)
        (True, False, False)
    """
    if value is None or isinstance(value, str | Sized):
        return value is None
    try:
        return bool(value != value)  # NaN of any type, and NaT
    except TypeError:  # pandas.NA, which is neither equal to itself nor not
        return True


def is_empty(value: Any) -> bool:
    """Return whether a value is None, NaN, a blank string, or a container that is empty or holds empty values only."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, Mapping):
        return all(map(is_empty, value.values()))
    if isinstance(value, list | tuple):
        return all(map(is_empty, value))
    return is_missing(value) or (isinstance(value, Sized) and len(value) == 0)


def without_nan(value: Any) -> Any:
    """Return a value with None in place of NaN, at every depth; the value itself where it has none.

    Example:
        >>> without_nan({"steps": ["Add 8.", float("nan")]})
        {'steps': ['Add 8.', None]}
    """
    if isinstance(value, Mapping):
        changed: Any = {key: without_nan(item) for key, item in value.items()}
        return changed if any(changed[key] is not item for key, item in value.items()) else value
    if isinstance(value, list | tuple):
        changed = [without_nan(item) for item in value]
        return changed if any(new is not old for new, old in zip(changed, value, strict=True)) else value
    return None if is_missing(value) else value


def text_of(message: Mapping[str, Any]) -> str:
    """Return the text of a chat message; "" where it only calls a tool.

    Raises:
        DataError: its content is neither text nor a list of text parts.
    """
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(map(_is_text_part, content)):
        return "".join(part["text"] for part in content)
    raise DataError(
        f"a message's content is text or a list of text parts, and this one is {content!r:.80}.\n"
        "Version 1 of opsd trains on text only.\nDrop rows with images, audio or video."
    )


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)
