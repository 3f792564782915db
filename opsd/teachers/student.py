"""What a teacher knows of the student: its model, its prompts' renderer, and whether remote code may run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from opsd.contexts.renderer import PromptRenderer
from opsd.models.generation import generate
from opsd.rollouts import Ids


@dataclass(frozen=True)
class StudentHandle:
    """The student, as a teacher gets it once, before the first step.

    Args:
        model: the student, without any distributed wrapper.
        renderer: turns the student's own prompts into ids.
        trust_remote_code: whether loading a teacher may run code that came with its weights.
        engine: completes prompts with the weights that `model` holds at the time, in place of its own `generate`; with
            several processes a collective.

    Example:
        >>> model, tokenizer = load_model("organisation/model")
        >>> teacher.prepare(StudentHandle(model, PromptRenderer(tokenizer)))
    """

    model: nn.Module
    renderer: PromptRenderer
    trust_remote_code: bool = False
    engine: Callable[..., list[Ids]] | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's tokenizer."""
        return self.renderer.tokenizer

    def complete(self, prompts: Sequence[Ids], **sampling: Any) -> list[Ids]:
        """Return one completion per prompt, of the weights that the model holds now.

        Args:
            prompts: token ids.
            sampling: as `opsd.models.generation.generate` takes it.
        """
        if self.engine is not None:
            return self.engine(prompts, **sampling)
        return generate(self.model, prompts, self.tokenizer, **sampling)

    @property
    def device(self) -> torch.device:
        """The device of the student's weights, where a loss expects every signal."""
        return next(self.model.parameters()).device
