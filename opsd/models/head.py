"""The head of a language model: how last hidden states become logits, and how a gradient goes back through it.

Every product with a vocabulary-wide matrix is made here. Knows weights, bias, scale and soft-cap; nothing of teachers,
signals or losses.

Shapes: N tokens · R tokens of a chunk · D hidden width · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from opsd.errors import UnsupportedModelError

# Rows of the weight that are widened to float32 at a time, where a CPU holds it in another dtype: 8,192 × 1,024
# float32 values are 32 MiB.
WIDENED_ROWS = 8192


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of logits and sums for states of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(states: Tensor) -> torch.dtype:
    """Return the dtype in which products with these states are formed.

    bfloat16 on a GPU (under autocast too), where the sums are float32 all the same. On a CPU a product of bfloat16
    matrices comes back rounded to bfloat16, and float16 gradients of a mean over thousands of tokens underflow: both
    are widened to float32.
    """
    device = states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
    if states.dtype == torch.float64:
        return torch.float64
    return dtype if dtype == torch.bfloat16 and device != "cpu" else torch.float32


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """Write `a @ b` into `out`, or add it to `out`; the sum is never rounded to the dtype of the factors.

    Args:
        a: (m, k), in `out`'s dtype or in bfloat16 on a GPU.
        b: (k, n), like `a`.
        out: (m, n), float32 or float64.
        add: whether to add.
    """
    if a.dtype == out.dtype:
        out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _logit_scale(config: object) -> float:
    """Return the factor between `head(hidden)` and the logits, as the model families of transformers name it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere; Muse Glimmer; Falcon-H1
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    # HyperCLOVA X multiplies by what Granite and MiniCPM3 divide by.
    return float(scaling) if getattr(config, "model_type", "") == "hyperclovax" else 1.0 / float(scaling)


@dataclass(frozen=True, eq=False)
class Head:
    """The last step of a language model: logits = softcap(scale · (hidden @ weightᵀ + bias)).

    Args:
        weight_VD: float, the output embedding.
        bias_V: float, or None.
        scale: factor on the logits.
        softcap: c in c·tanh(logits / c) (Gemma 2, arXiv 2408.00118), or None.
        is_students: whether it is the head of the student that trains. Where FSDP2 shards that, a loss has it gathered
            already, and `weight_VD` here is the shard.

    Example:
        >>> Head.from_model(model).logits(hidden_ND)  # (N, V) float32
        >>> Head(torch.randn(1000, 32), scale=0.5).vocab_size
        1000
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    is_students: bool = False

    @classmethod
    def from_model(cls, model: nn.Module) -> Head:
        """Read the head of a transformers model (or of a PEFT model around one).

        Raises:
            UnsupportedModelError: the model has no output embedding with a weight.
        """
        head = model.get_output_embeddings()  # type: ignore[operator]
        if head is None or not isinstance(getattr(head, "weight", None), Tensor):
            raise UnsupportedModelError(
                f"{type(model).__name__} has no output embedding with a weight matrix, and opsd computes every "
                "distribution from one. Use a causal language model (AutoModelForCausalLM)."
            )
        config = model.config.get_text_config()  # type: ignore[union-attr, operator]
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(head.weight, getattr(head, "bias", None), _logit_scale(config), softcap)

    @property
    def vocab_size(self) -> int:
        """V, the rows of the output embedding (padding rows included)."""
        return self.weight_VD.shape[0]

    def narrow(self, vocab_size: int) -> Head:
        """Return the head over the first `vocab_size` ids, so that heads padded to different sizes can be compared."""
        if vocab_size == self.vocab_size:
            return self
        bias_V = None if self.bias_V is None else self.bias_V[:vocab_size]
        return replace(self, weight_VD=self.weight_VD[:vocab_size], bias_V=bias_V)

    def detach(self) -> Head:
        """Return the same head outside the autograd graph."""
        bias_V = None if self.bias_V is None else self.bias_V.detach()
        return replace(self, weight_VD=self.weight_VD.detach(), bias_V=bias_V)

    def to(self, device: torch.device) -> Head:
        """Return the head on a device; the same object where it is there already."""
        bias_V = None if self.bias_V is None else self.bias_V.to(device)
        return (
            self
            if self.weight_VD.device == device
            else replace(self, weight_VD=self.weight_VD.to(device), bias_V=bias_V)
        )

    def copy(self) -> Head:
        """Return the head with copies of its tensors."""
        bias_V = None if self.bias_V is None else self.bias_V.clone()
        return replace(self, weight_VD=self.weight_VD.clone(), bias_V=bias_V)

    def gathered(self) -> Head:
        """Return the head with a sharded weight (DTensor, FSDP2) gathered: one all-gather, not one per chunk."""
        bias_V = None if self.bias_V is None else _gather(self.bias_V)
        return replace(self, weight_VD=_gather(self.weight_VD), bias_V=bias_V)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Return logits of shape (N, V), float32 (float64 for float64 states); choose an N that fits in memory."""
        shape = hidden_ND.shape[0], self.vocab_size
        logits_NV = torch.empty(shape, dtype=accumulate_dtype(hidden_ND.dtype), device=hidden_ND.device)
        dtype = product_dtype(hidden_ND)
        with torch.no_grad(), torch.autocast(hidden_ND.device.type, enabled=False):
            self.logits_into(hidden_ND.to(dtype), logits_NV)
        return logits_NV

    def logits_into(self, hidden_RD: Tensor, logits_RV: Tensor) -> None:
        """Write the logits of a chunk into a float32 (float64) buffer; call it outside autograd and autocast.

        Args:
            hidden_RD: states, in the dtype that products are formed in.
            logits_RV: the buffer.
        """
        for part, weight_PD in self._parts(hidden_RD.dtype):
            multiply(hidden_RD, weight_PD.T, logits_RV[:, part])
        if self.bias_V is not None:
            logits_RV.add_(self.bias_V)
        if self.scale != 1.0:
            logits_RV.mul_(self.scale)
        if self.softcap is not None:
            logits_RV.div_(self.softcap).tanh_().mul_(self.softcap)

    def backward_transform(self, grad_RV: Tensor, logits_RV: Tensor) -> Tensor:
        """Return the gradient with respect to hidden @ weightᵀ + bias, given the one with respect to the logits."""
        if self.softcap is not None:
            grad_RV = grad_RV * (1.0 - (logits_RV / self.softcap).square())
        return grad_RV if self.scale == 1.0 else grad_RV * self.scale

    def hidden_grad_into(self, grad_RV: Tensor, hidden_grad_RD: Tensor) -> None:
        """Write grad @ weight into a float32 (float64) buffer; call it outside autograd and autocast.

        Args:
            grad_RV: the gradient that `backward_transform` returned, in the dtype that products are formed in.
            hidden_grad_RD: the buffer.
        """
        for number, (part, weight_PD) in enumerate(self._parts(grad_RV.dtype)):
            multiply(grad_RV[:, part], weight_PD, hidden_grad_RD, add=number > 0)

    def cast(self, dtype: torch.dtype) -> Head:
        """Return the head without gradient, in the dtype that products are formed in; a CPU widens it in parts."""
        head = self.detach()
        return head if head.weight_VD.is_cpu else replace(head, weight_VD=head.weight_VD.to(dtype))

    def _parts(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yield the weight in `dtype`, in parts where it must be widened: the whole would be another copy."""
        if self.weight_VD.dtype == dtype:
            yield slice(None), self.weight_VD
            return
        for start in range(0, self.vocab_size, WIDENED_ROWS):
            part = slice(start, start + WIDENED_ROWS)
            yield part, self.weight_VD[part].to(dtype)


class _MeanOverShards(torch.autograd.Function):
    """The identity, whose gradient is divided by the number of processes: FSDP's gradients are means over them."""

    @staticmethod
    def forward(ctx: object, full: Tensor, processes: int) -> Tensor:
        ctx.processes = processes  # type: ignore[attr-defined]
        return full.view_as(full)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.processes, None  # type: ignore[attr-defined]


def _gather(weight: Tensor) -> Tensor:
    """Return a plain tensor; each process has its own tokens, so its gradient is one summand of the total."""
    if not isinstance(weight, DTensor):
        return weight
    mesh = weight.device_mesh
    full = weight.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    return _MeanOverShards.apply(full, mesh.size())
