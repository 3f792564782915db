"""The student before its teacher is made: what trains is float32, the same in every process, and without dropout.

Knows a model and settings; nothing of teachers or rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from torch import nn

from opsd.models.forward import check_model
from opsd.models.loading import broadcast_parameters, without_dropout
from opsd.training.precision import widen_adapter


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
    # transformers leaves a model that will be sharded on the CPU, where NCCL could not send it to other processes.
    if not (getattr(student, "is_quantized", False) or getattr(student, "hf_device_map", None)):
        student.to(accelerator.device)
    if line := widen_adapter(student):
        say(line)
    broadcast_parameters(student)  # DDP would do so only after teachers have copied
    if args.disable_dropout:
        without_dropout(student)
    check_model(student, vocab_size)
    return student
