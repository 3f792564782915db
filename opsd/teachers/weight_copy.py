"""A second set of values for a model's weights, without a second model.

Self-teachers keep a copy of the trainable parameters, which the model holds while they score. With LoRA that is one
adapter, with full fine-tuning one set of weights; the frozen rest is shared. Where FSDP2 shards the student, the copy
is sharded the same way. Knows modules and tensors; nothing of teachers, rollouts or losses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from opsd.models.forward import all_hidden, evaluating, probe
from opsd.models.sharding import (
    is_sharded,
    local_shard,
    plain_name,
    reshard,
    shard_like_param,
    swapped_shards,
)

MEGABYTE = 2**20
ENDS, SPREAD = 64, 256  # values of each tensor that a digest reads: at either end, and between


def megabytes(tensors: Sequence[Tensor]) -> float:
    """Return the memory of tensors in MB, each storage counted once; of sharded ones this process's part."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (local_shard(tensor) for tensor in tensors)
    }
    return sum(storages.values()) / MEGABYTE


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a short hash of weights, computed from some values of each tensor: both ends, and a sample between.

    Other training changes some of these values. A change of a few other values alone is not seen: reading all of an 8B
    model would take as long as loading it.

    Args:
        tensors: by name, of one process and not sharded.
    """
    sha = hashlib.sha256()
    for name, t in tensors.items():
        flat = t.detach().flatten()
        # An odd distance: an even one would read the same few columns of a matrix again and again.
        between = flat[:: max(len(flat) // SPREAD, 1) | 1]
        values = torch.cat([flat[:ENDS], between, flat[-ENDS:]])
        sha.update(f"{name}{tuple(t.shape)}".encode())
        sha.update(values.to("cpu", torch.float32).numpy().tobytes())
    return sha.hexdigest()[:16]


class WeightCopy:
    """A copy of a model's trainable parameters, which the model can hold for the length of a block.

    Args:
        model: the student; its trainable parameters are copied as they are now.
        dtype: dtype of the copy; None keeps the dtype of each parameter. An average needs float32: in bfloat16 a decay
            of 0.999 never moves, because the step is smaller than half the distance to the next number.
        offload: keep the copy in CPU memory; it is moved to the device only while it scores.

    Example:
        >>> start = WeightCopy(model)
        >>> train(model)
        >>> with start.swapped_in():
        ...     logits = model(ids).logits  # of the weights before training
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None, *, offload: bool = False):
        self.model = model
        self._device = torch.device("cpu") if offload else None
        trainable = {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}
        self.values = {name: self._copy(p, dtype or p.dtype) for name, p in trainable.items()}

    def _copy(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        return parameter.detach().to(self._device or parameter.device, dtype, copy=True)

    @property
    def tensors(self) -> list[Tensor]:
        """The values of the copy."""
        return list(self.values.values())

    def pairs(self) -> list[tuple[str, Tensor, Tensor]]:
        """Return (name, parameter, value) of every copied parameter.

        Parameters are looked up anew, since sharding replaces them; a value that is not sharded yet is sharded like its
        parameter.
        """
        reshard(self.model)  # between passes a sharded model may still hold what the last one gathered
        parameters = {plain_name(name): p for name, p in self.model.named_parameters()}
        self.values = {name: shard_like_param(value, parameters[name]) for name, value in self.values.items()}
        return [(name, parameters[name], value) for name, value in self.values.items()]

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Let the model hold these values for the length of the block.

        No graph may be alive across the block: a backward pass would find other values.
        """
        pairs = [(p, value) for _, p, value in self.pairs()]
        swapped = swapped_shards(pairs, self.model) if is_sharded(self.model) else _pointed_at(pairs)
        # Autocast keeps the bfloat16 copy of each parameter that it has cast, and finds it by the parameter, whatever
        # values that holds by now.
        torch.clear_autocast_cache()
        try:
            with swapped:
                yield
        finally:
            torch.clear_autocast_cache()

    @torch.no_grad()
    def move_towards_model(self, share: float) -> None:
        """Set each value to (1 - share)·value + share·parameter; sharded values shard by shard, sending nothing."""
        for _, p, value in self.pairs():
            shard = local_shard(value)
            shard.lerp_(local_shard(p).to(shard), share)

    def copy_model(self) -> None:
        """Copy the model's values as they are now."""
        for _, p, value in self.pairs():
            local_shard(value).copy_(local_shard(p))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the values by name, sharded where the model is: whoever writes them gathers one at a time."""
        return dict(self.values)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take values by name, in place; the caller has checked the names."""
        for name, value in self.values.items():
            local_shard(value).copy_(local_shard(shard_like_param(state[name], value)))


@contextmanager
def _pointed_at(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Let parameters hold other values for the length of the block; only pointers move."""
    originals = [p.data for p, _ in pairs]
    try:
        for p, value in pairs:
            p.data = value.to(p.device, p.dtype)
        yield
    finally:
        for (p, _), original in zip(pairs, originals, strict=True):
            p.data = original


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Let a PEFT model compute what its base model computes for the length of the block.

    PEFT makes every parameter of the active adapter trainable when it switches the adapter on, also those a user froze;
    here the trainable set is the same before and after.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with model.disable_adapter():  # type: ignore[operator]
            yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


def adapter_parameters(model: nn.Module, *, saved_modules: bool = True) -> set[Tensor]:
    """Return the parameters of a PEFT model that switching the adapter off leaves out.

    Args:
        model: a model, with or without adapters.
        saved_modules: whether modules that PEFT trains and saves whole (modules_to_save) count.
    """
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper) if saved_modules else (BaseTunerLayer,)
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    parts = [getattr(layer, name, None) for layer in layers for name in layer.adapter_layer_names]
    return {p for part in parts if isinstance(part, nn.Module) for p in part.parameters()}


def adapter_adds_nothing(model: nn.Module, vocab_size: int) -> bool:
    """Tell whether a PEFT model computes, to the last bit, what its base model computes.

    Args:
        model: a PEFT model.
        vocab_size: ids below it may appear in the probe.
    """
    ids_BL = probe(model, vocab_size)
    with evaluating(model):
        on_ND = all_hidden(model, ids_BL)
        with adapter_off(model):
            off_ND = all_hidden(model, ids_BL)
    return torch.equal(on_ND, off_ND)
