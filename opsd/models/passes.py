"""Passes without gradient over sequences of uneven length: a beginning in common is computed once, little is padded.

A teacher's prompts begin alike: the system turn and the worked examples are those of every row, and rollouts of one row
have the whole prompt in common. Its keys and values are computed once, and each sequence goes on from there. Rows of
about the same length share a pass. Knows a model, token ids and positions; nothing of rollouts, teachers or losses.

Shapes: B rows · L tokens of a padded sequence · P tokens of a shared prefix · N scored positions (packed) · D width
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from opsd.models.forward import PROBE_TOLERANCE, all_hidden, evaluating, last_hidden, precise, probe

Ids = list[int]
# Tokens that one more pass must save: a pass of few tokens costs what reading the weights does.
PASS = 512


@dataclass(frozen=True)
class Family:
    """Rows that begin alike, and the passes that compute the rest of them.

    >>> plan_passes([[5, 6, 7, 8], [5, 6, 7, 9]], [3, 3])  # too short to be worth another pass
    [Family(prefix=0, passes=((0, 1),))]

    Args:
        prefix: tokens at the beginning that are the same in all rows and are computed once; 0 for none.
        passes: rows of each pass.
    """

    prefix: int
    passes: tuple[tuple[int, ...], ...]

    def cost(self, lengths: Sequence[int]) -> int:
        """Return the tokens that are computed, padding included, and PASS for each pass.

        Args:
            lengths: of all sequences, in tokens.
        """
        rest = (len(rows) * (max(lengths[row] for row in rows) - self.prefix) + PASS for rows in self.passes)
        return sum(rest) + (self.prefix + PASS if self.prefix else 0)


def plan_passes(sequences: Sequence[Ids], first: Sequence[int], *, shares: bool = True) -> list[Family]:
    """Divide sequences into families and passes, so that few tokens are computed.

    Args:
        sequences: token ids; those of a row that needs no state may be empty, and are in no pass.
        first: per row, the first position whose state is needed.
        shares: whether prefixes may be shared.
    """
    rows = [row for row, ids in enumerate(sequences) if ids]
    lengths = [len(ids) for ids in sequences]
    by_prompt: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for row in rows:
        by_prompt[tuple(sequences[row][: first[row]])].append(row)
    groups = [group for group in by_prompt.values() if len(group) > 1]
    alone = [group[0] for group in by_prompt.values() if len(group) == 1]
    divisions = [[rows], [*groups, *([alone] if alone else [])]] if shares and groups else [[rows]]
    plans = ([_family(group, sequences, first, shares) for group in division if group] for division in divisions)
    return min(plans, key=lambda plan: sum(family.cost(lengths) for family in plan))


def _family(rows: Sequence[int], sequences: Sequence[Ids], first: Sequence[int], shares: bool) -> Family:
    """Return the cheaper of two ways to compute rows: with their common prefix computed once, or without."""
    lengths = [len(ids) for ids in sequences]
    common = min(_common([sequences[row] for row in rows]), min(first[row] for row in rows)) if shares else 0
    families = [Family(prefix, tuple(_passes(rows, lengths, prefix))) for prefix in {0, common}]
    return min(families, key=lambda family: (family.cost(lengths), family.prefix))


def _common(sequences: Sequence[Ids]) -> int:
    """Return how many ids all sequences begin with: as many as the first and the last of them in order."""
    low, high = min(sequences), max(sequences)
    return next((n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))


def _passes(rows: Sequence[int], lengths: Sequence[int], prefix: int) -> Iterable[tuple[int, ...]]:
    """Divide rows into passes of like lengths: the least padding, with PASS for each pass."""
    ordered = sorted(rows, key=lambda row: -lengths[row])
    longest = lengths[ordered[0]] - prefix
    if sum(longest - (lengths[row] - prefix) for row in rows) <= PASS:  # nothing to gain
        return [tuple(rows)]
    ends = _ends(tuple(lengths[row] - prefix for row in ordered))
    return [tuple(sorted(ordered[start:end])) for start, end in zip((0, *ends), ends, strict=False)]


@lru_cache(maxsize=64)
def _ends(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Return where passes end in a list of lengths, longest first: the shortest path over the places between rows."""
    best: list[tuple[int, tuple[int, ...]]] = [(0, ())]
    for end in range(1, len(lengths) + 1):
        costs = ((best[start][0] + PASS + (end - start) * lengths[start], start) for start in range(end))
        cost, start = min(costs)
        best.append((cost, (*best[start][1], end)))
    return best[-1][1]


class _SharedLayer(DynamicLayer):
    """Keys and values of a prefix, computed for one row and read by every row of a pass; nothing is added to them."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the prefix's and a pass's keys and values, one behind the other."""
        pairs = ((self.keys, key_states), (self.values, value_states))
        keys, values = (torch.cat([shared.expand(len(own), -1, -1, -1), own], dim=-2) for shared, own in pairs)
        return keys, values


def _shared_prefix(model: nn.Module, ids_P: Tensor) -> DynamicCache:
    """Compute a prefix once; return what passes of the rest read."""
    cache, nothing = DynamicCache(), torch.zeros(0, dtype=torch.long, device=ids_P.device)
    last_hidden(model, ids_P[None], nothing, nothing, past=cache)
    shared = DynamicCache()
    shared.layers = [_SharedLayer(layer.keys, layer.values) for layer in cache.layers]
    return shared


def hidden_in_passes(
    model: nn.Module, ids_BL: Tensor, row_N: Tensor, position_N: Tensor, plan: Sequence[Family]
) -> Tensor:
    """Return the last hidden states at some positions, computed as planned; without gradient.

    Args:
        model: in eval mode.
        ids_BL: int64 token ids, padded on the right; on the CPU.
        row_N: int64, rows of the positions; on the CPU.
        position_N: int64, the positions; on the CPU.
        plan: of the sequences up to their last position.

    Returns:
        Tensor of shape (N, D), in the model's dtype and on its device.
    """
    device, states, places = next(model.parameters()).device, list[Tensor](), list[Tensor]()
    for family in plan:
        past = None
        if family.prefix:
            past = _shared_prefix(model, ids_BL[family.passes[0][0], : family.prefix].to(device))
        for rows in family.passes:
            number_B = torch.full((len(ids_BL),), -1)
            number_B[list(rows)] = torch.arange(len(rows))
            place_M = (number_B[row_N] >= 0).nonzero()[:, 0]
            row_M, position_M = number_B[row_N[place_M]], position_N[place_M]
            ids = ids_BL[list(rows), family.prefix : int(position_M.max()) + 1]
            moved = (each.to(device, non_blocking=True) for each in (ids, row_M, position_M - family.prefix))
            states.append(last_hidden(model, *moved, past=past))
            places.append(place_M)
    return torch.cat(states)[torch.cat(places).argsort().to(device)]


def can_share_prefixes(model: nn.Module, vocab_size: int) -> bool:
    """Tell whether a model computes the same states from a shared prefix: one with keys and values alone does.

    Args:
        model: the model, in the state in which it will be used.
        vocab_size: ids below it may appear in the probe.
    """
    ids_BL = probe(model, vocab_size)
    shared = 3
    ids_BL[1, :shared] = ids_BL[0, :shared]
    row_N, position_N = torch.ones_like(ids_BL)[:, shared:].nonzero().unbind(-1)
    cpu = (ids_BL.cpu(), row_N.cpu(), position_N.cpu() + shared)
    with evaluating(model), precise(model, ids_BL.device.type) as dtype:
        expected_ND = all_hidden(model, ids_BL).unflatten(0, ids_BL.shape)[:, shared:].flatten(0, 1)
        try:
            hidden_ND = hidden_in_passes(model, *cpu, [Family(shared, ((0, 1),))])
        except Exception:  # a model of another kind says so in its own way
            return False
    gap = float((hidden_ND - expected_ND).abs().max() / expected_ND.abs().max().clamp(min=1e-6))
    return gap <= PROBE_TOLERANCE.get(dtype or hidden_ND.dtype, PROBE_TOLERANCE[torch.bfloat16])
