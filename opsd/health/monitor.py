"""The base of monitors, what they return, and the values that they look at.

Knows numbers by name; nothing of runs or files.
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

from opsd.health.thresholds import THRESHOLDS, Threshold

Level = Literal["fine", "watch", "act"]
LEVELS: tuple[Level, ...] = ("fine", "watch", "act")
WINDOW = 3  # log entries whose mean is "now"
START = 3  # log entries whose mean is "at the start"


@dataclass(frozen=True)
class Verdict:
    """What a monitor says of a run at a step.

    >>> Verdict("watch", "rollouts have 12 tokens, and had 18 at the start", "Look at samples (log_completions).")

    Args:
        level: fine, watch (something is changing), or act (what was trained is being lost, or nothing is learned).
        saw: what was seen, with its numbers; "" where all is fine.
        do: what to try.
        figures: numbers behind `saw`, by name.
    """

    level: Level = "fine"
    saw: str = ""
    do: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)


FINE = Verdict()


class Values:
    """Values by name over the log entries of a run.

    >>> values = Values()
    >>> values.add(10, {"length": 18.0})
    >>> values.now("length"), values.start("length")
    (18.0, 18.0)
    """

    def __init__(self) -> None:
        self._series: dict[str, list[float]] = {}
        self.step = 0

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Add the numbers of a log entry; NaN and what is no number are left out."""
        self.step = step
        for name, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                self._series.setdefault(name, []).append(float(value))

    def __contains__(self, name: str) -> bool:
        return name in self._series

    def count(self, name: str) -> int:
        """Return the number of entries that had it."""
        return len(self._series.get(name, ()))

    def now(self, name: str) -> float:
        """Return the mean of the last entries that had it."""
        return fmean(self._series[name][-WINDOW:])

    def start(self, name: str) -> float:
        """Return the mean of the first entries that had it."""
        return fmean(self._series[name][:START])

    def all(self, name: str) -> list[float]:
        """Return every value."""
        return self._series.get(name, [])

    def has_start(self, name: str) -> bool:
        """Whether "now" no longer overlaps "at the start"."""
        return self.count(name) >= START + WINDOW

    def is_settled(self, name: str) -> bool:
        """Whether "now" is a mean over as many entries as it can be."""
        return self.count(name) >= WINDOW


class Monitor(ABC):
    """Looks at one way in which runs fail.

    Example:
        >>> class Longer(Monitor):
        ...     name, needs = "longer", ("length",)
        ...
        ...     def judge(self, values):
        ...         return Verdict("watch", "rollouts grow", "") if values.now("length") > 500 else FINE
    """

    name: str
    needs: tuple[str, ...]  # values without which it says nothing

    @abstractmethod
    def judge(self, values: Values) -> Verdict:
        """Return what it says; called after each log entry that leaves none of `needs` unknown."""

    @property
    def threshold(self) -> Threshold:
        """Its row of the table of thresholds."""
        return THRESHOLDS[self.name]

    def level_of(self, value: float) -> Level:
        """Return the level of a value, by the thresholds: where act lies below watch, a small value is the bad one."""
        limits = self.threshold
        reaches = operator.ge if limits.act >= limits.watch else operator.le
        return "act" if reaches(value, limits.act) else "watch" if reaches(value, limits.watch) else "fine"

    @staticmethod
    def unless_better(level: Level, values: Values) -> Level:
        """Return watch in place of act where held-out accuracy rises: what a student loses then, it does without."""
        looks = values.all("eval_accuracy")
        return "watch" if level == "act" and looks and looks[-1] > looks[0] else level

    @staticmethod
    def share_of_start(values: Values, name: str) -> float | None:
        """Return a value now over that at the start; None where the two overlap, or the start is 0."""
        if not values.has_start(name) or not values.start(name):
            return None
        return values.now(name) / values.start(name)
