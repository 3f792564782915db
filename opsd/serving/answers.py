"""What is asked of a server and what it answers, token by token; refuses an answer that cannot be true.

Shapes: T scored tokens of a sequence · K likeliest tokens of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opsd.errors import AnswerError

ABOVE_ZERO = 1e-2  # nats: rounding may lift the log-probability of a certain token this far above 0
ABOVE_ONE = 1e-2  # by which rounding may lift the mass of a list above 1


@dataclass(frozen=True)
class Asked:
    """A sequence whose last tokens are to be scored.

    >>> Asked((5, 9, 2, 7), start=2)  # log p(2 | 5, 9) and log p(7 | 5, 9, 2)

    Args:
        ids: prompt and completion.
        start: place of the first token that is scored, at least 1.
    """

    ids: tuple[int, ...]
    start: int

    def __post_init__(self) -> None:
        assert 1 <= self.start <= len(self.ids), "the first token of a sequence is predicted by nothing"


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Log-probabilities of scored tokens, in nats, at temperature 1.

    >>> scores.sampled_T, scores.ids_TK[0], scores.logprobs_TK[0]
    (array([-0.1, -2.3]), array([2, 40]), array([-0.1, -4.0]))

    Args:
        ids_TK: int64, the likeliest ids of each, the likeliest first.
        logprobs_TK: float32, of these.
        sampled_T: float32, of the tokens themselves.
    """

    ids_TK: np.ndarray
    logprobs_TK: np.ndarray
    sampled_T: np.ndarray

    def distance(self, other: TokenScores) -> float:
        """Return the mean size of the difference between both sides' log-probabilities of the tokens, in nats."""
        return float(np.abs(self.sampled_T - other.sampled_T).mean())


def checked(scores: TokenScores, count: int) -> TokenScores:
    """Return the scores of a sequence that can be true.

    Args:
        scores: as a protocol read them.
        count: how many likeliest tokens were asked for.

    Raises:
        AnswerError: they are not finite, not sorted, no log-probabilities, or have more than all of the mass.
    """
    values = scores.logprobs_TK
    if values.shape[1] != count:
        raise AnswerError(f"it lists {values.shape[1]} likeliest tokens, and {count} were asked for")
    for what, of_what in (("likeliest tokens", values), ("tokens themselves", scores.sampled_T)):
        if not np.isfinite(of_what).all():
            raise AnswerError(f"log-probabilities of the {what} are not finite")
        if of_what.size and of_what.max() > ABOVE_ZERO:
            raise AnswerError(f"it has a log-probability of {of_what.max():.3g}, and none is above 0")
    if (np.diff(values, axis=1) > 0).any():
        raise AnswerError("its likeliest tokens are not sorted by their log-probabilities")
    if len(values) and (mass := float(np.exp(values.astype(np.float64)).sum(1).max())) > 1 + ABOVE_ONE:
        raise AnswerError(f"its likeliest tokens have {mass:.3f} of the probability together")
    if scores.ids_TK.size and scores.ids_TK.min() < 0:
        raise AnswerError(f"it lists the token {scores.ids_TK.min()}")
    if any(len(np.unique(ids)) != count for ids in scores.ids_TK):
        raise AnswerError("it lists a token twice")
    return scores


def stacked(rows: Sequence[tuple[float, Sequence[int], Sequence[float]]], count: int) -> TokenScores:
    """Return the scores of a sequence, made from (own log-probability, likeliest ids, their log-probabilities)."""
    ids = np.array([ids for _, ids, _ in rows], dtype=np.int64).reshape(len(rows), count)
    logprobs = np.array([values for _, _, values in rows], dtype=np.float32).reshape(len(rows), count)
    return TokenScores(ids, logprobs, np.array([own for own, _, _ in rows], dtype=np.float32))
