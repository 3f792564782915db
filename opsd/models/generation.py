"""Completions of a batch of prompts, greedy or sampled, in the order asked; and how every completion is sampled.

Rollouts, evaluation and teachers' samples take their settings from `generation_config` and their ends from
`stop_ids_of`. Of a checkpoint's own generation settings only the end-of-sequence ids count: with its repetition penalty
or top-k, rollouts would come from another distribution than the loss differentiates, and the figures of two models
could not be compared. Knows a transformers or PEFT model and token ids; makes no prompts and grades nothing.

Shapes: `B` rows of a batch, `P` prompt tokens, `C` completion tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
)

from opsd.errors import ConfigError, DataError
from opsd.models.decoding import Draw, growing_cache
from opsd.models.forward import (
    PROBE_TOLERANCE,
    check_lengths,
    context_length,
    embedded_tokens,
    evaluating,
    language_model,
    probe,
)
from opsd.models.passes import can_share_prefixes, pass_on, prefix_for_rows, worthwhile_prefix
from opsd.models.sharding import is_sharded


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
    stop_ids: Collection[int] = (),
    **changes: Any,
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
        stop_ids: ids that end a completion beside those of `stop_ids_of`.
        changes: other settings of `generation_config` that reshape the distribution, such as top_p.

    Returns:
        One list of ids per prompt, cut after its first end-of-sequence id, which is kept.

    Raises:
        DataError: a prompt is empty, or leaves no room for `max_new_tokens` in the model's context.
        ConfigError: `max_new_tokens` or `batch_size` is below 1, or `temperature` is not above 0.
    """
    check_request(context_length(model), prompts, max_new_tokens, batch_size, temperature)
    stops = stop_ids_of(model, tokenizer) | frozenset(stop_ids)
    # Padding is masked before a prompt and cut away behind an end token: without a padding id any id works.
    pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    sampling = {"do_sample": True, "temperature": temperature} if do_sample else {"do_sample": False}
    config = generation_config(stops, pad, max_new_tokens=max_new_tokens, **sampling, **changes)
    # Longest first: memory that does not suffice shows in the first batch.
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    completions: list[list[int]] = [[] for _ in prompts]
    # Eval mode also disables gradient checkpointing, which would turn the cache off.
    with evaluating(model), neutral_settings(model), _fixed_seed(seed, model.device):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            for index, ids in zip(batch, complete_batch(model, [prompts[i] for i in batch], config), strict=True):
                completions[index] = cut_after_stop(ids, stops)
            if progress is not None:
                progress(start + len(batch))
    return completions


def check_request(
    limit: int | None, prompts: Sequence[list[int]], max_new_tokens: int, batch_size: int, temperature: float
) -> None:
    """Refuse what cannot be completed; the arguments are those of `generate`, after the longest sequence in tokens.

    Raises:
        DataError: a prompt is empty, or leaves no room for `max_new_tokens` in the model's context.
        ConfigError: `max_new_tokens` or `batch_size` is below 1, or `temperature` is not above 0.
    """
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
    check_lengths(limit, prompts, [max_new_tokens] * len(prompts), "model")


def complete_batch(
    model: PreTrainedModel | PeftModel, prompts: Sequence[list[int]], config: GenerationConfig
) -> list[list[int]]:
    """Complete prompts side by side; what they begin with alike is computed once, and rows that have ended leave.

    Args:
        model: in eval mode, with neutral generation settings.
        prompts: token ids, none of them empty.
        config: settings of `generation_config`.

    Returns:
        One list of ids per prompt; behind its end a row may go on.
    """
    divides = _may_divide(model, config)
    ids_BL, mask_BL, past = _begun(model, prompts, config, divides)
    completions: list[list[int]] = [[] for _ in prompts]
    rows, ends = list(range(len(prompts))), torch.tensor(config.eos_token_id or [], device=model.device)
    last = ids_BL.shape[1] + config.max_new_tokens
    config, draws = _drawing(config, model.device)
    while rows:
        left = last - ids_BL.shape[1]
        enough = _EnoughHaveEnded(ends, ids_BL.shape[1], last, pass_on(model)) if divides else None
        output = model.generate(
            input_ids=ids_BL, attention_mask=mask_BL, past_key_values=past, generation_config=_with(config, left),
            logits_processor=draws, stopping_criteria=[enough] if enough else None,
        )  # fmt: skip
        ids_BL, past = output.sequences, output.past_key_values
        new_BC = ids_BL[:, mask_BL.shape[1] :]
        for row, ids in zip(rows, new_BC.tolist(), strict=True):
            completions[row] += ids
        stays = ~torch.isin(new_BC, ends).any(-1) & (new_BC.shape[1] < left)
        kept = stays.nonzero()[:, 0]
        rows = [row for row, is_kept in zip(rows, stays.tolist(), strict=True) if is_kept]
        if rows:
            past.batch_select_indices(kept)
            mask_BL = torch.cat([mask_BL, torch.ones_like(new_BC)], dim=-1)[kept]
            ids_BL = ids_BL[kept]
    return completions


def _begun(
    model: Any, prompts: Sequence[list[int]], config: GenerationConfig, divides: bool
) -> tuple[Tensor, Tensor, Cache | None]:
    """Return prompts as ids and mask, padded, and the keys and values that several of them have in common, if any.

    That is what all begin with, or whole prompts: those of a group are the same.
    """
    pad, longest = config.pad_token_id or 0, max(map(len, prompts))
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    prefix = worthwhile_prefix(model, prompts) if divides else 0
    if prefix and not _pads_behind_prefix(model, longest + config.max_new_tokens):
        prefix = 0
    if divides and (len(prompts) - len(distinct)) * (longest - 1) > max((len(prompts) - 1) * prefix, pass_on(model)):
        ids_BL, mask_BL = _padded([list(ids) for ids in distinct], 0, pad, model.device)
        once = generation_config(config.eos_token_id or [], pad, max_new_tokens=1, do_sample=False)
        given = {"input_ids": ids_BL, "attention_mask": mask_BL, "generation_config": _with(once, 1)}
        past = model.generate(past_key_values=growing_cache(), **given).past_key_values
        past.crop(-1)  # the last token of a prompt begins its completion
        number = {ids: row for row, ids in enumerate(distinct)}
        chosen = torch.tensor([number[tuple(ids)] for ids in prompts], device=model.device)
        past.batch_select_indices(chosen)
        return ids_BL[chosen], mask_BL[chosen], past
    ids_BL, mask_BL = _padded(prompts, prefix, pad, model.device)
    begun = prefix_for_rows(model, ids_BL[0, :prefix], len(prompts)) if prefix else None
    return ids_BL, mask_BL, growing_cache(model.config, begun) if divides else None


# Settings that ask for the same of every token, wherever a call of `generate` began.
OF_EVERY_TOKEN = {
    "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "eos_token_id",
    "pad_token_id", "bos_token_id", "max_new_tokens", "use_cache", "cache_implementation", "disable_compile",
    "transformers_version", "_from_model_config",
}  # fmt: skip


def _may_divide(model: nn.Module, config: GenerationConfig) -> bool:
    """Tell whether a batch may begin with a shared prefix and go on without rows that have ended.

    It takes a cache of keys and values that grows, and settings that do not count from where a call begins. Processes
    that exchange a sharded model's weights make the same passes.
    """
    grows = config.use_cache and config.cache_implementation in (None, "dynamic") and not is_sharded(model)
    return grows and config.to_diff_dict().keys() <= OF_EVERY_TOKEN and can_share_prefixes(model)


def _pads_behind_prefix(model: nn.Module, longest: int) -> bool:
    """Tell whether padding between a prefix and the rest of a prompt changes nothing.

    It does where attention counts places and not positions (ALiBi in MPT), or reaches back over a window that is
    shorter than the sequence.
    """
    inside = language_model(model)
    sizes = inside.config.get_text_config().to_dict().items()  # type: ignore[union-attr, operator]
    if any(isinstance(n, int) and 0 < n < longest for name, n in sizes if "window" in name or "chunk" in name):
        return False
    if inside not in _PADS:
        _PADS[inside] = _same_behind_padding(model)
    return _PADS[inside]


_PADS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _same_behind_padding(model: Any) -> bool:
    """Compare the next token's logits behind a prefix, padding and the rest with those without the padding."""
    config = generation_config(
        [], 0, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    ids, prefix = probe(model, embedded_tokens(model))[0].tolist(), 3
    logits = []
    with torch.no_grad():
        for padding in (0, 4):
            ids_BL = torch.tensor([ids[:prefix] + [0] * padding + ids[prefix:]], device=model.device)
            mask_BL = torch.ones_like(ids_BL)
            mask_BL[:, prefix : prefix + padding] = 0
            output = model.generate(input_ids=ids_BL, attention_mask=mask_BL, generation_config=config)
            logits.append(output.logits[0].float())
    gap = float((logits[1] - logits[0]).abs().max() / logits[0].abs().max().clamp(min=1e-6))
    return gap <= PROBE_TOLERANCE[torch.bfloat16]


def _padded(prompts: Sequence[list[int]], prefix: int, pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return prompts as ids and mask, padded behind the tokens that they begin with alike: their ends are aligned."""
    longest = max(map(len, prompts))
    ids_BL = [ids[:prefix] + [pad] * (longest - len(ids)) + ids[prefix:] for ids in prompts]
    mask_BL = [[1] * prefix + [0] * (longest - len(ids)) + [1] * (len(ids) - prefix) for ids in prompts]
    return torch.tensor(ids_BL, device=device), torch.tensor(mask_BL, device=device)


# Settings that leave out tokens, and what leaves out none.
LEAVES_OUT = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}


def _drawing(config: GenerationConfig, device: torch.device) -> tuple[GenerationConfig, list[LogitsProcessor] | None]:
    """Return settings, and what draws in place of transformers: on a CPU, where no setting changes the distribution."""
    given = config.to_diff_dict()
    is_whole = given.keys() <= OF_EVERY_TOKEN and all(
        given.get(name) in (None, neutral) for name, neutral in LEAVES_OUT.items()
    )
    if device.type != "cpu" or not config.do_sample or not is_whole:
        return config, None
    greedy, temperature = copy.copy(config), 1.0 if config.temperature is None else config.temperature
    greedy.do_sample, greedy.temperature = False, None
    for name in LEAVES_OUT:
        setattr(greedy, name, None)
    return greedy, [Draw(temperature)]


def _with(config: GenerationConfig, max_new_tokens: int) -> GenerationConfig:
    settings = copy.copy(config)
    settings.max_new_tokens, settings.return_dict_in_generate = max_new_tokens, True
    settings.cache_implementation = None if config.cache_implementation == "dynamic" else config.cache_implementation
    return settings


class _EnoughHaveEnded(StoppingCriteria):
    """Interrupts a batch when rows that have ended would be computed to its end, for nothing.

    Args:
        ends: ids that end a completion.
        prompt: tokens at which completions begin.
        last: tokens at which they are cut.
        a_pass: tokens that are worth an interruption.
    """

    def __init__(self, ends: Tensor, prompt: int, last: int, a_pass: int):
        self._ends, self._prompt, self._last, self._a_pass = ends, prompt, last, a_pass

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        has_ended = torch.isin(input_ids[:, self._prompt :], self._ends).any(-1)
        left = self._last - input_ids.shape[1]
        return (has_ended.sum() * left >= self._a_pass).expand(len(input_ids)) & (left > 0)


def generation_config(
    stops: Collection[int], pad: int | None, *, max_new_tokens: int, do_sample: bool, **changes: Any
) -> GenerationConfig:
    """Return the settings of one call of a model's `generate`: its whole distribution, except for `changes`.

    Args:
        stops: ids that end a completion.
        pad: id that fills a row after its end.
        max_new_tokens: longest completion, in tokens.
        do_sample: sample instead of taking the likeliest token.
        changes: settings of transformers' GenerationConfig, such as temperature; None leaves one neutral.
    """
    # By default transformers samples from the 50 likeliest tokens only.
    neutral: dict[str, Any] = {"top_k": 0} if do_sample else {}
    given = {name: value for name, value in changes.items() if value is not None}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        eos_token_id=sorted(stops) or None,
        pad_token_id=pad,
        **{"use_cache": True, **neutral, **given},
    )


@contextmanager
def neutral_settings(model: nn.Module) -> Iterator[None]:
    """Give a model empty generation settings for a block: transformers fills an explicit config from the model's."""
    # PEFT hands a wrapper's own settings, where it has any, to the model inside.
    holders: list[Any] = [each for each in (model, language_model(model)) if "generation_config" in vars(each)]
    settings = [holder.generation_config for holder in holders]
    try:
        for holder in holders:
            holder.generation_config = GenerationConfig()
        yield
    finally:
        for holder, value in zip(holders, settings, strict=True):
            holder.generation_config = value


def cut_after_stop(ids: list[int], stops: Collection[int]) -> list[int]:
    """Return a completion up to its first end-of-sequence id, which is kept."""
    end = next((position for position, token in enumerate(ids) if token in stops), len(ids))
    return ids[: end + 1]


def stop_ids_of(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids that end a completion: those of the model's generation settings, and the tokenizer's."""
    ids = _as_ids(_settings_of(model).eos_token_id)
    return frozenset(ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id])


def add_stop_ids(model: nn.Module, ids: int | Collection[int] | None) -> None:
    """Add ids that end a completion to the model's generation settings, which are saved with the model.

    Raises:
        ConfigError: an id that the model does not embed.
    """
    added, size = _as_ids(ids), embedded_tokens(model)
    if beyond := [token for token in added if not 0 <= token < size]:
        raise ConfigError(
            f"eos_token_id {beyond[0]} is no token of this model, which embeds {size:,}: no completion would end with "
            "it. Name ids of the tokenizer: tokenizer.convert_tokens_to_ids('<|im_end|>')."
        )
    settings = _settings_of(model)
    if not set(added) <= set(known := _as_ids(settings.eos_token_id)):
        settings.eos_token_id = list(dict.fromkeys([*known, *added]))


def _as_ids(ids: int | Collection[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _settings_of(model: nn.Module) -> GenerationConfig:
    return model.generation_config


def forked_generators(device: torch.device) -> AbstractContextManager[None]:
    """Return a block after which torch draws as if the block had drawn nothing, on the CPU and on a device."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


@contextmanager
def _fixed_seed(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    with forked_generators(device):
        torch.manual_seed(seed)
        yield
