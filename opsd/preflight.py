"""What is checked between loading the student and step 1, so that nothing of it fails hours later.

Knows a model, a dataset and a teacher; changes none of them.
"""

from __future__ import annotations

import hashlib
from itertools import islice
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from opsd.errors import ConfigError, DataError
from opsd.forward import context_length
from opsd.rollouts import check_lengths
from opsd.teachers import StudentHandle, Teacher
from opsd.teachers.weights import adapter_adds_nothing

# Rows whose prompts are rendered for both sides before step 1: about ten seconds of one core.
CHECKED_ROWS = 20_000
FINGERPRINT_VALUES = 64  # of each parameter; other weights differ in all of them


def check_student(student: nn.Module) -> list[str]:
    """Return the names of the parameters that training moves.

    Raises:
        ConfigError: there are none.
    """
    trainable = [name for name, p in student.named_parameters() if p.requires_grad]
    if not trainable:
        raise ConfigError(
            "no parameter of this model is trainable, so nothing could be learned. An adapter that was loaded for "
            "inference is frozen: PeftModel.from_pretrained(…, is_trainable=True)."
        )
    return trainable


def check_text_only(reads_images: bool) -> None:
    """Refuse a model that reads images.

    Raises:
        ConfigError: it does.
    """
    if reads_images:
        raise ConfigError(
            "this model reads images, and version 1 of opsd trains text models only. Its prompts would reach the "
            "teacher without their images. Use a text model."
        )


def check_sharding(fsdp: bool, deepspeed: bool) -> None:
    """Refuse sharded training, whose parameters are replaced after teachers took hold of them.

    Raises:
        ConfigError: FSDP or DeepSpeed is on.
    """
    if fsdp or deepspeed:
        raise ConfigError(
            f"{'FSDP' if fsdp else 'DeepSpeed'} is on, and this version of opsd trains on one device or with DDP. A "
            "teacher made of the student would hold weights that sharding has replaced: a frozen teacher would follow "
            "the student without a word. Use torchrun or accelerate without sharding, LoRA, or a quantised base."
        )


def check_importance(clip: float | None, has_tools: bool) -> None:
    """Refuse importance correction of completions that several calls of the engine made.

    Raises:
        ConfigError: it is on, and so are tools.
    """
    if clip is not None and has_tools:
        raise ConfigError(
            "importance_clip is set and the student calls tools. A completion is then sampled in several calls, and "
            "TRL keeps no log-probabilities across them. Leave importance_clip out."
        )


def fingerprint(student: nn.Module, vocab_size: int) -> str:
    """Return a hash of the weights that a resumed run must begin with: all but an adapter that adds nothing yet."""
    fresh = hasattr(student, "disable_adapter") and adapter_adds_nothing(student, vocab_size)
    digest = hashlib.sha256()
    for name, p in student.named_parameters():
        if not (fresh and p.requires_grad):
            digest.update(f"{name}{tuple(p.shape)}".encode())
            digest.update(p.detach().flatten()[:FINGERPRINT_VALUES].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]


def check_rows_fit(dataset: Any, student: StudentHandle, teacher: Teacher, max_new_tokens: int) -> None:
    """Render the first rows' prompts for both sides: templates that fail and prompts that are too long show here.

    Args:
        dataset: prepared rows; a stream is checked row by row as it is used.
        student: the student.
        teacher: the teacher, prepared.
        max_new_tokens: tokens a completion may get.

    Raises:
        DataError: a prompt leaves no room for its completion; names the row.
        TemplateError: the template fails on a row.
    """
    if not isinstance(dataset, Dataset):
        return
    limits = {"student": context_length(student.model), "teacher": teacher.max_length}
    for number, row in enumerate(islice(dataset, CHECKED_ROWS)):
        prompts = {"student": student.renderer.ids(row["prompt"])}
        if teacher.context is not None:
            try:
                prompts["teacher"] = teacher.prompt_ids(row)
            except DataError as error:
                raise DataError(f"row {number}: {error}") from error
        for who, prompt in prompts.items():
            check_lengths(limits[who], [prompt], [max_new_tokens], who, first_row=number)
    if teacher.context is not None:
        teacher.context.counts = type(teacher.context.counts)()
