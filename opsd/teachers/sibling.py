"""Another model as teacher: loaded once, frozen, with the student's tokenizer.

Heads that are padded to different sizes are compared over the ids that both have.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from os import PathLike, fspath
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from opsd.contexts.renderer import PromptRenderer
from opsd.errors import ConfigError, TeacherError
from opsd.models.loading import check_model_name, load_tokenizer, without_autocast
from opsd.models.sharding import shard_like
from opsd.teachers.local import LocalTeacher
from opsd.teachers.placement import Placement
from opsd.teachers.prompting import ContextLike
from opsd.teachers.student import StudentHandle
from opsd.teachers.tokenizers import check_same_tokenizer
from opsd.teachers.weight_copy import digest


class SiblingTeacher(LocalTeacher):
    """Any model that shares the student's tokenizer, usually a larger one (strong-to-weak, arXiv 2505.09388).

    Args:
        model: a folder, a hub id, or a loaded model.
        revision: branch, tag or commit of a hub id.
        dtype: dtype to load in, such as "bfloat16"; "auto" takes the checkpoint's.
        device: the device it scores on, such as "cuda:1"; None is the student's device.
        offload: keep it in CPU memory between passes.
        quantize: "8bit" or "4bit", where bitsandbytes is installed.
        attn_implementation: as transformers names it.
        tokenizer: its tokenizer; None loads that of the folder or hub id. A loaded model needs it.
        context: what its prompt contains beside the student's.

    Raises:
        ConfigError: settings that cannot work together.

    Example:
        >>> OPSDTrainer(model, SiblingTeacher("Qwen/Qwen3-8B", dtype="bfloat16"), train_dataset=rows)
    """

    strategy = "sibling"

    def __init__(
        self,
        model: str | PathLike[str] | nn.Module,
        *,
        revision: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | None = None,
        offload: bool = False,
        quantize: str | None = None,
        attn_implementation: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        context: ContextLike = None,
    ):
        super().__init__(context=context)
        self._given = model
        self.source = self._source(model)
        self.revision = revision
        self.placement = Placement(dtype, device, offload, quantize, attn_implementation)
        self._model: nn.Module | None = None
        loading = {"revision": revision, "quantize": quantize, "attn_implementation": attn_implementation}
        loading["dtype"] = None if dtype == "auto" else str(dtype)
        given = [name for name, value in loading.items() if value is not None]
        if isinstance(model, nn.Module) and given:
            raise ConfigError(
                f"{', '.join(given)} say(s) how a model is loaded, and this one is loaded already, so it would be "
                "ignored. Give the model's folder or hub id, or load it that way yourself."
            )
        self._tokenizer = tokenizer
        self._renderer: PromptRenderer | None = None

    def _source(self, model: str | PathLike[str] | nn.Module) -> str:
        if isinstance(model, nn.Module):
            return str(getattr(model.config, "_name_or_path", ""))
        return check_model_name(fspath(model))

    def load_weights(self, student: StudentHandle) -> None:
        """Load the weights and compare tokenizers.

        Raises:
            TokenizerMismatchError: the two use the same ids for different tokens.
        """
        load = {"revision": self.revision, "trust_remote_code": student.trust_remote_code}
        tokenizer = self._tokenizer
        if tokenizer is None:
            if isinstance(self._given, nn.Module):
                raise ConfigError(
                    "a loaded teacher model does not say which tokenizer and chat template it was trained with, so "
                    "they cannot be compared with the student's. Pass it: SiblingTeacher(model, tokenizer=…)."
                )
            tokenizer = load_tokenizer(self.source, **load)
        check_same_tokenizer(student.tokenizer, tokenizer)
        if isinstance(self._given, nn.Module):
            _check_apart(self._given, student.model)
            self._model = self.placement.put(without_autocast(self._given), student.model)
        else:
            self._model = self.placement.load(self.source, student.model, **load)
        self._renderer = replace(student.renderer, tokenizer=tokenizer)

    @property
    def renderer(self) -> PromptRenderer:
        """How its prompts become ids: through its own chat template, where it has one."""
        return self._renderer or super().renderer

    @property
    def model(self) -> nn.Module:
        """The loaded module."""
        if self._model is None:
            raise TeacherError(
                f"teacher {self.strategy!r} has no model yet: it is loaded by prepare(student). Call that first."
            )
        return self._model

    def active_weights(self) -> AbstractContextManager[None]:
        """Move an offloaded model to its device for the length of the block."""
        return self._on_its_device() if self.placement.offload else nullcontext()

    @contextmanager
    def _on_its_device(self) -> Iterator[None]:
        self.model.to(self.placement.device_for(self.student.model))
        try:
            yield
        finally:
            self.model.to("cpu")

    def shard(self) -> None:
        """Shard it over the student's processes where the student is sharded."""
        if not self.placement.offload and self.placement.quantize is None:
            shard_like(self.model, self.student.model)

    @property
    def tensors(self) -> list[Tensor]:
        """The model's weights."""
        return [*self.model.parameters(), *self.model.buffers()]

    @property
    def settings(self) -> dict[str, Any]:
        """The weights' source, and a hash of them."""
        weights = digest(dict(self._model.named_parameters())) if self._model is not None else None
        placed = {"dtype": str(self.placement.dtype), "quantize": self.placement.quantize}
        return {"model": self.source, "revision": self.revision, **placed, "weights": weights}

    def describe(self) -> str:
        """Return whose weights these are."""
        return f"another model, frozen: {self.source or type(self._model).__name__}"


def _check_apart(model: nn.Module, student: nn.Module) -> None:
    """Refuse a sibling that shares what the student trains."""
    trained = {id(p) for p in student.parameters() if p.requires_grad}
    if any(id(p) in trained for p in model.parameters()):
        raise ConfigError(
            "the student itself, or the model inside its adapter, was given as the sibling, and a sibling is frozen: "
            "nothing could be trained. Use SameCheckpointTeacher, LiveTeacher or EMATeacher, or "
            "load the model a second time."
        )
