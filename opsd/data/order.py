"""The order of rows: a function of seed and epoch, and of nothing else.

TRL's sampler keeps one random generator alive over all epochs, so a run resumed in epoch 1 would see epoch 0's order
again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler

from opsd.errors import DataError


class EpochSampler(Sampler[int]):
    """Yields whole generation batches, each repeated once per micro-batch that it gives.

    The trainer asks for a batch per micro-batch and uses the first of an optimizer step for the whole step. A rest of
    rows that makes no whole batch waits for the next epoch's order.

    Args:
        rows: rows in the dataset.
        batch_size: rollouts of one generation batch over all processes.
        group: rollouts of one row, which stand next to each other.
        repeats: times each batch is repeated: accumulation steps, or steps_per_generation.
        shuffle: whether the order is random.
        seed: seed of the order.
        epoch: returns the epoch that begins when iteration begins.

    Raises:
        DataError: fewer rows than one batch needs.
    """

    def __init__(
        self,
        rows: int,
        *,
        batch_size: int,
        group: int = 1,
        repeats: int,
        shuffle: bool,
        seed: int,
        epoch: Callable[[], int],
    ):
        assert batch_size % group == 0, "a group never spans two batches"
        self.rows, self.group, self.repeats = rows, group, repeats
        self.rows_per_batch = batch_size // group
        if rows < self.rows_per_batch:
            raise DataError(
                f"the dataset has {rows} row(s), and one batch of rollouts takes {self.rows_per_batch} (batch per "
                "device × accumulation steps, or steps_per_generation, × processes ÷ num_generations). Without a whole "
                "batch there is no step. Lower one of these, or add rows."
            )
        self.shuffle, self.seed, self._epoch = shuffle, seed, epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self._epoch())
        order = torch.randperm(self.rows, generator=generator).tolist() if self.shuffle else range(self.rows)
        for start in range(0, self.rows - self.rows_per_batch + 1, self.rows_per_batch):
            batch = [row for row in order[start : start + self.rows_per_batch] for _ in range(self.group)]
            for _ in range(self.repeats):
                yield from batch

    def __len__(self) -> int:
        return self.rows // self.rows_per_batch * self.rows_per_batch * self.group * self.repeats
