"""A model's text, made fit to be shown: in a terminal and on a page."""

from __future__ import annotations

import unicodedata

JOINERS = "\t\u200c\u200d"  # a tab, and what joins letters and emoji


def printable(text: str, keep: str = "") -> str:
    r"""Return a model's text without what a terminal or a page would obey: escapes, control and bidi characters.

    Args:
        text: any text.
        keep: characters that stay as they are; a newline is otherwise shown as ⏎.

    Example:
        >>> printable("a\nb" + chr(27) + "[31m")
        'a⏎b\\x1b[31m'
    """
    if "\n" not in keep:
        text = text.replace("\n", "⏎")
    return "".join(c if _is_harmless(c) or c in keep else repr(c)[1:-1] for c in text)


def _is_harmless(character: str) -> bool:
    """Tell whether a character only shows something: spaces of all kinds do, and the joiners of letters and emoji."""
    return character.isprintable() or character in JOINERS or unicodedata.category(character) == "Zs"
