"""Sums and extremes of what a run measures, from one log entry to the next.

Every mean that is logged is a sum over rows or tokens of all batches and all processes, divided by their number. TRL
and transformers average the means of batches, which differ in rows and tokens. Knows names and numbers; nothing of
losses or rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from accelerate.utils import gather_object

KINDS: dict[str, Callable[[Iterable[float]], float]] = {"mean": sum, "max": max, "min": min}  # kind -> of values


class Tally(NamedTuple):
    """One measured quantity of some rows or tokens.

    Args:
        value: their sum, or their largest or smallest value.
        size: how many they are; nothing is logged as 0.
        kind: a key of KINDS: mean, max or min.

    Example:
        >>> Tally.of([1.0, 2.0]).plus(Tally.of([6.0])).result
        3.0
    """

    value: float
    size: float
    kind: str = "mean"

    @classmethod
    def of(cls, values: Iterable[float], kind: str = "mean") -> Tally:
        """Return the tally of single values; NaN, which is unknown, is left out."""
        known = [float(value) for value in values if not math.isnan(value)]
        return cls(KINDS[kind](known) if known else 0.0, len(known), kind)

    def plus(self, other: Tally) -> Tally:
        """Return the tally of both."""
        if not (self.size and other.size):
            return self if self.size else other
        return Tally(KINDS[self.kind]((self.value, other.value)), self.size + other.size, self.kind)

    @property
    def result(self) -> float:
        """The mean, or the extreme."""
        return self.value / self.size if self.size and self.kind == "mean" else self.value


class Averages:
    """Tallies by name since the last log entry.

    Example:
        >>> averages, metrics = Averages(), {}
        >>> averages.add({"reward": Tally.of([1.0, 0.0])})
        >>> averages.write_into(metrics)
        >>> metrics
        {'reward': [0.5]}
    """

    def __init__(self) -> None:
        self.tallies: dict[str, Tally] = {}
        self.latest: dict[str, float] = {}  # the result of what was last added, by name; kept after a log entry

    def add(self, tallies: Mapping[str, Tally]) -> None:
        """Add what a batch, or a part of one, measured in all processes."""
        for name, tally in tallies.items():
            self.tallies[name] = self.tallies[name].plus(tally) if name in self.tallies else tally
            self.latest[name] = tally.result

    def write_into(self, metrics: dict[str, list[float]]) -> None:
        """Put the results among lists of values, as TRL's `log` reads them, and begin anew."""
        metrics.update({name: [tally.result] for name, tally in self.tallies.items()})
        self.tallies.clear()

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {name: list(tally) for name, tally in self.tallies.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        self.tallies = {name: Tally(*tally) for name, tally in state.items()}


def over_processes(tallies: Mapping[str, Tally]) -> dict[str, Tally]:
    """Return the tallies of all processes together; a collective. A process need not know every name."""
    together: dict[str, Tally] = {}
    for process in gather_object([dict(tallies)]):
        for name, tally in process.items():
            together[name] = together[name].plus(tally) if name in together else tally
    return together
