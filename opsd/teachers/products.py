"""The average of what LoRA adds, B·A, and not of its two factors.

The mean of products is not the product of means. Here the average of each layer is itself a pair of factors: an
update stacks the student's beside them, weighed, which is exact, and when the stack has grown to twice its limit it is
factored anew at the limit's rank by a singular value decomposition. What that leaves out is measured. Knows modules
and tensors; nothing of teachers.

Shapes: O outputs · I inputs of a layer · R rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from opsd.errors import ConfigError
from opsd.models.sharding import is_sharded
from opsd.teachers.weight_copy import WeightCopy

A, B = ".lora_A.", ".lora_B."
LOST = "opsd.lost"  # stands in a state beside the values
# Weights that change what a layer adds without being a factor of B·A.
NOT_PRODUCTS = ("lora_magnitude_vector", "lora_embedding_")


def refactored(b_OR: Tensor, a_RI: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return the nearest pair of factors of a rank, and the share of the product's norm that they leave out.

    Args:
        b_OR: float32.
        a_RI: float32.
        rank: at most this.
    """
    q_b, r_b = torch.linalg.qr(b_OR.double())
    q_a, r_a = torch.linalg.qr(a_RI.double().T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    keep = min(rank, len(s))
    root = s[:keep].sqrt()
    b, a = q_b @ (u[:, :keep] * root), (root[:, None] * vh[:keep]) @ q_a.T
    lost = (s[keep:].norm() / s.norm().clamp(min=torch.finfo(s.dtype).tiny)).item()
    return b.to(b_OR.dtype).contiguous(), a.to(a_RI.dtype).contiguous(), lost


class AverageOfProducts(WeightCopy):
    """Trainable values of a LoRA model whose factors are replaced by factors of the averaged product.

    Other trainable weights (biases, `modules_to_save`) are averaged as they are.

    Args:
        model: a PEFT model with LoRA on linear layers.
        rank: of the average; None is 4 times the adapter's.
        offload: keep the average in CPU memory.

    Raises:
        ConfigError: the model has no LoRA factors, or weights whose average is no product (DoRA, embeddings).
    """

    def __init__(self, model: nn.Module, rank: int | None = None, *, offload: bool = False):
        super().__init__(model, torch.float32, offload=offload)
        # Where a user froze one factor the product is linear in the other, which is averaged as it is.
        pairs = {name: name.replace(A, B) for name in self.values if A in name}
        self._layers = {name_a: name_b for name_a, name_b in pairs.items() if name_b in self.values}
        odd = [name for name in self.values if any(kind in name for kind in NOT_PRODUCTS)]
        odd += [name for name in self._layers if self.values[name].dim() != 2]
        if odd or not self._layers or is_sharded(model):
            why = f"has {odd[0]!r}" if odd else "has no LoRA factors" if not self._layers else "is sharded"
            raise ConfigError(
                f'average="product" averages what LoRA adds to linear layers, B·A, and this student {why}. Use '
                'average="factors", which averages any weights as they are.'
            )
        own = max(self.values[name].shape[0] for name in self._layers)
        self.rank = rank or 4 * own
        self.lost = 0.0  # the largest share that a re-factorisation left out, so far

    @torch.no_grad()
    def move_towards_model(self, share: float) -> None:
        """Set each layer's product to (1 - share)·product + share·B·A, and every other value to its average."""
        parameters = {name: p for name, p, _ in self.pairs()}
        factors = set(self._layers) | set(self._layers.values())
        for name, p in parameters.items():
            if name not in factors:
                self.values[name].lerp_(p.to(self.values[name]), share)
        for name_a, name_b in self._layers.items():
            a_RI, b_OR = (parameters[name].to(self.values[name]) for name in (name_a, name_b))
            stacked_a = torch.cat([self.values[name_a], a_RI])
            stacked_b = torch.cat([(1.0 - share) * self.values[name_b], share * b_OR], dim=1)
            if len(stacked_a) > 2 * self.rank:
                stacked_b, stacked_a, lost = refactored(stacked_b, stacked_a, self.rank)
                self.lost = max(self.lost, lost)
            self.values[name_a], self.values[name_b] = stacked_a, stacked_b

    def state_dict(self) -> dict[str, Tensor]:
        """Return the values by name, and what re-factorisations left out so far."""
        return {**super().state_dict(), LOST: torch.tensor(self.lost, dtype=torch.float64)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take values by name; their ranks are those of the run that saved them."""
        assert state.keys() == {*self.values, LOST}, "these are another model's weights"
        self.lost = float(state[LOST])
        self.values = {name: state[name].to(value, copy=True) for name, value in self.values.items()}
