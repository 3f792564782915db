"""Errors of one process, raised in all: the others would wait for it in the next collective until a timeout.

Knows processes only.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils import gather_object


@contextmanager
def failing_together() -> Iterator[None]:
    """Raise in every process what a block raises in any; a collective at the end of the block.

    The block itself is no collective: the process that fails would miss the rest of it. What this process raises is
    raised here; the others raise the error of the first process that has one.

    Example:
        >>> with failing_together():
        ...     if is_first_process:
        ...         write(card)  # a full disk ends all processes, with one message
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    sent: list[Exception | None] = gather_object([None if own is None else _sendable(own)])
    if own is not None:
        raise own
    for other in sent:
        if other is not None:
            raise other


def _sendable(error: Exception) -> Exception:
    """Return an error as it can reach another process: itself, or its text where its class cannot be rebuilt."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
