"""The student before its teacher is made: what trains is float32, the same in every process, and without dropout.

Knows a model and settings; nothing of teachers or rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from opsd.models.forward import check_model
from opsd.models.loading import broadcast_parameters, without_dropout
from opsd.teachers.weight_copy import megabytes
from opsd.training.machine import keep_freed_memory
from opsd.training.precision import widen_adapter

MEBIBYTE, GIBIBYTE = 2**20, 2**30


def _place(student: nn.Module, device: torch.device) -> str | None:
    """Move the student to its device, where transformers leaves a model that will be sharded on the CPU.

    Returns:
        A line for the user where it does not fit there in one piece, and stays until it is sharded.
    """
    if getattr(student, "is_quantized", False) or getattr(student, "hf_device_map", None):
        return None
    if device.type == "cuda" and next(student.parameters()).device.type == "cpu":
        needed, free = megabytes(list(student.parameters())) * MEBIBYTE, torch.cuda.mem_get_info(device)[0]
        if needed > free:
            return (
                f"student     stays in CPU memory until it is sharded: {needed / GIBIBYTE:,.1f} GiB in one piece, and "
                f"{free / GIBIBYTE:,.1f} are free on {device}; what looks at it before runs on the CPU"
            )
    student.to(device)
    return None


def ready_student(
    accelerator: Accelerator, model: nn.Module, vocab_size: int, args: Any, say: Callable[[str], None]
) -> nn.Module:
    """Return the student as it trains, on its device and unwrapped; a collective.

    Args:
        accelerator: of the run.
        model: the model, as TRL's trainer holds it.
        vocab_size: tokens of its tokenizer.
        args: training arguments.
        say: called with a line for the user.

    Raises:
        ConfigError: weights train in 16 bits.
        UnsupportedModelError: its logits cannot be computed from its last hidden states.
    """
    student = accelerator.unwrap_model(model)
    if line := _place(student, accelerator.device):
        say(line)
    if line := widen_adapter(student):
        say(line)
    broadcast_parameters(student, accelerator.device)  # DDP would do so only after teachers have copied
    if args.disable_dropout:
        without_dropout(student)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    check_model(student, vocab_size)
    return student
