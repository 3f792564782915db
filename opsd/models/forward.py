"""The forward pass of the student and of every local teacher: last hidden states at the positions that are scored.

Knows a model, token ids and positions; nothing of rollouts, teachers or losses.

Shapes: B rows · L tokens of a padded sequence · N scored positions (packed) · D hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import Cache

from opsd.errors import LengthError, UnsupportedModelError
from opsd.models.head import Head

# Largest |logits - reference| / max|reference| accepted by check_model, per dtype: rounding of one matrix product.
PROBE_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 3e-2, torch.float16: 1e-2}
_COUNTERS: list[list[int]] = []


def language_model(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a PEFT model, or the model itself; adapters stay active."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def backbone(model: nn.Module) -> nn.Module:
    """Return the part of a language model that computes last hidden states: all but its head."""
    whole = language_model(model)
    candidates = (whole.base_model, whole.get_decoder(), getattr(whole, "model", whole))  # type: ignore[operator]
    # Llama 4 answers both questions with the whole model, head included.
    return next((part for part in candidates if part is not whole), whole)  # type: ignore[return-value]


def context_length(model: nn.Module) -> int | None:
    """Return the longest sequence of a model, in tokens, or None where its config sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr, operator]


def embedded_tokens(model: nn.Module) -> int:
    """Return the number of token ids that a model embeds."""
    return model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]


def check_lengths(
    limit: int | None, prompts: Sequence[list[int]], completion_lengths: Sequence[int], who: str, first_row: int = 0
) -> None:
    """Refuse a prompt that leaves no room for its completion.

    Args:
        limit: tokens that the model's positions reach; None means no limit.
        prompts: prompt ids.
        completion_lengths: tokens of each completion, or the most it may get.
        who: whose prompts, for the message: "student" or "teacher".
        first_row: number of the first row, for the message.

    Raises:
        LengthError: prompt + completion are longer than the model's context.
    """
    for row, (prompt, length) in enumerate(zip(prompts, completion_lengths, strict=True), first_row):
        if limit is not None and len(prompt) + length > limit:
            raise LengthError(
                f"row {row}: the {who}'s prompt has {len(prompt)} tokens and its completion up to "
                f"{length}, together more than the {limit} tokens of the model's context. Tokens past it have no "
                "position. Drop such rows (drop_long_rows), shorten them, lower max_completion_length, or let the "
                "teacher's context shorten one field: PrivilegedContext(truncate=…, max_prompt_tokens=…)."
            )


def last_hidden(
    model: nn.Module, ids_BL: Tensor, row_N: Tensor, position_N: Tensor, *, past: Cache | None = None
) -> Tensor:
    """Return the last hidden states (after the final norm, before the head) at some positions.

    Passes ids alone. Rows are padded on the right, where causal attention sees no padding, and start at position 0 or
    behind what they have in common (`past`). A mask would keep scaled-dot-product attention from its fast kernels.

    Args:
        ids_BL: int64 token ids, padded on the right.
        row_N: int64, rows of the positions.
        position_N: int64, the positions, counted from the first of these ids.
        past: keys and values of what stands before these ids in every row.

    Returns:
        Tensor of shape (N, D), in the model's dtype.
    """
    for sequences in _COUNTERS:
        sequences.append(len(ids_BL) if len(row_N) else 0)
    cached = {"use_cache": False} if past is None else {"use_cache": True, "past_key_values": past}
    return backbone(model)(input_ids=ids_BL, **cached).last_hidden_state[row_N, position_N]


@contextmanager
def counting_passes() -> Iterator[list[int]]:
    """Count forward passes for the length of the block: yields a list of the number of sequences of each pass.

    A pass over what sequences have in common computes none of them: 0.
    """
    sequences: list[int] = []
    _COUNTERS.append(sequences)
    try:
        yield sequences
    finally:
        _COUNTERS.remove(sequences)


@contextmanager
def not_counting() -> Iterator[None]:
    """Leave the passes of a block out of every count."""
    counters = _COUNTERS[:]
    _COUNTERS.clear()
    try:
        yield
    finally:
        _COUNTERS[:] = counters


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Restore the mode (train or eval) of every module after the block."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a block in eval mode without gradient, then restore the mode of every module.

    With dropout two passes of one LoRA model differ by half a nat, and TRL reads `model.training`.
    """
    with keeping_modes(model), torch.no_grad():
        model.eval()
        yield


def probe(model: nn.Module, vocab_size: int) -> Tensor:
    """Return ids (int64, (2, 7)) of a small batch on the model's device; all are below `vocab_size`."""
    return torch.arange(3, 3 + 14, device=next(model.parameters()).device).reshape(2, 7) % vocab_size


def all_hidden(model: nn.Module, ids_BL: Tensor) -> Tensor:
    """Return the last hidden states at every position, row by row: (B·L, D)."""
    row_N, position_N = torch.ones_like(ids_BL).nonzero().unbind(-1)
    return last_hidden(model, ids_BL, row_N, position_N)


@contextmanager
def precise(model: nn.Module, device: str) -> Iterator[torch.dtype | None]:
    """Leave the run's autocast for a block where the model can compute without it, and yield the one that stays.

    FlashAttention refuses float32; everything else is compared more closely in it.
    """
    attention = str(getattr(language_model(model).config, "_attn_implementation", ""))
    stays = torch.is_autocast_enabled(device) and "flash" in attention
    with torch.autocast(device, dtype=torch.get_autocast_dtype(device), enabled=stays):
        yield torch.get_autocast_dtype(device) if stays else None


def check_model(model: nn.Module, vocab_size: int) -> None:
    """Refuse a model whose logits cannot be computed from its last hidden states and its head.

    Some heads apply extra transforms or mask logits; a loss without these would train another distribution than the
    model samples from.

    Args:
        model: the model, in the state in which it will be used (adapter on or off).
        vocab_size: ids below it may appear in the probe.

    Raises:
        UnsupportedModelError: the two differ; names the model's class and the difference.
    """
    ids_BL = probe(model, vocab_size)
    with evaluating(model), precise(model, ids_BL.device.type) as dtype:
        hidden_ND = all_hidden(model, ids_BL)
        logits_NV = Head.from_model(model).logits(hidden_ND)
        expected_NV = model(input_ids=ids_BL, use_cache=False).logits.flatten(0, 1).to(logits_NV.dtype)
    gap = ((logits_NV - expected_NV).abs().max() / expected_NV.abs().max().clamp(min=1e-6)).item()
    if not gap <= PROBE_TOLERANCE.get(dtype or hidden_ND.dtype, PROBE_TOLERANCE[torch.bfloat16]):
        raise UnsupportedModelError(
            f"{type(language_model(model)).__name__}: logits computed from the last hidden states and the head differ "
            f"from the model's own by {gap:.1e} of their size. The loss would train another distribution than the "
            "model samples from. Its head has a transform that opsd does not know; use another model class."
        )
