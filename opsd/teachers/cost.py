"""What teachers cost beside the student: memory and forward passes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Memory and forward passes that teachers need beside the student.

    Args:
        megabytes: weights they hold, counted from their tensors; on this process, where they are sharded.
        offloaded: of these, in CPU memory.
        passes: sequences sent through a model per rollout, counted on a probe; None before that.
        micro_batches: micro-batches of an optimizer step.

    Example:
        >>> str(Cost(megabytes=1024, passes=1))
        "1,024 MB of weights beside the student's; forward passes per step: 1, per rollout: 1"
    """

    megabytes: float
    offloaded: float = 0.0
    passes: float | None = None
    micro_batches: int = 1

    def __str__(self) -> str:
        in_cpu = f" ({self.offloaded:,.0f} of them in CPU memory)" if self.offloaded else ""
        counted = ""
        if self.passes is not None:
            counted = f"; forward passes per step: {self.passes * self.micro_batches:g}, per rollout: {self.passes:g}"
        return f"{self.megabytes:,.0f} MB of weights beside the student's{in_cpu}{counted}"
