"""The one forward pass, on either side of the padding."""

from __future__ import annotations

import pytest
import torch
from conftest import make_gpt2, make_llama

from opsd.models.forward import context_length, last_hidden


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
@pytest.mark.parametrize("left", [True, False])
def test_padding_on_either_side_leaves_the_states_as_they_are(make, left: bool) -> None:  # type: ignore[no-untyped-def]
    """Without position ids, left padding moves a model with learned positions by whole nats."""
    model = make().eval()
    ids, pad = [5, 6, 7, 8], [0] * 9
    row = pad + ids if left else ids + pad
    mask = torch.tensor([[int(token != 0) for token in row]])
    with torch.no_grad():
        padded = last_hidden(model, torch.tensor([row]), mask, mask.bool())
        alone = last_hidden(model, torch.tensor([ids]), torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4) == 1)
    assert (padded - alone).abs().max() <= 1e-5


def test_the_context_length_is_the_models_own() -> None:
    assert context_length(make_llama()) == context_length(make_gpt2()) == 512
