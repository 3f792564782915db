"""Teachers with weights of their own: a past checkpoint of the student, or a sibling.

Both are loaded once, frozen, and must share the student's tokenizer; heads padded to other sizes are compared over
the ids that both have.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from os import PathLike, fspath
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from opsd.context import PrivilegedContext
from opsd.errors import ConfigError
from opsd.models import check_model_name, without_autocast
from opsd.teachers.base import Cost, StudentHandle
from opsd.teachers.local import LocalTeacher
from opsd.teachers.tokenizers import check_same_tokenizer
from opsd.teachers.weights import megabytes


class SiblingTeacher(LocalTeacher):
    """Any model that shares the student's tokenizer, usually a larger one (strong-to-weak, arXiv 2505.09388).

    Args:
        model: a folder, a hub id, or a loaded model.
        revision: branch, tag or commit of a hub id.
        dtype: dtype to load in, such as "bfloat16"; "auto" takes the checkpoint's.
        tokenizer: its tokenizer; None loads it from where the model came from.
        context: what it is shown beside the prompt.
    """

    strategy = "sibling"

    def __init__(
        self,
        model: str | PathLike[str] | nn.Module,
        *,
        revision: str | None = None,
        dtype: str | torch.dtype = "auto",
        tokenizer: PreTrainedTokenizerBase | None = None,
        context: PrivilegedContext | str | Mapping[str, Any] | None = None,
    ):
        super().__init__(context=context)
        self._given = model
        self.source = self._source(model)
        self.revision = revision
        self.dtype = dtype
        self._tokenizer = tokenizer

    def _source(self, model: str | PathLike[str] | nn.Module) -> str:
        if isinstance(model, nn.Module):
            return str(getattr(model.config, "_name_or_path", ""))
        return check_model_name(fspath(model))

    def place(self, student: StudentHandle) -> None:
        """Load the weights and compare tokenizers.

        Raises:
            TokenizerMismatchError: the two do not mean the same by the same ids.
        """
        load = {"revision": self.revision, "trust_remote_code": student.trust_remote_code}
        tokenizer = self._tokenizer
        if tokenizer is None:
            if not self.source:
                raise ConfigError(
                    "this teacher model does not say where it came from, so its tokenizer cannot be compared with the "
                    "student's. Pass it: SiblingTeacher(model, tokenizer=…)."
                )
            tokenizer = AutoTokenizer.from_pretrained(self.source, **load)
        check_same_tokenizer(student.tokenizer, tokenizer)
        if isinstance(self._given, nn.Module):
            model = without_autocast(self._given)
        else:
            # safetensors only: a pickle can run code when it is opened.
            model = AutoModelForCausalLM.from_pretrained(self.source, dtype=self.dtype, use_safetensors=True, **load)
        model.requires_grad_(False).eval()
        # A model that was split over devices, or quantised, already is where it belongs.
        placed = hasattr(model, "hf_device_map") or getattr(model, "is_quantized", False)
        self._model = model if placed else model.to(next(student.model.parameters()).device)
        # It reads prompts through its own chat template.
        self._renderer = replace(self.renderer, tokenizer=tokenizer)

    @property
    def model(self) -> nn.Module:
        """The loaded module."""
        return self._model

    def teaching(self) -> AbstractContextManager[None]:
        """It is always in its own state."""
        return nullcontext()

    @property
    def settings(self) -> dict[str, Any]:
        """Where the weights came from."""
        return {"model": self.source, "revision": self.revision}

    @property
    def words(self) -> str:
        """Whose weights these are."""
        return f"another model, frozen: {self.source or type(self._model).__name__}"

    @property
    def cost(self) -> Cost:
        """The whole model."""
        return Cost(megabytes(list(self._model.parameters())))


class PastCheckpointTeacher(SiblingTeacher):
    """An earlier self: a checkpoint of the student, from this run, another run or the hub.

    Recovers what a later fine-tune cost (Thinking Machines, "On-Policy Distillation", 2025), or keeps a model near
    what it was. A folder with a LoRA adapter is loaded on top of the base it names.

    Args:
        model: the checkpoint's folder or hub id.
        revision: branch, tag or commit of a hub id.
        dtype: dtype to load in; "auto" takes the checkpoint's.
        tokenizer: its tokenizer; None loads it from the same place.
        context: what it is shown beside the prompt.
    """

    strategy = "past_checkpoint"

    @property
    def words(self) -> str:
        """Whose weights these are."""
        return f"an earlier checkpoint, frozen: {self.source or type(self._model).__name__}"
