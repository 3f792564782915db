"""What bounds a step: sampling, the teacher or training, and what would help.

Knows logged seconds by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

ROLLOUTS, TEACHER, WHOLE = "seconds/rollouts", "seconds/teacher", "step_time"  # seconds of a step, as they are logged
TRAINING = "training"
STALENESS = "staleness"  # optimizer steps since the rollouts were sampled
WARM_UP = 1  # entries at the start that also compile, and fill caches
HELPS = {
    "rollouts": "vLLM samples faster (use_vllm), and so do shorter rollouts (max_completion_length)",
    "teacher": "a shorter context, a teacher in bf16, or one on a server that scores while the student trains",
    TRAINING: "an adapter (use_peft), fewer scored tokens (keep_fraction), or bf16 where the hardware computes in it",
}


def shares_of_step(logs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the shares of a step's seconds by part, the largest first; empty where the log does not say.

    Args:
        logs: log entries.

    Example:
        >>> shares_of_step([{"step_time": 10.0, "seconds/rollouts": 6.0, "seconds/teacher": 1.0}])
        {'rollouts': 0.6, 'training': 0.3, 'teacher': 0.1}
    """
    timed = [entry for entry in logs if all(isinstance(entry.get(name), int | float) for name in (WHOLE, ROLLOUTS))]
    timed = _whole_batches(timed) or timed[WARM_UP:] or timed
    whole = fmean(entry[WHOLE] for entry in timed) if timed else 0.0
    if whole <= 0:
        return {}
    shares = {"rollouts": fmean(entry[ROLLOUTS] for entry in timed) / whole}
    shares["teacher"] = fmean(entry.get(TEACHER) or 0.0 for entry in timed) / whole
    shares[TRAINING] = max(0.0, 1.0 - sum(shares.values()))
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _whole_batches(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the entries of whole generation batches but the first, where a step samples for later ones too."""
    starts = [number for number, entry in enumerate(entries) if entry.get(STALENESS) == 0]
    if len(starts) in (0, 1, len(entries)):
        return []
    return list(entries[starts[1] if len(starts) > 2 else starts[0] : starts[-1]])


def bound_of_step(logs: Sequence[Mapping[str, Any]]) -> str:
    """Return what bounds a step, in a sentence or two; "" where the log does not say."""
    shares = shares_of_step(logs)
    if not shares:
        return ""
    largest = next(iter(shares))
    listed = ", ".join(f"{share:.0%} {name}" for name, share in shares.items())
    return f"a step is {listed}. To shorten it: {HELPS[largest]}"
