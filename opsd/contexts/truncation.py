"""Shortens a text at a boundary, with an ellipsis in the gap.

Knows text, lists of text and, for tokens, a tokenizer; nothing of templates, prompts or limits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from opsd.errors import ConfigError, not_one_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Side = Literal["head", "tail", "middle"]
Boundary = Literal["line", "sentence", "token"]  # from coarse to fine
Spans: TypeAlias = list[tuple[int, int]]

ELLIPSIS = "…"
_GAPS = {"line": f"\n{ELLIPSIS}\n", "sentence": f" {ELLIPSIS} ", "token": f" {ELLIPSIS} "}
_LINE = re.compile(r"[^\n]*\S[^\n]*")
# A sentence ends after . ! ? … and closing quotes, where blank space follows; after 。！？ always; or with its line.
_SENTENCE = re.compile(r"\S(?:.*?(?:[.!?…][\"')\]]*(?=\s)|[。！？])|.*)")
CHARACTERS_PER_TOKEN = 4  # without a tokenizer: English prose in most vocabularies


def check_cut(side: str, at: str) -> None:
    """Check the settings truncate_side and truncate_at.

    Raises:
        ConfigError: one has an unknown value.
    """
    for name, value, known in (("truncate_side", side, get_args(Side)), ("truncate_at", at, get_args(Boundary))):
        if value not in known:
            raise ConfigError(not_one_of(name, value, known))


def cuts(
    value: Any, side: Side, at: Boundary, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[tuple[int, Callable[[int], Any]]]:
    """Yield ways to shorten a value: at the boundary that was asked for, then at finer ones.

    Args:
        value: text, or a list of texts, whose items are its pieces. Yields nothing for any other value.
        side: which part is cut away: the head, the tail or the middle.
        at: the boundary.
        tokenizer: splits text into tokens; None takes four characters for a token.

    Yields:
        The number of pieces, and a function that returns the value with a given number of them.
    """
    if isinstance(value, str) and value.strip():
        grains = get_args(Boundary)
        for grain in grains[grains.index(at) :]:
            spans = _spans(value, grain, tokenizer)
            yield len(spans), partial(_text_of, value, spans, side, _GAPS[grain])
    elif isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        yield len(value), partial(_items_of, value, side)


def longest_that_fits(
    value: Any, side: Side, at: Boundary, tokenizer: PreTrainedTokenizerBase | None, fits: Callable[[Any], bool]
) -> Any:
    """Return the value with as many pieces as fit and at least one; None where not even one fits.

    Args:
        value: text, or a list of texts.
        side: which part is cut away.
        at: the boundary; a finer one is taken where not one piece fits.
        tokenizer: splits text into tokens; None takes four characters for a token.
        fits: returns whether a shortened value is short enough.

    Example:
        >>> longest_that_fits("Add 8. Then take 1 away.", "tail", "sentence", None, lambda text: len(text) < 12)
        'Add 8. …'
    """
    for pieces, shortened in cuts(value, side, at, tokenizer):
        best, kept, exceeds = None, 0, pieces
        while exceeds - kept > 1:
            count = (kept + exceeds) // 2
            short = shortened(count)
            if fits(short):
                best, kept = short, count
            else:
                exceeds = count
        if best is not None:
            return best
    return None


def first_share(text: str, share: float, at: Boundary, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Return the first `share` of a text by tokens, ended at the last boundary within it; at least one piece.

    Args:
        text: the text.
        share: in (0, 1]; 1 returns the whole text.
        at: the boundary; a finer one is taken where not one piece lies within the share.
        tokenizer: splits text into tokens; None takes four characters for a token.
    """
    tokens = _spans(text, "token", tokenizer)
    if share >= 1 or not tokens:
        return text
    end = tokens[max(1, int(share * len(tokens))) - 1][1]
    grains = get_args(Boundary)
    for grain in grains[grains.index(at) :]:
        within = [span for span in _spans(text, grain, tokenizer) if span[1] <= end]
        if within:
            return text[: within[-1][1]].rstrip() + _GAPS[grain].rstrip()
    raise AssertionError("the first token lies within the share")


def _spans(text: str, grain: str, tokenizer: PreTrainedTokenizerBase | None) -> Spans:
    """Return the position of each piece in the text. Cutting the text, not its ids, keeps every character whole."""
    if grain == "line":
        return [match.span() for match in _LINE.finditer(text)]
    if grain == "sentence":
        return [match.span() for match in _SENTENCE.finditer(text)]
    if tokenizer is None:
        return [(at, min(at + CHARACTERS_PER_TOKEN, len(text))) for at in range(0, len(text), CHARACTERS_PER_TOKEN)]
    if not tokenizer.is_fast:  # slow tokenizers give no positions; characters are the next finer piece
        return [(at, at + 1) for at in range(len(text))]
    return tokenizer(text=text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]


def _kept(count: int, side: Side) -> tuple[int, int]:
    """Return how many pieces are kept at the beginning and at the end."""
    return {"tail": (count, 0), "head": (0, count), "middle": (count - count // 2, count // 2)}[side]


def _text_of(text: str, spans: Spans, side: Side, gap: str, count: int) -> str:
    if count >= len(spans):
        return text
    first, last = _kept(count, side)
    start = text[: spans[first - 1][1]] if first else ""
    end = text[spans[-last][0] :] if last else ""
    return (start.rstrip() + gap + end.lstrip()).strip()


def _items_of(items: list[str], side: Side, count: int) -> list[str]:
    if count >= len(items):
        return items
    first, last = _kept(count, side)
    return [*items[:first], ELLIPSIS, *(items[-last:] if last else [])]
