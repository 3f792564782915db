"""The one forward pass: padding on the right changes nothing, and no mask keeps attention from its fast kernels."""

from __future__ import annotations

import pytest
import torch
from conftest import make_gpt2, make_llama
from torch import nn

from opsd.models.forward import all_hidden, backbone, context_length, last_hidden


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_padding_leaves_the_states_as_they_are(make) -> None:  # type: ignore[no-untyped-def]
    model, ids = make().eval(), torch.tensor([[5, 6, 7, 8]])
    padded = torch.cat([ids, torch.zeros(1, 9, dtype=torch.long)], dim=1)
    with torch.no_grad():
        states = last_hidden(model, padded, torch.zeros(4, dtype=torch.long), torch.arange(4))
        assert (states - all_hidden(model, ids)).abs().max() <= 1e-5


def test_attention_gets_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a mask, scaled-dot-product attention takes a slow kernel on a GPU, and copies grouped heads."""
    attention, masks = nn.functional.scaled_dot_product_attention, []

    def seen(*args, attn_mask=None, **kwargs):  # type: ignore[no-untyped-def]
        masks.append(attn_mask)
        return attention(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", seen)
    all_hidden(make_llama(), torch.tensor([[5, 6, 7], [8, 9, 0]]))
    assert masks and all(mask is None for mask in masks)


def test_a_class_that_names_no_inner_model_is_asked_for_its_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 4's `base_model` is the model itself, head included."""
    model = make_llama()
    monkeypatch.setattr(type(model), "base_model_prefix", "nothing_of_this_name")
    assert backbone(model) is model.model


def test_the_context_length_is_the_models_own() -> None:
    assert context_length(make_llama()) == context_length(make_gpt2()) == 512
