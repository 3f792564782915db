"""What a teacher knows of the student: its model, its prompts' renderer, and whether remote code may run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from opsd.contexts.renderer import PromptRenderer


@dataclass(frozen=True)
class StudentHandle:
    """The student, as a teacher gets it once, before the first step.

    Args:
        model: the student, without any distributed wrapper.
        renderer: turns the student's own prompts into ids.
        trust_remote_code: whether loading a teacher may run code that came with its weights.

    Example:
        >>> model, tokenizer = load_model("organisation/model")
        >>> teacher.prepare(StudentHandle(model, PromptRenderer(tokenizer)))
    """

    model: nn.Module
    renderer: PromptRenderer
    trust_remote_code: bool = False

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's tokenizer."""
        return self.renderer.tokenizer

    @property
    def device(self) -> torch.device:
        """The device of the student's weights, where a loss expects every signal."""
        return next(self.model.parameters()).device
