"""Completions side by side are those of each prompt alone, with a shared beginning, and where rows leave."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import make_llama, make_tokenizer
from test_families import FAMILIES, make_model
from transformers import AutoConfig, AutoModelForCausalLM

from opsd.models import passes
from opsd.models.generation import complete_batch, cut_after_stop, generate, generation_config, neutral_settings

ENDS, LONGEST = list(range(2, 60)), 24  # many tokens end a completion, so that rows end at different times


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "PASS", 1)


def prompts(common: int, count: int = 9) -> list[list[int]]:
    """Uneven prompts, of which one is no longer than what all begin with."""
    draw = torch.Generator().manual_seed(common)
    shared = torch.randint(60, 400, (common,), generator=draw).tolist()
    return [shared + torch.randint(60, 400, (1 + 3 * row % 7,), generator=draw).tolist() for row in range(count)]


def completed(model: Any, given: list[list[int]], ends: list[int] = ENDS, **settings: Any) -> list[list[int]]:
    config = generation_config(ends, 0, max_new_tokens=LONGEST, **{"do_sample": False, **settings})
    with torch.no_grad(), neutral_settings(model):
        return [cut_after_stop(ids, ends) for ids in complete_batch(model.eval(), given, config)]


class Computed:
    """Tokens that go through a model."""

    def __init__(self, model: Any):
        self.shapes: list[torch.Size] = []
        model.get_input_embeddings().register_forward_pre_hook(lambda _, given: self.shapes.append(given[0].shape))

    @property
    def tokens(self) -> int:
        return sum(shape.numel() for shape in self.shapes)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_groups_are_computed_once(family: str) -> None:
    model = make_model(family)
    given = [each for each in prompts(0, 4) for _ in range(3)]
    given += [[*each, *range(70, 170)] for each in given]  # also behind a sliding window
    computed = Computed(model)
    answers = completed(model, given)
    once = (8, max(map(len, given)))
    assert (once in computed.shapes) is (family != "lfm2"), "convolutions keep states of their own"
    assert answers == [completed(model, [each])[0] for each in given]


@pytest.mark.parametrize("common", [0, 90])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_each_prompt_alone(family: str, common: int) -> None:
    """Also behind a sliding window of 64 tokens."""
    model, given = make_model(family), prompts(common)
    alone = [completed(model, [each])[0] for each in given]
    assert completed(model, given) == alone
    assert len({len(ids) for ids in alone}) > 1 or family.startswith("gemma"), "they end at different times"


def test_a_beginning_is_computed_once_and_rows_that_have_ended_leave() -> None:
    model, given = make_llama(0), prompts(90)
    computed = Computed(model)
    answers = completed(model, given)
    rest = max(map(len, given)) - 90
    assert (1, 90) in computed.shapes
    needed = 90 + len(given) * rest + sum(len(ids) - 1 for ids in answers)
    probes = 3 * 14
    assert computed.tokens <= 1.3 * needed + probes < 0.6 * len(given) * (90 + rest + LONGEST)


def test_a_cache_that_cannot_grow_is_left_as_it_is() -> None:
    model, given = make_llama(0), prompts(90)
    expected = completed(model, given)
    assert completed(model, given, cache_implementation="static", disable_compile=True) == expected
    assert completed(model, given, use_cache=False) == expected


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"top_k": 5}], ids=str)
def test_samples_come_from_the_models_own_distribution(settings: dict[str, Any]) -> None:
    """First tokens of 4,000 rows; and second ones, after a quarter of the rows have ended and left."""
    model, prompt = make_llama(0).eval(), [5, 6, 7, 8]

    def next_token(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1] / settings.get("temperature", 1.0)
        if "top_k" in settings:
            logits[logits < logits.topk(settings["top_k"]).values[-1]] = -torch.inf
        return logits.softmax(-1)

    first = next_token(prompt)
    order = first.argsort(descending=True)
    ends = order[: int((first[order].cumsum(-1) < 0.3).sum()) + 1].tolist()
    goes_on = int(order[len(ends)])
    second = next_token([*prompt, goes_on])
    config = generation_config(ends, 0, max_new_tokens=2, do_sample=True, **settings)
    torch.manual_seed(0)
    computed = Computed(model)
    with torch.no_grad(), neutral_settings(model):
        answers = complete_batch(model, [prompt] * 4000, config)
    assert computed.shapes[-1][0] < 3000
    _fits([ids[0] for ids in answers], first)
    _fits([ids[1] for ids in answers if ids[0] == goes_on], second)


@pytest.mark.parametrize(
    "settings", [{"watermarking_config": {"bias": 50.0}}, {"min_p": 0.1}, {"typical_p": 0.5}], ids=str
)
def test_settings_that_change_the_distribution_are_drawn_by_transformers(settings: dict[str, Any]) -> None:
    model, given = make_llama(0).eval(), [[5, 6, 7, 8]] * 200
    config = generation_config([], 0, max_new_tokens=3, do_sample=True, **settings)
    with torch.no_grad(), neutral_settings(model):
        torch.manual_seed(0)
        ours = complete_batch(model, given, config)
        torch.manual_seed(0)
        theirs = model.generate(torch.tensor(given), generation_config=config)
    assert ours == theirs[:, 4:].tolist()


def _fits(tokens: list[int], p: torch.Tensor) -> None:
    """Pearson's test over the tokens that are expected five times, and the rest as one."""
    expected = p.double() * len(tokens)
    often = expected >= 5
    counts = torch.tensor(tokens).bincount(minlength=len(p)).double()
    pairs = [(counts[often], expected[often])]
    if expected[~often].sum() > 0:
        pairs.append((counts[~often].sum()[None], expected[~often].sum()[None]))
    assert not counts[expected == 0].any()
    seen, hoped = (torch.cat(each) for each in zip(*pairs, strict=True))
    assert ((seen - hoped) ** 2 / hoped).sum() < len(seen) + 5 * (2 * len(seen)) ** 0.5


def test_no_row_ends_and_all_rows_end_at_once() -> None:
    model, given = make_llama(0), prompts(20)
    assert all(len(ids) == LONGEST for ids in completed(model, given, ends=[]))
    assert all(len(ids) == 1 for ids in completed(model, given, ends=list(range(400))))
    assert generate(model, given, make_tokenizer(), max_new_tokens=3, batch_size=4)


COUNTING = {  # settings that count from where a call begins
    "min_new_tokens": 4, "begin_suppress_tokens": list(range(2, 200)), "encoder_repetition_penalty": 1.5,
    "exponential_decay_length_penalty": (2, 1.5), "repetition_penalty": 1.3, "no_repeat_ngram_size": 2,
}  # fmt: skip


@pytest.mark.parametrize("setting", COUNTING)
def test_settings_that_count_from_the_prompt_count_from_there(setting: str) -> None:
    """A batch that goes on without some rows would begin to count anew."""
    model, given = make_llama(0), [[number, *range(70, 76)] for number in range(60, 76)]
    alone = [completed(model, [each], **{setting: COUNTING[setting]})[0] for each in given]
    assert completed(model, given, **{setting: COUNTING[setting]}) == alone


@pytest.mark.parametrize("common", [0, 90])
def test_a_cache_that_is_named_grows_as_well(common: int) -> None:
    model, given = make_llama(0), prompts(common)
    assert completed(model, given, cache_implementation="dynamic") == completed(model, given)


BY_PLACE: dict[str, dict[str, Any]] = {  # their attention counts places, or has a window of another name
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 512},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gpt_neo": {
        "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
        "window_size": 32, "max_position_embeddings": 512,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", BY_PLACE)
def test_padding_behind_a_shared_beginning_stands_for_no_token(family: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=400, initializer_range=0.2, eos_token_id=2, **BY_PLACE[family])
    model, given = AutoModelForCausalLM.from_config(config), prompts(90)
    assert completed(model, given) == [completed(model, [each])[0] for each in given]
