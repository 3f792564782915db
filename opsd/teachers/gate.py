"""Decides from logged metrics whether a snapshot may be renewed, so that a resumed run decides alike.

Knows names and numbers of a log; nothing of teachers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan
from statistics import fmean
from typing import Any

from opsd.errors import ConfigError, not_one_of
from opsd.settings import as_number

BETTER = ("higher", "lower")

Log = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Gate:
    """Conditions on logged metrics, as means over a window of steps, for renewing a snapshot.

    A gate keeps a student that gets worse from becoming the teacher (CGTR, arXiv 2606.03532: refresh only on a gain and
    a safe length).

    Args:
        metric: a metric that must not have got worse since the last renewal: `reward`, `eval_loss`, …; None for none.
        better: whether "higher" or "lower" is better; None takes lower for losses and divergences, higher otherwise.
        tolerance: by how much it may be worse, in the metric's unit.
        bounds: metric -> (lowest, highest) as multiples of its value in the first window of the run, such as
            {"completions/mean_length": (0.7, 1.5), "entropy": (0.5, 2.0)}; for a negative value the other way round.

    Raises:
        ConfigError: conditions that cannot work.

    Example:
        >>> SnapshotTeacher(50, gate=Gate("reward", tolerance=0.02, bounds={"entropy": (0.5, 2.0)}))
    """

    metric: str | None = None
    better: str | None = None
    tolerance: float = 0.0
    bounds: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.better is None:
            is_loss = (self.metric or "").split("/")[0].endswith(("loss", "divergence"))
            object.__setattr__(self, "better", "lower" if is_loss else "higher")
        if self.better not in BETTER:
            raise ConfigError(not_one_of("better", str(self.better), BETTER))
        if as_number("a gate's tolerance", self.tolerance) < 0:
            raise ConfigError(f"a gate's tolerance must not be negative, and is {self.tolerance}.")
        if not isinstance(self.bounds, Mapping):
            raise ConfigError(f"a gate's bounds are {{metric: [lowest, highest]}}, and not {self.bounds!r}.")
        if not self.watches:
            raise ConfigError(
                "a gate has neither metric nor bounds, so it would let everything through. Name a metric, bounds, or "
                "leave the gate out."
            )
        for name, pair in self.bounds.items():
            numbers = [as_number(f"the gate's bounds of {name!r}", end) for end in pair] if _is_pair(pair) else []
            if len(numbers) != 2 or not 0 <= numbers[0] < numbers[1]:
                raise ConfigError(
                    f"the gate's bounds of {name!r} are {pair!r}. They are two multiples of the metric's first value, "
                    "lowest and highest: [0.7, 1.5]."
                )

    @property
    def watches(self) -> frozenset[str]:
        """The metrics that it reads."""
        return frozenset([*self.bounds, *([self.metric] if self.metric else [])])

    def problem(self, log: Log, first: range, last: range, now: range) -> str | None:
        """Return why the teacher may not be renewed, or None.

        Args:
            log: a run's entries, each with its `step`.
            first: the steps of the run's first window.
            last: the steps of the window before the last renewal; empty before the first.
            now: the steps of the window that has just ended.
        """
        for name, (low, high) in self.bounds.items():
            value, start = mean(log, name, now), mean(log, name, first)
            if value is None or start is None:
                return _missing(name, now if value is None else first)
            if start == 0:
                return f"{name} began with 0, of which there are no multiples"
            if not min(low * start, high * start) <= value <= max(low * start, high * start):
                share = f"{value / start:.2f} times the {start:.4g} it began with"
                return f"{name} was {value:.4g}, {share} (allowed: {low:g} to {high:g})"
        if self.metric is None:
            return None
        value = mean(log, self.metric, now)
        if value is None:
            return _missing(self.metric, now)
        before = mean(log, self.metric, last)
        if before is None:
            return None
        worse = before - value if self.better == "higher" else value - before
        if worse > self.tolerance:
            return f"{self.metric} went from {before:.4g} to {value:.4g} ({self.better} is better)"
        return None

    def describe(self) -> str:
        """Return the conditions in words."""
        conditions = [
            f"{name} stays within {low:g} to {high:g} times its start" for name, (low, high) in self.bounds.items()
        ]
        if self.metric:
            by = f" by more than {self.tolerance:g}" if self.tolerance else ""
            conditions.insert(0, f"{self.metric} does not {'fall' if self.better == 'higher' else 'rise'}{by}")
        return " and ".join(conditions)


def mean(log: Log, name: str, steps: range) -> float | None:
    """Return the mean of a metric's entries at these steps, or None if there are none.

    Entries are weighted by the steps since the entry before: a run that was stopped logged once more, and must decide
    alike. An entry that covers no steps (an evaluation before step 1) counts where there are no others; NaN never does.
    """
    values, shares, before = [], [], 0
    for entry in log:
        if entry.get(name) is None:
            continue
        if entry["step"] in steps and not isnan(entry[name]):
            values.append(entry[name])
            shares.append(entry["step"] - before)
        before = entry["step"]
    return fmean(values, shares if any(shares) else None) if values else None


def _missing(name: str, steps: range) -> str:
    return f"nothing was logged for {name} in steps {steps.start} to {steps.stop - 1}"


def _is_pair(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
