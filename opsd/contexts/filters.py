"""Writes a field's value as text, and the filters for templates.

Knows values; nothing of rows, blocks or tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from opsd.contexts.messages import Conversation, is_conversation
from opsd.data.values import is_missing

_BOXED = "\\boxed{"


def as_text(value: Any) -> str:
    r"""Return a value as a template prints it.

    Text and numbers are printed as they are, a conversation as its `text`, a list with one item per line, a mapping as
    JSON.

    Raises:
        ValueError: messages whose text is not known; None or NaN, also within a list.

    Example:
        >>> as_text(["Add 8.", "Take 1 away."])
        'Add 8.\nTake 1 away.'
    """
    if isinstance(value, str):
        return value
    if isinstance(value, Conversation) and value.text is not None:
        return value.text
    if is_conversation(value):
        problem = getattr(value, "problem", "these are some turns of a conversation")
        raise ValueError(
            f"{problem}; write the turns in a loop: {{% for turn in … %}}{{{{ turn.role }}}}: {{{{ turn.content }}}}"
            "{% endfor %}"
        )
    if is_missing(value):
        raise ValueError(f"a value to be printed is {value}; ask for it first: {{% if value %}} … {{% endif %}}")
    if isinstance(value, list | tuple):
        return "\n".join(map(as_text, value))
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, Mapping) else str(value)


def strip_thinking(value: Any) -> str:
    """Filter: the text without its thinking, which ends at the last `</think>` or begins at an open `<think>`.

    Example:
        >>> strip_thinking("<think>18?</think> It is 19.")
        'It is 19.'
    """
    return as_text(value).rpartition("</think>")[2].partition("<think>")[0].strip()


def last_boxed(value: Any) -> str:
    r"""Filter: the content of the text's last whole `\boxed{…}`.

    Raises:
        ValueError: there is none.

    Example:
        >>> last_boxed(r"So \boxed{\frac{a}{b}}.")
        '\\frac{a}{b}'
    """
    text = as_text(value)
    begin = text.rfind(_BOXED)
    depth, start = 1, begin + len(_BOXED)
    for end in range(start, len(text) if begin >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end].strip()
    raise ValueError("last_boxed finds no whole \\boxed{…} in this text")


def number_lines(value: Any) -> str:
    r"""Filter: the text's lines that are not blank, numbered from 1.

    Example:
        >>> number_lines("add\n\ncarry")
        '1. add\n2. carry'
    """
    lines = [line for line in as_text(value).splitlines() if line.strip()]
    return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1))


FILTERS: dict[str, Callable[..., str]] = {
    "strip_thinking": strip_thinking,
    "last_boxed": last_boxed,
    "number_lines": number_lines,
}
