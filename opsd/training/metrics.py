"""What a micro-batch's record becomes in the log, over all processes, and when it must stop the run.

Knows records and rollouts; nothing of teachers. A function with an accelerator is a collective: all processes call it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from opsd.errors import NonFiniteLossError
from opsd.losses import LossOutput
from opsd.rollouts import Rollouts

NOT_LOGGED = frozenset({"logprob", "teacher_logprob"})  # the estimators are made of them

WAY_OUT = (
    "Nothing was updated by it, and the checkpoints are as they were. Usual causes: a learning rate that is too high, "
    "float16 without loss scaling, weights that were already broken. Lower the learning rate and resume from the last "
    "checkpoint."
)


def divergence_metrics(
    record: LossOutput, rollouts: Rollouts, accelerator: Accelerator, micro_batches: int, step: int
) -> dict[str, float]:
    """Return the mean and the largest divergence per token, the entropy, and the means of what else was recorded.

    Args:
        record: the loss of this process's micro-batch.
        rollouts: the rollouts it was computed from.
        accelerator: of the run.
        micro_batches: micro-batches of a step; their logged means are averaged, so each counts by its share of tokens.
        step: the step under way, for the message.

    Raises:
        NonFiniteLossError: NaN or infinity in any process; raised in all of them.
    """
    values_N = record.divergence_N
    bad = not bool(torch.isfinite(values_N).all() & torch.isfinite(record.loss))
    worst = values_N.max() if len(values_N) else values_N.new_zeros(())
    others = sorted(set(record.metrics) - NOT_LOGGED)
    seen = [values_N.new_tensor(len(values_N)), worst, values_N.new_tensor(float(bad)), values_N.sum()]
    seen.append(record.entropy_N.sum())
    seen += [record.metrics[name].sum() for name in others]
    count, worst, bad_somewhere, *totals = accelerator.gather(torch.stack(seen)[None]).T
    if bool(bad_somewhere.any()):
        _stop_at_rows(record, rollouts, step)
    tokens = rollouts.num_loss_tokens / micro_batches if rollouts.num_loss_tokens else float(count.sum().clamp(min=1))
    means = {
        name: float(total.sum()) / tokens
        for name, total in zip(["divergence", "entropy", *others], totals, strict=True)
    }
    seconds = {"statistics_seconds": record.statistics_seconds} if record.statistics_seconds else {}
    return {**means, "divergence/max": float(worst.max()), **seconds}


def mean_over_processes(values: dict[str, float]) -> dict[str, float]:
    """Return the mean of each value over the processes that know it; a collective."""
    everywhere: list[dict[str, float]] = gather_object([values])
    names = dict.fromkeys(name for found in everywhere for name in found)
    known = {name: [found[name] for found in everywhere if not math.isnan(found.get(name, math.nan))] for name in names}
    return {name: sum(found) / len(found) for name, found in known.items() if found}


def _stop_at_rows(record: LossOutput, rollouts: Rollouts, step: int) -> None:
    bad = (~torch.isfinite(record.divergence_N)).nonzero().flatten().tolist()
    where = sorted({rollouts.row_of_token(n) for n in bad})
    told = gather_object([f"  {str(rollouts.rows[row]['prompt'])[:200]}" for row in where])
    rows = "\n".join(told[:5])
    raise NonFiniteLossError(f"step {step}: the loss is NaN or infinite in {len(told)} row(s):\n{rows}\n{WAY_OUT}")


def check_gradient(norm: Any, step: int) -> None:
    """Refuse a gradient that would break every weight, and the next checkpoint with them.

    Raises:
        NonFiniteLossError: the norm is NaN or infinite.
    """
    if not math.isfinite(float(norm)):
        raise NonFiniteLossError(f"step {step}: the gradient is not finite. {WAY_OUT}")


def keep_maxima(metrics: dict[str, list[float]]) -> None:
    """Let a maximum be the maximum of its window, where TRL's log would average it."""
    for key, values in metrics.items():
        if key.endswith("/max") and values:
            metrics[key] = [max(values)]
