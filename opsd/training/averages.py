"""How the values of several batches become one number of a log entry.

TRL and transformers average the values of batches as they are, also where one batch has fewer rows or tokens than
another. Knows names and numbers; nothing of losses or rollouts. A function that takes values of this process only is a
collective: all processes call it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

from accelerate.utils import gather_object

LENGTHS, CUT = "completions/", "completions/clipped_ratio"


class BatchSizes:
    """The number of rows or tokens behind each value since the last log entry.

    Rows of a step are equally many in all steps, and the loss weighs its own values, so training adds none; batches
    of an evaluation are uneven.

    Example:
        >>> sizes, metrics = BatchSizes(), {"divergence": [1.0, 4.0]}
        >>> sizes.add(["divergence"], 20)
        >>> sizes.add(["divergence"], 10)
        >>> sizes.reduce(metrics)
        >>> metrics
        {'divergence': [2.0]}
    """

    def __init__(self) -> None:
        self.rows: list[float] = []  # of each batch; they weigh the values that TRL adds
        self._sizes: dict[str, list[float]] = defaultdict(list)

    def add(self, names: Iterable[str], size: float) -> None:
        """Take the size of the batch whose values were just added under these names."""
        for name in names:
            self._sizes[name].append(size)

    def mean(self, name: str, values: Sequence[float]) -> float:
        """Return the mean of a metric's values over all rows or tokens."""
        return weighted_mean(values, self._sizes[name])

    def reduce(self, metrics: dict[str, list[float]]) -> None:
        """Replace the values of each metric by their extreme, or by their mean over all rows or tokens; begin anew."""
        ended = [1.0 - share for share in metrics.get(CUT, ())]
        if len(self.rows) == len(ended):
            ended = [rows * share for rows, share in zip(self.rows, ended, strict=True)]
        for name, values in metrics.items():
            # TRL writes 0 for a batch in which no completion ended.
            of_ended = name.startswith(LENGTHS) and "terminated" in name
            sizes = ended if of_ended else self._sizes.get(name) or self.rows
            known = [value for value, size in zip(values, sizes, strict=False) if size] if of_ended else values
            if "/max" in name or "/min" in name:
                metrics[name] = [(max if "/max" in name else min)(known, default=0.0)]
            elif len(sizes) == len(values):
                metrics[name] = [weighted_mean(values, sizes)]
        self.rows.clear()
        self._sizes.clear()


def weighted_mean(values: Sequence[float], sizes: Sequence[float]) -> float:
    """Return Σ size·value / Σ size; 0 where there is nothing to average."""
    total = sum(sizes)
    return sum(value * size for value, size in zip(values, sizes, strict=True)) / total if total else 0.0


def mean_over_processes(values: dict[str, float]) -> dict[str, float]:
    """Return the mean of each value over the processes that know it; a collective."""
    processes: list[dict[str, float]] = gather_object([values])
    names = dict.fromkeys(name for process in processes for name in process)
    known = {name: [each[name] for each in processes if not math.isnan(each.get(name, math.nan))] for name in names}
    return {name: sum(numbers) / len(numbers) for name, numbers in known.items() if numbers}
