"""What a report lacks: parts that cannot be read or shown, in words. A page goes without them, and says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from opsd.errors import OPSDError

Part = TypeVar("Part")
# What a damaged file raises in whatever reads it.
DAMAGE = (OPSDError, OSError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError)


class Missing:
    """Collects what is missing.

    >>> missing = Missing()
    >>> missing.tried("the log", lambda: read_log(folder), [])
    []
    >>> missing.found
    ['the log: …']

    Args:
        found: what is known to be missing.
    """

    def __init__(self, found: Sequence[str] = ()):
        self.found = list(found)

    def tried(self, name: str, make: Callable[[], Part], otherwise: Part) -> Part:
        """Return a part, or what stands for it where the run's files are damaged."""
        try:
            return make()
        except DAMAGE as error:
            self.found.append(f"{name}: {_reason(error)}")
            return otherwise


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"the run's files have no {error}"
    if isinstance(error, OPSDError):
        return " ".join(str(error).split())
    return f"the run's files are damaged ({type(error).__name__}: {' '.join(str(error).split())})"
