"""Sampling for evaluation: batches of prompts to completions in the order asked, and rows to an `EvaluationResult`.

Knows a transformers or PEFT model and token ids. Makes no prompts (`prompt_ids` is given) and judges nothing (the
grader is given). Only the end-of-sequence ids of the model's own generation settings count: a repetition penalty or a
top-k that a checkpoint happens to carry would make two models' figures incomparable.

Shapes: `B` rows of a batch, `P` prompt tokens, `C` completion tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from opsd.errors import ConfigError, DataError
from opsd.evaluation.graders import Grader, Row, grade
from opsd.evaluation.questions import question_of
from opsd.evaluation.result import Answer, EvaluationResult
from opsd.models.forward import context_length, evaluating, language_model
from opsd.rollouts import check_lengths


class Generate(Protocol):
    """Gives the completions of rows, as ids: a model, or a teacher as it sees them."""

    def __call__(
        self, rows: Sequence[Row], *, max_new_tokens: int, batch_size: int, **sampling: Any
    ) -> list[list[int]]:
        """Return one completion per row; `sampling` goes to `generate`."""
        ...


def sampler_of(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, prompt_ids: Callable[[Row], list[int]]
) -> Generate:
    """Return the sampler of a model.

    Args:
        model: the model; its mode and settings are as before afterwards.
        tokenizer: of the model.
        prompt_ids: makes a row's prompt.
    """

    def sample(rows: Sequence[Row], **sampling: Any) -> list[list[int]]:
        return generate(model, [prompt_ids(row) for row in rows], tokenizer, **sampling)

    return sample


def evaluate(
    sample: Generate,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    grader: Grader | Callable[[str, Row], bool] | str,
    max_new_tokens: int,
    batch_size: int,
    stop_ids: Collection[int] = (),
    samples: int = 0,
    temperature: float = 1.0,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    **told: Any,
) -> EvaluationResult:
    """Answer every row greedily, and `samples` times more by sampling, and grade the answers.

    Args:
        sample: gives completions, see `sampler_of`.
        rows: prepared rows, a list or a `datasets.Dataset`.
        tokenizer: decodes the completions.
        grader: tells a right text from a wrong one, see `load_grader`.
        max_new_tokens: longest completion, in tokens.
        batch_size: rows per forward pass.
        stop_ids: what ends a completion beside the tokenizer's own end of sequence.
        samples: sampled answers per row.
        temperature: of these.
        seed: of these; the same rows, batch size and seed give the same samples.
        progress: called with the number of finished answers after each batch.
        told: `model` and `shown` of the result.

    Raises:
        DataError: there are no rows, or a prompt is empty or too long for the model's context.
        ConfigError: a budget below 1.
    """
    if len(rows) == 0:
        raise DataError(
            "nothing to evaluate: the split has no rows.\nAn accuracy of no rows is not 0. Check the split."
        )
    if samples < 0:
        raise ConfigError(f"samples counts answers per question, and is {samples}. Use 0 for greedy answers only.")
    rows, judge = list(rows), Grader.parse(grader)
    budget: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    done = (lambda offset: lambda n: progress(offset + n)) if progress else (lambda offset: None)
    again = [row for row in rows for _ in range(samples)]
    completions = sample(rows, **budget, progress=done(0))
    if samples:
        drawn: dict[str, Any] = {"do_sample": True, "temperature": temperature, "seed": seed}
        completions += sample(again, **budget, **drawn, progress=done(len(rows)))
    stops = {*stop_ids, tokenizer.eos_token_id} - {None}
    answers = _graded(completions, rows + again, tokenizer, judge, stops)
    greedy, rest = answers[: len(rows)], answers[len(rows) :]
    return EvaluationResult(
        questions=[question_of(row) for row in rows],
        grader=judge.name,
        greedy=greedy,
        sampled=[rest[i : i + samples] for i in range(0, len(rest), samples)] if samples else [],
        temperature=temperature,
        has_form=judge.read is not None,
        max_new_tokens=max_new_tokens,
        **told,
    )


def _graded(
    completions: Sequence[list[int]],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    judge: Grader,
    stops: Collection[int],
) -> list[Answer]:
    ended = [bool(ids) and ids[-1] in stops for ids in completions]
    # The end token goes by its id: a tokenizer need not know every one of the model's as special.
    texts = [
        tokenizer.decode(ids[:-1] if end else ids, skip_special_tokens=True)
        for ids, end in zip(completions, ended, strict=True)
    ]
    read = [judge.answer(text) for text in texts]
    return [
        Answer(text, verdict, len(ids), end, answer)
        for text, verdict, ids, end, answer in zip(
            texts, grade(judge, texts, rows), completions, ended, read, strict=True
        )
    ]


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
    """Complete every prompt; the completions come in the order of the prompts.

    Args:
        model: the model; its mode and settings are as before afterwards.
        prompts: token ids, unpadded.
        tokenizer: gives the padding id and one end-of-sequence id; the model's generation settings give the others.
        max_new_tokens: longest completion, in tokens.
        batch_size: prompts per forward pass.
        do_sample: sample from the model's whole distribution instead of taking the likeliest token.
        temperature: divides the logits when sampling.
        seed: makes sampling repeatable at the same batch size, and leaves the global generator as it was.
        progress: called with the number of finished prompts after each batch.

    Returns:
        One list of ids per prompt, cut after its first end-of-sequence id, which is kept.

    Raises:
        DataError: a prompt is empty, or leaves no room for `max_new_tokens` in the model's context.
        ConfigError: `max_new_tokens` or `batch_size` is below 1, or `temperature` is not above 0.
    """
    _check(prompts, max_new_tokens, batch_size, temperature)
    check_lengths(context_length(model), prompts, [max_new_tokens] * len(prompts), "model")
    stops = stop_ids_of(model, tokenizer)
    # Padding is masked before a prompt and cut away behind an end token, so without a padding id any id will do.
    pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        # transformers samples from the 50 likeliest tokens unless told otherwise
        **({"temperature": temperature, "top_k": 0} if do_sample else {}),
        use_cache=True,
        eos_token_id=sorted(stops) or None,
        pad_token_id=pad,
    )
    # Longest first: if memory runs out, it does so at once.
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    completions: list[list[int]] = [[] for _ in prompts]
    # Eval mode also rests gradient checkpointing, which would turn the cache off.
    with evaluating(model), _own_settings_aside(model), _seeded(seed, model.device):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            for index, ids in zip(batch, _complete(model, [prompts[i] for i in batch], config), strict=True):
                completions[index] = _cut(ids, stops)
            if progress is not None:
                progress(start + len(batch))
    return completions


def _check(prompts: Sequence[list[int]], max_new_tokens: int, batch_size: int, temperature: float) -> None:
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, and is {value}.\nNothing would be generated. Raise it.")
    if not temperature > 0:
        raise ConfigError(
            f"temperature must be above 0, and is {temperature}: logits are divided by it.\n"
            "For the likeliest token at every step, leave do_sample=False."
        )
    empty = [index for index, ids in enumerate(prompts) if not ids]
    if empty:
        raise DataError(
            f"{len(empty)} of {len(prompts)} prompts have no tokens, first the one of row {empty[0]}.\n"
            "A model cannot continue nothing. Check the prompt column and the chat template."
        )


def _complete(
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


def _cut(ids: list[int], stops: frozenset[int]) -> list[int]:
    end = next((position for position, token in enumerate(ids) if token in stops), len(ids))
    return ids[: end + 1]


def stop_ids_of(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return what ends a completion: the end-of-sequence ids of the model's settings, and the tokenizer's."""
    settings: Any = language_model(model).generation_config
    ids = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    return frozenset(token for token in [*ids, tokenizer.eos_token_id] if token is not None)


@contextmanager
def _own_settings_aside(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Run a block with neutral settings of generation: an explicit config takes from them whatever it leaves open."""
    inner = language_model(model)
    settings, inner.generation_config = inner.generation_config, GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = settings


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
