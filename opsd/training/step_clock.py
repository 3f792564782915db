"""Where a step's time goes, and the memory it takes; of this process, as its host sees it.

A GPU works on behind its host: what the host waits for later is counted there. Knows names and seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from opsd.training.averages import Tally

GIBIBYTE = 2**30


class StepClock:
    """Adds up the seconds of parts of a step.

    >>> clock = StepClock()
    >>> with clock.part("seconds/rollouts"): ...
    >>> clock.tallies(torch.device("cpu"))  # since the last call
    {'seconds/rollouts': …, 'memory_gib': …}
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the seconds of a block."""
        begin = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begin

    def forget(self) -> None:
        """Begin anew, as after a step that broke off or an evaluation."""
        self._seconds = {}

    def tallies(self, device: torch.device) -> dict[str, Tally]:
        """Return the seconds of each part of a step and the most memory so far, and begin anew."""
        tallies = {name: Tally(seconds, 1) for name, seconds in self._seconds.items()}
        self.forget()
        used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
        return tallies | {"memory_gib": Tally(used / GIBIBYTE, 1, "max")}
