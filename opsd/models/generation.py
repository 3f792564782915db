"""Completions of a batch of prompts, greedy or sampled, in the order asked.

Knows a transformers or PEFT model and token ids; makes no prompts and grades nothing. Of the model's own generation
settings only the end-of-sequence ids count: a repetition penalty or a top-k that a checkpoint carries would make the
figures of two models incomparable.

Shapes: `B` rows of a batch, `P` prompt tokens, `C` completion tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from opsd.errors import ConfigError, DataError
from opsd.models.forward import check_lengths, context_length, evaluating, language_model


def generate(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    batch_size: int,
    do_sample: bool = False,
    temperature: float = 1.0,
    seed: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Complete every prompt; completions are returned in the order of the prompts.

    Args:
        model: the model; its mode and generation settings are restored afterwards.
        prompts: token ids, unpadded.
        tokenizer: provides the padding id and one end-of-sequence id; the model's generation settings provide others.
        max_new_tokens: longest completion, in tokens.
        batch_size: prompts per forward pass.
        do_sample: sample from the model's whole distribution instead of taking the likeliest token.
        temperature: divides the logits when sampling.
        seed: makes sampling repeatable at the same batch size; the global generator is left untouched.
        progress: called with the number of finished prompts after each batch.

    Returns:
        One list of ids per prompt, cut after its first end-of-sequence id, which is kept.

    Raises:
        DataError: a prompt is empty, or leaves no room for `max_new_tokens` in the model's context.
        ConfigError: `max_new_tokens` or `batch_size` is below 1, or `temperature` is not above 0.
    """
    _check_settings(prompts, max_new_tokens, batch_size, temperature)
    check_lengths(context_length(model), prompts, [max_new_tokens] * len(prompts), "model")
    stops = stop_ids_of(model, tokenizer)
    # Padding is masked before a prompt and cut away behind an end token: without a padding id any id works.
    pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        # By default transformers samples from the 50 likeliest tokens only.
        **({"temperature": temperature, "top_k": 0} if do_sample else {}),
        use_cache=True,
        eos_token_id=sorted(stops) or None,
        pad_token_id=pad,
    )
    # Longest first: memory that does not suffice shows in the first batch.
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    completions: list[list[int]] = [[] for _ in prompts]
    # Eval mode also disables gradient checkpointing, which would turn the cache off.
    with evaluating(model), _neutral_generation_config(model), _fixed_seed(seed, model.device):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            for index, ids in zip(batch, _complete_batch(model, [prompts[i] for i in batch], config), strict=True):
                completions[index] = _cut_after_stop(ids, stops)
            if progress is not None:
                progress(start + len(batch))
    return completions


def _check_settings(prompts: Sequence[list[int]], max_new_tokens: int, batch_size: int, temperature: float) -> None:
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, and is {value}.\nNothing would be generated. Increase it.")
    if not temperature > 0:
        raise ConfigError(
            f"temperature must be above 0, and is {temperature}: logits are divided by it.\n"
            "For the likeliest token at every step, leave do_sample=False."
        )
    empty = [index for index, ids in enumerate(prompts) if not ids]
    if empty:
        raise DataError(
            f"{len(empty)} of {len(prompts)} prompts have no tokens, first that of row {empty[0]}.\n"
            "A model cannot continue an empty prompt. Check the prompt column and the chat template."
        )


def _complete_batch(
    model: PreTrainedModel | PeftModel, prompts: list[list[int]], config: GenerationConfig
) -> list[list[int]]:
    longest = max(map(len, prompts))
    ids_BP = torch.tensor([[config.pad_token_id] * (longest - len(ids)) + ids for ids in prompts])
    mask_BP = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    output = model.generate(
        input_ids=ids_BP.to(model.device), attention_mask=mask_BP.to(model.device), generation_config=config
    )
    ids_BC = output[:, longest:]
    return ids_BC.tolist()


def _cut_after_stop(ids: list[int], stops: frozenset[int]) -> list[int]:
    end = next((position for position, token in enumerate(ids) if token in stops), len(ids))
    return ids[: end + 1]


def stop_ids_of(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids that end a completion: those of the model's generation settings, and the tokenizer's."""
    settings: Any = language_model(model).generation_config
    ids = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    return frozenset(token for token in [*ids, tokenizer.eos_token_id] if token is not None)


@contextmanager
def _neutral_generation_config(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Give the model empty generation settings for a block: transformers fills an explicit config from the model's."""
    inner = language_model(model)
    settings, inner.generation_config = inner.generation_config, GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = settings


@contextmanager
def _fixed_seed(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
