"""The fused kernel: every vocabulary-wide product once, with the gradient computed in the forward pass.

The logits of a chunk of tokens, student's and teachers', are written into buffers that are used again for the next
chunk. A rule turns them, a few tokens at a time so that they stay in the cache, into a loss per token and its gradient
with respect to the student's logits. The gradient goes back through the head at once. That is 4 products per token for
one teacher (student's logits, teacher's logits, gradients of states and of head), 3 where the head is frozen.

The cost: the gradient of the head, as large as the head, is kept from the forward to the backward pass. With
`recompute` the forward pass keeps nothing, and the backward pass computes everything again (6 products, or 5).

It knows heads and chunks; nothing of what a rule computes.

Shapes: N tokens of a micro-batch · R tokens of a chunk, or of a block of it · D hidden width · V vocabulary.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from opsd.models.head import Head, accumulate_dtype, multiply, product_dtype
from opsd.signals import HiddenSignal

MEBIBYTE = 2**20
# Logits of a chunk, student's and teachers' together, in MiB. On a CPU: above it the products gain nothing
# (benchmarks/losses.py). On a GPU: what TRL 1.16's two tiles of 4,096 × 32,768 float32 values take.
BUDGET_MB = {"cpu": 128, "cuda": 1024}
# Values per block of a rule: several tensors of 2 MiB fit a CPU's cache; a GPU runs fewer, larger launches faster.
BLOCK_VALUES = {"cpu": 2**19, "cuda": 2**25}


_KEPT = threading.local()


class BlockLoss(NamedTuple):
    """The loss of a block of tokens, as a rule returns it.

    Args:
        loss_R: float32, nats, each token's weighted part of the loss.
        grad_RV: float32, its gradient with respect to the student's logits.
        metrics: detached float32 (R,) tensors by name, for the log and for token weights.
    """

    loss_R: Tensor
    grad_RV: Tensor
    metrics: dict[str, Tensor]


class Rule(Protocol):
    """Turns the logits of a block of tokens into their loss."""

    def __call__(self, student_RV: Tensor, others: Sequence[Tensor], rows: slice) -> BlockLoss:
        """Return loss and gradient of a block.

        Args:
            student_RV: the student's logits.
            others: the logits of each of the kernel's other parts.
            rows: which of the N tokens they are.
        """
        ...


Observer = Callable[[Tensor, Sequence[Tensor], slice], dict[str, Tensor]]  # as a Rule; returns columns


class Gradients(NamedTuple):
    """Gradients of the loss with respect to states, head weight and bias; None where not needed."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None


@dataclass
class Kernel:
    """One evaluation of a rule over all tokens.

    Args:
        parts: states and heads whose logits the rule needs beside the student's; no gradient reaches them.
        rule: computes the loss.
        budget_mb: MiB that the logits of a chunk may take; None chooses by device.
        recompute: whether the backward pass computes everything again instead of keeping the head's gradient.
        observe: called with the logits of each block of the first run; returns more columns of metrics.
    """

    parts: Sequence[HiddenSignal]
    rule: Rule
    budget_mb: float | None = None
    recompute: bool = False
    observe: Observer | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)

    def loss(self, hidden_ND: Tensor, head: Head) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed loss, with gradient to states and head, and the metrics of all tokens."""
        head = head.gathered()
        if torch.is_grad_enabled():
            loss = _Fused.apply(hidden_ND, head.weight_VD, head.bias_V, head, self)
        else:
            loss, _ = self.run(hidden_ND, head, (False, False, False), product_dtype(hidden_ND))
        return loss, self.metrics

    def run(
        self, hidden_ND: Tensor, head: Head, needed: Sequence[bool], dtype: torch.dtype
    ) -> tuple[Tensor, Gradients]:
        """Compute the loss and the gradients that are needed, outside autograd, with products in `dtype`."""
        with torch.no_grad(), torch.autocast(hidden_ND.device.type, enabled=False):
            return self._run(hidden_ND, head, needed, dtype)

    def _run(
        self, hidden_ND: Tensor, head: Head, needed: Sequence[bool], dtype: torch.dtype
    ) -> tuple[Tensor, Gradients]:
        device, sums = hidden_ND.device, accumulate_dtype(hidden_ND.dtype)
        count, vocab_size = hidden_ND.shape[0], head.vocab_size
        chunk = self._rows_per_chunk(count, vocab_size, sums.itemsize, device.type)
        buffers = _buffers((1 + len(self.parts), chunk, vocab_size), sums, device)
        states_ND, head = hidden_ND.to(dtype), head.cast(dtype)
        parts = [(part.hidden_ND, head if part.head.is_students else part.head.cast(dtype)) for part in self.parts]
        gradients = Gradients(
            *(
                torch.empty(like.shape, dtype=sums, device=device) if is_needed and like is not None else None
                for is_needed, like in zip(needed, (hidden_ND, head.weight_VD, head.bias_V), strict=True)
            )
        )
        observe, self.observe = self.observe, None  # once: a backward pass that recomputes has been observed
        # Filled in place: small tensors kept from every block would lie between the large ones that a block frees, and
        # a CPU's heap would grow to the size of all logits.
        columns: dict[str, Tensor] = {}
        # One pass also without any token: every process must end up with the same metrics and with gradients.
        for start in range(0, max(count, 1), chunk):
            rows = slice(start, min(start + chunk, count))
            logits = buffers[:, : rows.stop - start]
            head.logits_into(states_ND[rows], logits[0])
            for (other_ND, other), logits_RV in zip(parts, logits[1:], strict=True):
                other.logits_into(other_ND[rows].to(dtype), logits_RV)
            for block, values in self._apply_rule(logits, rows, head, any(needed), observe):
                for name, column in values.items():
                    if name not in columns:
                        columns[name] = column.new_empty((count, *column.shape[1:]))
                    columns[name][block] = column
            if any(needed):
                _backward(logits[0].to(dtype), states_ND[rows], head, gradients, rows, add=start > 0)
        loss = columns.pop("loss").sum()
        self.metrics = columns
        return loss, gradients

    def _apply_rule(
        self, logits: Tensor, rows: slice, head: Head, needs_gradient: bool, observe: Observer | None
    ) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """Yield losses and metrics block by block, and leave the gradient where the student's logits were."""
        length, vocab_size = logits.shape[1:]
        step = max(1, BLOCK_VALUES.get(logits.device.type, BLOCK_VALUES["cuda"]) // vocab_size)
        for start in range(0, max(length, 1), step):
            block = logits[:, start : start + step]
            where = slice(rows.start + start, rows.start + min(start + step, length))
            seen = {} if observe is None else observe(block[0], list(block[1:]), where)
            loss = self.rule(block[0], list(block[1:]), where)
            if needs_gradient:
                block[0].copy_(head.backward_transform(loss.grad_RV, block[0]))
            yield where, loss.metrics | seen | {"loss": loss.loss_R}

    def _rows_per_chunk(self, count: int, vocab_size: int, itemsize: int, device: str) -> int:
        """Return the tokens per chunk that fit the budget, in chunks of nearly equal size."""
        budget_mb = self.budget_mb or BUDGET_MB.get(device, BUDGET_MB["cuda"])
        most = max(1, int(budget_mb * MEBIBYTE / ((1 + len(self.parts)) * vocab_size * itemsize)))
        # At least three chunks where one does not fit: two halves would take a quarter of the memory of full logits.
        chunks = 1 if count <= most else max(3, -(-count // most))
        return max(1, -(-count // chunks))


def _buffers(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return uninitialised memory; a CPU's is kept for the next call of this thread.

    Fresh memory is mapped page by page, which costs a CPU a tenth of the products. A GPU's allocator keeps its blocks.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape)
    kept: Tensor | None = getattr(_KEPT, "values", None)
    if kept is None or kept.dtype != dtype or kept.numel() < size:
        _KEPT.values = kept = torch.empty(size, dtype=dtype)
    return kept[:size].view(shape)


def _backward(grad_RV: Tensor, states_RD: Tensor, head: Head, gradients: Gradients, rows: slice, *, add: bool) -> None:
    """Take a chunk's gradient through the head."""
    if gradients.hidden_ND is not None:
        head.hidden_grad_into(grad_RV, gradients.hidden_ND[rows])
    if gradients.weight_VD is not None:
        multiply(grad_RV.T, states_RD, gradients.weight_VD, add=add)
    if gradients.bias_V is not None:
        total = grad_RV.sum(0, dtype=gradients.bias_V.dtype)
        gradients.bias_V.copy_(gradients.bias_V + total if add else total)


class _Fused(torch.autograd.Function):
    """Gives autograd the gradients that the kernel computed in its forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, head: Head, kernel: Kernel
    ) -> Tensor:
        ctx.kernel, ctx.head = (kernel, head) if kernel.recompute else (None, None)  # a kernel holds teachers' states
        ctx.product_dtype = product_dtype(hidden_ND)  # the backward pass runs outside autocast
        needed = (False,) * 3 if kernel.recompute else ctx.needs_input_grad[:3]
        loss, ctx.gradients = kernel.run(hidden_ND, head, needed, ctx.product_dtype)
        ctx.save_for_backward(*((hidden_ND, weight_VD, bias_V) if kernel.recompute else ()))
        ctx.dtypes = [None if like is None else like.dtype for like in (hidden_ND, weight_VD, bias_V)]
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "backward was called twice on this loss. Its gradients are computed in the forward pass and handed to "
                "autograd without a copy, so they exist once. Compute the loss again, or set recompute_loss."
            )
        if ctx.kernel is not None:
            hidden_ND, weight_VD, bias_V = ctx.saved_tensors
            head = replace(ctx.head, weight_VD=weight_VD, bias_V=bias_V)
            _, gradients = ctx.kernel.run(hidden_ND, head, ctx.needs_input_grad[:3], ctx.product_dtype)
        else:
            gradients, ctx.gradients = ctx.gradients, None
        # A pass over a head-sized matrix costs a CPU a tenth of a product, and the factor is nearly always 1.
        scaled = gradients if grad.is_cpu and grad == 1 else [g if g is None else g.mul_(grad) for g in gradients]
        cast = [None if g is None else g.to(dtype) for g, dtype in zip(scaled, ctx.dtypes, strict=True)]
        return *cast, None, None
