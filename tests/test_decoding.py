"""A cache that grows in place holds what transformers' own does, and a draw of one number is one from all tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import make_llama
from transformers import DynamicCache

from opsd.errors import NonFiniteLossError
from opsd.models.decoding import Draw, growing_cache


def states(rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 2, tokens, 4), torch.randn(rows, 2, tokens, 3)


def same(ours: DynamicCache, theirs: DynamicCache) -> bool:
    pairs = zip(ours.layers, theirs.layers, strict=True)
    return all(torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values) for a, b in pairs)


CHANGES: dict[str, Any] = {
    "tokens": lambda cache: None,
    "rows chosen": lambda cache: cache.batch_select_indices(torch.tensor([2, 0])),
    "the first rows": lambda cache: cache.batch_select_indices(slice(2)),
    "rows repeated": lambda cache: cache.batch_repeat_interleave(2),
    "tokens cut": lambda cache: cache.crop(-5),
    "emptied": lambda cache: cache.reset(),
}


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_cache_that_grows_in_place_holds_the_same(change: str, begun: bool) -> None:
    torch.manual_seed(0)
    begins = [states(3, 7) for _ in range(2)]
    ours, theirs = growing_cache(None, DynamicCache(begins) if begun else None), DynamicCache(begins if begun else None)
    for tokens in (1, 4, 90, 1):
        for layer in range(2):
            new = states(3, tokens)
            for cache in (ours, theirs):
                cache.update(*new, layer)
    for cache in (ours, theirs):
        CHANGES[change](cache)
    rows = 3 if change == "emptied" else len(ours.layers[0].keys)
    for layer in range(2):
        new = states(rows, 2)
        given = [cache.update(*new, layer) for cache in (ours, theirs)]
        assert all(torch.equal(a, b) for a, b in zip(*given, strict=True))
    assert same(ours, theirs)
    assert ours.get_seq_length() == theirs.get_seq_length()


def test_a_cache_that_two_continue_is_written_by_one_of_them_only() -> None:
    """A beginning that rows share is expanded memory, which nothing may write to."""
    torch.manual_seed(0)
    key, value = states(1, 5)
    shared = [(key.expand(3, -1, -1, -1), value.expand(3, -1, -1, -1))]
    caches = [growing_cache(None, DynamicCache(shared)) for _ in range(2)]
    news = [states(3, 1) for _ in caches]
    for cache, new in zip(caches, news, strict=True):
        cache.update(*new, 0)
    for cache, new in zip(caches, news, strict=True):
        assert torch.equal(cache.layers[0].keys, torch.cat([shared[0][0], new[0]], dim=-2))


def test_old_tokens_are_not_copied_at_each_new_one() -> None:
    cache = growing_cache()
    places = set()
    for _ in range(200):
        cache.update(*states(2, 1), 0)
        places.add(cache.layers[0].keys.data_ptr())
    assert len(places) <= 3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_under_autocast_keys_are_kept_in_16_bits_and_nothing_changes(attention: str) -> None:
    model = make_llama(0, attn_implementation=attention).eval()
    ids = torch.arange(5, 65).view(2, 30)
    caches = [growing_cache(model.config), DynamicCache(config=model.config)]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for part in ids.split([20, 1, 9], dim=1):
            ours, theirs = (model(part, past_key_values=cache).logits for cache in caches)
            assert torch.equal(ours, theirs)
    assert caches[0].layers[0].keys.dtype == torch.bfloat16


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_draw_has_the_probabilities_of_the_softmax(temperature: float) -> None:
    torch.manual_seed(0)
    scores = torch.tensor([2.0, -torch.inf, 0.0, 1.0, -3.0, -torch.inf])
    count = 20_000
    drawn = Draw(temperature)(torch.empty(0), scores.expand(count, -1)).argmax(-1)
    expected = torch.softmax(scores / temperature, -1)
    shares = drawn.bincount(minlength=6) / count
    assert (shares - expected).abs().max() < 5 * (0.25 / count) ** 0.5
    assert not shares[expected == 0].any()


@pytest.mark.parametrize("logit", [torch.nan, torch.inf])
def test_nothing_is_drawn_from_logits_that_are_not_finite(logit: float) -> None:
    scores = torch.zeros(3, 6)
    scores[1, 2] = logit
    with pytest.raises(NonFiniteLossError, match="the model's logits are NaN or infinite"):
        Draw(1.0)(torch.empty(0), scores)
