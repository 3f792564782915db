"""A second set of values for a model's weights, without a second model.

Teachers made of the student keep only what training moves: a copy of the trainable parameters, swapped in while they
score. With LoRA that is one adapter, with full fine-tuning one copy of the model; the frozen rest is shared. Knows
modules and tensors; nothing of teachers, rollouts or losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from opsd.forward import evaluating, last_hidden, probe

MEGABYTE = 2**20


def megabytes(tensors: Sequence[Tensor]) -> float:
    """Return the memory of tensors in MB, each storage counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values()) / MEGABYTE


class TrainableWeights:
    """Values for a model's trainable parameters, kept beside the model's own.

    Args:
        model: the student; its trainable parameters are copied as they are now.
        dtype: dtype of the copy; None keeps each parameter's own. An average needs float32: in bfloat16 a decay of
            0.999 never moves, because the step is smaller than half the distance to the next number.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None):
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.values = {name: p.detach().to(dtype or p.dtype, copy=True) for name, p in self.parameters.items()}

    @property
    def megabytes(self) -> float:
        """Memory of the copy in MB."""
        return megabytes(list(self.values.values()))

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Let the model hold these values for the length of the block.

        Only pointers move. No graph may be alive across the block: a backward pass would find other values.
        """
        own = {name: p.data for name, p in self.parameters.items()}
        try:
            for name, p in self.parameters.items():
                p.data = self.values[name].to(p.dtype)
            yield
        finally:
            for name, p in self.parameters.items():
                p.data = own[name]

    @torch.no_grad()
    def move_towards_model(self, share: float) -> None:
        """Set each value to (1 - share)·value + share·parameter."""
        for name, p in self.parameters.items():
            self.values[name].lerp_(p.detach().to(self.values[name].dtype), share)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take values by name, in place."""
        assert state.keys() == self.values.keys(), "these are another model's weights"
        for name, value in self.values.items():
            value.copy_(state[name])


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Let a PEFT model compute what its base model computes for the length of the block.

    PEFT makes every parameter of the active adapter trainable again when it switches it on, also those a user froze;
    here the trainable set is the same before and after.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with model.disable_adapter():  # type: ignore[operator]
            yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


def adapter_adds_nothing(model: nn.Module, vocab_size: int) -> bool:
    """Tell whether a PEFT model computes, to the last bit, what its base model computes.

    Args:
        model: a PEFT model.
        vocab_size: ids below it may appear in the probe.
    """
    ids_BL, mask_BL = probe(model, vocab_size)
    with evaluating(model):
        on_ND = last_hidden(model, ids_BL, mask_BL, mask_BL.bool())
        with adapter_off(model):
            off_ND = last_hidden(model, ids_BL, mask_BL, mask_BL.bool())
    return torch.equal(on_ND, off_ND)
