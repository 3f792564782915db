"""Which number format trains faster here: measured, not assumed.

On CPUs with bf16 matrix units (AMX) bfloat16 products run several times faster than float32; on CPUs without them,
hundreds of times slower. The choice is stored beside the run and reused on resume, so that a resumed run computes
with the same numbers. Knows nothing of models.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
from transformers.utils import is_torch_bf16_gpu_available

from opsd.training.checkpoints import saved

FILE = "precision.json"
# bfloat16 rounds; it must be clearly faster to be worth it, and two processes that measure must agree.
MIN_SPEEDUP = 1.5
SIZE = 256  # small enough that the slowest bfloat16 seen (0.001 TFLOP/s) answers within a fifth of a second


def _seconds(dtype: torch.dtype) -> float:
    """Return the best of three times for one square product, the first call's set-up left out."""
    a = torch.ones(SIZE, SIZE, dtype=dtype)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return min(times[1:])


def measure_bf16_speedup() -> float:
    """Return how many times faster this CPU multiplies in bfloat16 than in float32."""
    return _seconds(torch.float32) / _seconds(torch.bfloat16)


def choose_bf16(output_dir: str | os.PathLike[str] | None, use_cpu: bool) -> bool:
    """Return whether to train with bfloat16 autocast.

    Args:
        output_dir: the run's folder; a choice stored there by an earlier part of the run wins.
        use_cpu: whether the run was told to stay on the CPU.
    """
    stored = None if output_dir is None else Path(output_dir) / FILE
    # Without a checkpoint there is nothing to resume: the folder may have come from another machine.
    if stored is not None and stored.is_file() and saved(stored.parent):
        return bool(json.loads(stored.read_text())["bf16"])
    if torch.accelerator.is_available() and not use_cpu:
        return is_torch_bf16_gpu_available()
    return measure_bf16_speedup() >= MIN_SPEEDUP


def store_choice(output_dir: str | os.PathLike[str], bf16: bool) -> None:
    """Write the choice beside the run."""
    (Path(output_dir) / FILE).write_text(json.dumps({"bf16": bf16}) + "\n")
