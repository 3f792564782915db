"""What sampling a token costs beside the model: keys and values that grow in place, and a draw from all tokens.

transformers copies every key and value at each token, and its draw takes a random number for each token of the
vocabulary. Here a cache has room for the tokens to come, and a draw takes one number. Knows tensors and transformers'
caches; nothing of prompts or settings.

Shapes: `B` rows of a batch, `H` heads, `L` tokens, `D` width of a head, `V` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from opsd.errors import NonFiniteLossError

ROOM = 64  # tokens for which there is room beside a quarter of those that are there


class GrowingLayer(DynamicLayer):
    """Keys and values of a layer, in memory that has room for more: a token is written, and the others stay.

    Under autocast they are stored as attention takes them, which casts them anyway.
    """

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._rooms: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens; returns all keys and values.

        Args:
            key_states: float, (B, H, L, D).
            value_states: float, (B, H, L, D of values).
            args: not used, as in transformers.
            kwargs: likewise.
        """
        if torch.is_autocast_enabled(key_states.device.type):
            dtype = torch.get_autocast_dtype(key_states.device.type)
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._with("keys", self.keys, key_states)
        self.values = self._with("values", self.values, value_states)
        return self.keys, self.values

    def _with(self, name: str, old: Tensor, new: Tensor) -> Tensor:
        start = old.shape[-2] if old.numel() else 0
        length = start + new.shape[-2]
        room = self._rooms.get(name)
        # Rows that were chosen, or another dtype, are other memory; a cache that was cut is the same, and goes on.
        is_ours = room is not None and start and old.data_ptr() == room.data_ptr() and old.shape[0] == room.shape[0]
        if room is None or not is_ours or length > room.shape[-2]:
            size = [*new.shape[:-2], length + length // 4 + ROOM, new.shape[-1]]
            room = self._rooms[name] = new.new_empty(size)
            if start:
                room[..., :start, :] = old
        room[..., start:length, :] = new
        return room[..., :length, :]


def growing_cache(config: PreTrainedConfig | None = None, filled: DynamicCache | None = None) -> DynamicCache:
    """Return a cache that grows in place, in all layers that keep all tokens.

    Args:
        config: of the model, whose layers may keep a window of tokens; without one all layers keep all.
        filled: keys and values that it begins with, if any.
    """
    cache = DynamicCache(config=config) if filled is None else filled
    cache.layer_class_to_replicate = cache.layer_class_to_replicate and GrowingLayer
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[number] = grows = GrowingLayer()
            if layer.is_initialized:
                grows.lazy_initialization(layer.keys, layer.values)
                grows.keys, grows.values = layer.keys, layer.values
    return cache


class Draw(LogitsProcessor):
    """Draws a token from the whole distribution, and leaves it as the likeliest: for greedy decoding.

    One uniform number a row chooses from the sums of the probabilities, in float64. `torch.multinomial` draws an
    exponential for each token of the vocabulary, on one thread of a CPU.

    Args:
        temperature: divides the logits.
    """

    def __init__(self, temperature: float):
        self._temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (B, V) of which one a row is not -inf.

        Args:
            input_ids: not used.
            scores: logits, (B, V).

        Raises:
            NonFiniteLossError: logits are NaN or infinite.
        """
        sums_BV = torch.softmax(scores / self._temperature, dim=-1).cumsum(-1, dtype=torch.float64)
        if sums_BV[:, -1].isnan().any():
            raise NonFiniteLossError(
                "A token cannot be drawn: the model's logits are NaN or infinite.\nIts weights are damaged, or they "
                "overflow in float16. Load it in bfloat16 or float32, and check the checkpoint that it came from."
            )
        at_B1 = torch.rand(len(scores), 1, dtype=torch.float64, device=scores.device) * sums_BV[:, -1:]
        drawn_B1 = torch.searchsorted(sums_BV, at_B1, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn_B1, 0.0)
