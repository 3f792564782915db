"""Generation against a loop over whole forward passes, statistics against theory."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from conftest import make_gpt2, make_llama, make_rows
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from opsd.errors import ConfigError, DataError, OPSDWarning
from opsd.evaluation import (
    EvaluationResult,
    evaluate,
    generate,
    generate_with,
    proportion_interval,
    stop_ids_of,
)
from opsd.models.passes import can_share_prefixes

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15], [16, 17, 18, 19, 20], [21, 22]]
BUDGET = 8


def by_hand(model: PreTrainedModel, prompt: list[int], stops: set[int], budget: int = BUDGET) -> list[int]:
    """The slow twin of greedy `generate`: a whole forward pass per token, no cache, no padding, no batch."""
    ids = list(prompt)
    model.eval()
    with torch.no_grad():
        while len(ids) < len(prompt) + budget and (len(ids) == len(prompt) or ids[-1] not in stops):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


# ----------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_greedy_batches_equal_one_by_one_in_the_order_asked(
    make: Callable[[], PreTrainedModel], batch_size: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make()
    got = generate(model, PROMPTS, tokenizer, max_new_tokens=BUDGET, batch_size=batch_size)
    assert got == [by_hand(model, prompt, {2}) for prompt in PROMPTS]


@pytest.mark.parametrize("pad_token", ["<|pad|>", "<|im_end|>", None])
def test_completion_ends_with_the_first_end_token_of_model_or_tokenizer(
    pad_token: str | None, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_llama()
    own = by_hand(model, PROMPTS[0], set())[2]
    expected = [by_hand(model, prompt, {own, 2}) for prompt in PROMPTS]
    assert expected[0][-1] == own
    for declared, eos_token in ((own, "<|im_end|>"), ([2, own], None)):
        model.generation_config.eos_token_id = declared
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer, eos_token=eos_token, pad_token=pad_token
        )
        assert generate(model, PROMPTS, tokenizer, max_new_tokens=BUDGET, batch_size=3) == expected


def test_end_token_of_the_tokenizer_alone_is_enough() -> None:
    model = make_llama()
    own = by_hand(model, PROMPTS[0], set())[2]
    model.generation_config.eos_token_id = None
    vocabulary = {("end" if token == own else f"word{token}"): token for token in range(400)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="word0")), eos_token="end"
    )
    got = generate(model, PROMPTS[:1], tokenizer, max_new_tokens=BUDGET, batch_size=1)
    assert got == [by_hand(model, PROMPTS[0], {own})]


@pytest.mark.parametrize("lora", [False, True])
def test_settings_of_the_model_neither_leak_nor_get_lost(
    lora: bool, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """Hub checkpoints ship do_sample, top_k, a repetition penalty; transformers merges them into explicit settings."""
    model = make_llama()
    expected = [by_hand(model, prompt, {2}) for prompt in PROMPTS]
    settings = model.generation_config
    settings.update(do_sample=True, temperature=0.6, top_k=20, top_p=0.9, repetition_penalty=5.0, min_new_tokens=1)
    settings.suppress_tokens = expected[0]
    student = get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if lora else model
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = generate(student, PROMPTS, tokenizer, max_new_tokens=BUDGET, batch_size=2)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert got == expected
    assert model.generation_config is settings
    assert not caplog.records


def test_sampling_draws_from_the_whole_distribution_at_its_temperature(tokenizer: PreTrainedTokenizerFast) -> None:
    """transformers' own default keeps the 50 likeliest tokens."""
    model, draws, temperature = make_llama(), 2000, 2.0
    got = generate(
        model,
        [PROMPTS[0]] * draws,
        tokenizer,
        max_new_tokens=1,
        batch_size=500,
        do_sample=True,
        temperature=temperature,
        seed=0,
    )
    with torch.no_grad():
        chances = (model(torch.tensor([PROMPTS[0]])).logits[0, -1] / temperature).softmax(-1)
    unlikely = set(chances.argsort(descending=True)[50:].tolist())
    expected = float(chances[list(unlikely)].sum())
    assert expected > 0.1
    share = sum(ids[0] in unlikely for ids in got) / draws
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / draws)


def test_seed_repeats_a_sample_and_leaves_the_global_generator_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_llama()

    def sample(seed: int | None) -> list[list[int]]:
        return generate(model, PROMPTS, tokenizer, max_new_tokens=4, batch_size=2, do_sample=True, seed=seed)

    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert sample(1) == sample(1) != sample(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert sample(None) != sample(None)


def test_modes_of_all_modules_are_restored_even_after_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_llama().train()
    model.model.layers[0].eval()  # as frozen parts are kept
    modes = [module.training for module in model.modules()]
    seen: list[bool] = []

    def interrupt(finished: int) -> None:
        seen.append(model.training)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, PROMPTS, tokenizer, max_new_tokens=1, batch_size=2, progress=interrupt)
    assert seen == [False]
    assert [module.training for module in model.modules()] == modes


def test_dropout_is_off_and_the_cache_on_under_gradient_checkpointing(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_llama(attention_dropout=0.5)
    expected = [by_hand(model, prompt, {2}) for prompt in PROMPTS]
    model.train().gradient_checkpointing_enable()
    model.config.use_cache = False  # as trainers set it
    assert can_share_prefixes(model)  # looks once at each model
    widths: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    assert generate(model, PROMPTS, tokenizer, max_new_tokens=BUDGET, batch_size=64) == expected
    assert widths == [7] + [1] * (BUDGET - 1)
    assert model.is_gradient_checkpointing


def test_progress_counts_finished_prompts(tokenizer: PreTrainedTokenizerFast) -> None:
    seen: list[int] = []
    generate(make_llama(), PROMPTS, tokenizer, max_new_tokens=1, batch_size=2, progress=seen.append)
    assert seen == [2, 4, 5]


def test_longest_prompts_go_first_so_that_batches_waste_little_padding(tokenizer: PreTrainedTokenizerFast) -> None:
    model, shapes = make_llama(), []
    assert can_share_prefixes(model)
    model.model.register_forward_pre_hook(
        lambda _, args, named: shapes.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    generate(model, PROMPTS, tokenizer, max_new_tokens=1, batch_size=2)
    assert shapes == [(2, 7), (2, 3), (1, 1)]


def test_no_prompts_give_no_completions(tokenizer: PreTrainedTokenizerFast) -> None:
    assert generate(make_llama(), [], tokenizer, max_new_tokens=1, batch_size=2) == []


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"max_new_tokens": 0}, ConfigError),
        ({"batch_size": 0}, ConfigError),
        ({"temperature": 0.0}, ConfigError),
        ({"temperature": float("nan")}, ConfigError),
        ({"prompts": [[5], []]}, DataError),
        ({"prompts": [[5] * 512]}, DataError),
    ],
)
def test_generation_that_cannot_work_is_refused(
    change: dict[str, object], error: type[Exception], tokenizer: PreTrainedTokenizerFast
) -> None:
    arguments = {"prompts": PROMPTS, "max_new_tokens": 1, "batch_size": 2, **change}
    with pytest.raises(error, match=next(iter(change)).removesuffix("s")):
        generate(make_llama(), tokenizer=tokenizer, **arguments)


def run_evaluation(
    model: PreTrainedModel, rows: object, tokenizer: PreTrainedTokenizerFast, **changes: object
) -> EvaluationResult:
    def prompt_ids(row: dict[str, object]) -> list[int]:
        return tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)

    settings = {"grader": "exact", "max_new_tokens": BUDGET, "batch_size": 5, **changes}
    return evaluate(
        generate_with(model, tokenizer, prompt_ids), rows, tokenizer, stop_ids=stop_ids_of(model, tokenizer), **settings
    )


def test_evaluation_grades_each_row_by_its_own_text(tokenizer: PreTrainedTokenizerFast) -> None:
    model, rows = make_llama(), make_rows()
    texts = run_evaluation(model, rows, tokenizer, grader=lambda text, row: True).texts
    answered = [
        {**row, "answer": text if i % 3 else "wrong"} for i, (row, text) in enumerate(zip(rows, texts, strict=True))
    ]
    assert len(set(texts)) > 6
    result = run_evaluation(model, Dataset.from_list(answered), tokenizer)
    assert result.correct == [i % 3 != 0 for i in range(12)]
    assert (result.n, result.ungraded, result.texts) == (12, [], texts)
    assert result.accuracy == pytest.approx(8 / 12)
    assert result.interval == proportion_interval([True] * 8 + [False] * 4)


def test_evaluation_counts_lengths_and_truncation_and_hides_the_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    model, rows = make_llama(), make_rows()
    prompts = [
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False) for row in rows
    ]
    end = by_hand(model, prompts[0], set())[3]  # an ordinary token that ends the text by the model's settings only
    model.generation_config.eos_token_id = [2, end]
    expected = [by_hand(model, prompt, {2, end}) for prompt in prompts]
    result = run_evaluation(model, rows, tokenizer, grader=lambda text, row: True)
    assert result.lengths == [len(ids) for ids in expected]
    assert result.truncated == sum(ids[-1] not in {2, end} for ids in expected)
    assert 0 < result.truncated < 12
    assert result.texts[0] == tokenizer.decode(expected[0][:-1], skip_special_tokens=True)


def test_row_on_which_the_grader_fails_is_counted_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = make_rows(4)
    rows[2]["answer"] = None
    with pytest.warns(OPSDWarning, match="1 of 4 rows, first on row 2"):
        result = run_evaluation(make_llama(), rows, tokenizer, max_new_tokens=1)
    assert result.ungraded == [2]
    assert result.correct[2] is False


def test_empty_split_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="no rows"):
        run_evaluation(make_llama(), [], tokenizer)
