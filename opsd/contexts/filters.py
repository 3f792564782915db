"""What a column may hold and how it reads in a template: text, numbers, lists, messages; and the filters for it.

A list of messages is written by the tokenizer's own chat template, never as Python would print it. Filters that need a
tokenizer find it in a context variable, so that no template can reach it. Knows values; nothing of rows or blocks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from opsd.contexts.renderer import PromptRenderer
from opsd.contexts.truncation import Boundary, Side, count_tokens, first_share, longest_that_fits

_SIDE: ContextVar[PromptRenderer | None] = ContextVar("side", default=None)
_BOXED = "\\boxed{"


@contextmanager
def read_by(side: PromptRenderer | None) -> Iterator[None]:
    """Let filters and messages use a side's tokenizer for the length of the block."""
    token = _SIDE.set(side)
    try:
        yield
    finally:
        _SIDE.reset(token)


def as_text(value: Any) -> str:
    """Return a value as a template shows it.

    Text and numbers are themselves; a list of messages is written by the tokenizer's chat template; another list has
    one item per line; a mapping is JSON.

    Raises:
        ValueError: messages, and no chat template to write them.
    """
    if isinstance(value, str):
        return value
    if _are_messages(value):
        side = _SIDE.get()
        if side is None:  # nobody's tokenizer: as much as can be known, for checks
            return "\n\n".join(f"[{turn['role']}]\n{turn.get('content') or ''}" for turn in value)
        if side.chat_template is None and side.tokenizer.chat_template is None:
            raise ValueError(
                "this field holds messages, and the tokenizer has no chat template to write them; say how: "
                "{% for turn in … %}{{ turn.role }}: {{ turn.content }}{% endfor %}"
            )
        return side.transcript([dict(turn) for turn in value]).strip()
    if isinstance(value, list | tuple):
        return "\n".join(map(as_text, value))
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, Mapping) else str(value)


def truncate_tokens(value: Any, count: int, side: Side = "tail", at: Boundary = "token") -> str:
    """Filter: `count` tokens of the text at most, cut at a boundary, with an ellipsis in the gap."""
    text, reader = as_text(value), _SIDE.get()
    tokenizer = reader.tokenizer if reader else None
    if count_tokens(text, tokenizer) <= count:
        return text
    short = longest_that_fits(text, side, at, tokenizer, lambda cut: count_tokens(cut, tokenizer) <= count)
    if short is None:
        raise ValueError(f"truncate_tokens({count}) leaves nothing of this text; allow more tokens")
    return short


def reveal(value: Any, share: float, at: Boundary = "token") -> str:
    """Filter: the first `share` of the text by tokens, in (0, 1], ending at a boundary."""
    if not 0 < share <= 1:
        raise ValueError(f"reveal takes a share above 0 and up to 1, not {share!r}")
    reader = _SIDE.get()
    return first_share(as_text(value), share, at, reader.tokenizer if reader else None)


def strip_thinking(value: Any) -> str:
    """Filter: the text without what was thought: up to the last `</think>`, and from a `<think>` that is left open."""
    return as_text(value).rpartition("</think>")[2].partition("<think>")[0].strip()


def last_boxed(value: Any) -> str:
    """Filter: what stands in the text's last `\\boxed{…}`, braces within it and all."""
    text = as_text(value)
    begin = text.rfind(_BOXED)
    depth, start = 1, begin + len(_BOXED)
    for end in range(start, len(text) if begin >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end].strip()
    raise ValueError("last_boxed finds no whole \\boxed{…} in this text")


def number_lines(value: Any) -> str:
    """Filter: the text's lines that are not blank, numbered from 1."""
    lines = [line for line in as_text(value).splitlines() if line.strip()]
    return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1))


FILTERS: dict[str, Callable[..., str]] = {
    "truncate_tokens": truncate_tokens,
    "reveal": reveal,
    "strip_thinking": strip_thinking,
    "last_boxed": last_boxed,
    "number_lines": number_lines,
}


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(_is_message, value))


def _is_message(turn: Any) -> bool:
    return isinstance(turn, Mapping) and "role" in turn and ("content" in turn or "tool_calls" in turn)
