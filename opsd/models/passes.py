"""Passes over sequences of uneven length: a beginning that they have in common is computed once, little is padded.

Prompts begin alike: the system turn and the worked examples are those of every row, and rollouts of one row have the
whole prompt in common. Its keys and values are computed once, and each sequence goes on from there; gradients are the
same sums in another order. Rows of about the same length share a pass. Knows a model, token ids and positions; nothing
of rollouts, teachers or losses.

Shapes: B rows · L tokens of a padded sequence · P tokens of a shared prefix · N scored positions (packed) · D width
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from opsd.models.forward import (
    PROBE_TOLERANCE,
    all_hidden,
    embedded_tokens,
    evaluating,
    language_model,
    last_hidden,
    not_counting,
    precise,
    probe,
)
from opsd.models.sharding import is_sharded

Ids = list[int]
# Tokens that one more pass must save: on a CPU what reading the weights costs, elsewhere what starting kernels does.
PASS, PASS_OF_DEVICE = 128, 1024
# Of the tokens without it: a shared prefix costs attention a mask, and so its fastest kernels and some memory.
WORTH = 0.8
CHANGES_WITH_LENGTH = ("longrope", "dynamic")  # position embeddings whose factors depend on the whole sequence's length


@dataclass(frozen=True)
class Family:
    """Rows that begin alike, and the passes that compute the rest of them.

    >>> plan_passes([[5, 6, 7], [5, 6, 7]], [[8, 2], [9]])  # too short to be worth another pass
    [Family(prefix=0, passes=((0, 1),))]

    Args:
        prefix: tokens at the beginning that are the same in all rows and are computed once; 0 for none.
        passes: rows of each pass.
    """

    prefix: int
    passes: tuple[tuple[int, ...], ...]

    def cost(self, lengths: Sequence[int], a_pass: int) -> int:
        """Return the tokens that are computed, padding included, and what each pass costs beside them.

        Args:
            lengths: of all sequences, in tokens.
            a_pass: tokens that one more pass must save.
        """
        rest = (len(rows) * (max(lengths[row] for row in rows) - self.prefix) + a_pass for rows in self.passes)
        return sum(rest) + (self.prefix + a_pass if self.prefix else 0)


def plan_passes(
    prompts: Sequence[Ids], completions: Sequence[Ids], *, shares: bool = True, a_pass: int = PASS
) -> list[Family]:
    """Divide rows into families and passes, so that few tokens are computed.

    Args:
        prompts: token ids.
        completions: up to their last scored token; rows whose completion is empty are in no pass.
        shares: whether prefixes may be shared.
        a_pass: tokens that one more pass must save.
    """
    # The last token predicts nothing that is scored, and the last of the prompt predicts the first.
    sequences = [(p + c)[:-1] if c else [] for p, c in zip(prompts, completions, strict=True)]
    plan = _Planner(sequences, [len(prompt) - 1 for prompt in prompts], shares, a_pass)
    return min(map(plan.families, plan.divisions()), key=plan.cost)


def tokens_of(
    prompts: Sequence[Ids], completions: Sequence[Ids], *, divides: bool = True, shares: bool = True, a_pass: int = PASS
) -> int:
    """Return what the best plan computes, in tokens; see `Family.cost` and `scored_hidden`."""
    lengths = [len(p) + len(c) - 1 for p, c in zip(prompts, completions, strict=True)]
    one = [Family(0, (tuple(range(len(lengths))),))]
    plan = plan_passes(prompts, completions, shares=shares, a_pass=a_pass) if divides else one
    return sum(family.cost(lengths, a_pass) for family in plan)


class _Planner:
    """Finds families of sequences; `first` is, per row, the first position whose state is needed."""

    def __init__(self, sequences: Sequence[Ids], first: Sequence[int], shares: bool, a_pass: int):
        self._sequences, self._first, self._shares, self._a_pass = sequences, first, shares, a_pass
        self._lengths = [len(ids) for ids in sequences]

    def cost(self, families: Sequence[Family]) -> int:
        return sum(family.cost(self._lengths, self._a_pass) for family in families)

    def divisions(self) -> list[list[list[int]]]:
        """Return ways to divide the rows: all together, and by prompt."""
        rows = [row for row, length in enumerate(self._lengths) if length]
        by_prompt: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for row in rows if self._shares else ():
            by_prompt[tuple(self._sequences[row][: self._first[row]])].append(row)
        groups = [group for group in by_prompt.values() if len(group) > 1]
        alone = [group[0] for group in by_prompt.values() if len(group) == 1]
        return [[rows], [*groups, alone]] if groups else [[rows]]

    def families(self, division: Sequence[Sequence[int]]) -> list[Family]:
        """Return a family for each part of a division."""
        return [self._family(rows) for rows in division if rows]

    def _family(self, rows: Sequence[int]) -> Family:
        """Return the cheaper of two ways to compute rows: with their common prefix computed once, or without."""
        common = 0
        if self._shares:
            common = min(_common([self._sequences[row] for row in rows]), min(self._first[row] for row in rows))
        alone, together = (Family(prefix, tuple(self._passes(rows, prefix))) for prefix in (0, common))
        return together if common and self.cost([together]) < WORTH * self.cost([alone]) else alone

    def _passes(self, rows: Sequence[int], prefix: int) -> Iterable[tuple[int, ...]]:
        """Divide rows into passes of like lengths."""
        ordered = sorted(rows, key=lambda row: -self._lengths[row])
        lengths = tuple(self._lengths[row] - prefix for row in ordered)
        if len(lengths) * lengths[0] - sum(lengths) <= self._a_pass:  # nothing to gain
            return [tuple(rows)]
        ends = _ends(lengths, self._a_pass)
        return [tuple(sorted(ordered[start:end])) for start, end in zip((0, *ends), ends, strict=False)]


def _common(sequences: Sequence[Ids]) -> int:
    """Return how many ids all sequences begin with: as many as the first and the last of them in order."""
    low, high = min(sequences), max(sequences)
    return next((n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))


@lru_cache(maxsize=64)
def _ends(lengths: tuple[int, ...], a_pass: int) -> tuple[int, ...]:
    """Return where passes end in a list of lengths, longest first: the shortest path over the places between rows."""
    best: list[tuple[int, tuple[int, ...]]] = [(0, ())]
    for end in range(1, len(lengths) + 1):
        costs = ((best[start][0] + a_pass + (end - start) * lengths[start], start) for start in range(end))
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


def _prefix(model: nn.Module, ids_P: Tensor) -> DynamicCache:
    """Compute the keys and values of a prefix, for one row."""
    cache, nothing = DynamicCache(), torch.zeros(0, dtype=torch.long, device=ids_P.device)
    last_hidden(model, ids_P[None], nothing, nothing, past=cache)
    return cache


def _shared_prefix(model: nn.Module, ids_P: Tensor) -> DynamicCache:
    """Compute a prefix once; return what passes of the rest read."""
    shared = DynamicCache()
    shared.layers = [_SharedLayer(layer.keys, layer.values) for layer in _prefix(model, ids_P).layers]
    return shared


def prefix_for_rows(model: nn.Module, ids_P: Tensor, rows: int) -> DynamicCache:
    """Compute a prefix once; return a cache of so many rows, which grows."""
    layers = _prefix(model, ids_P).layers
    return DynamicCache([[each.expand(rows, -1, -1, -1) for each in (layer.keys, layer.values)] for layer in layers])


def worthwhile_prefix(model: nn.Module, prompts: Sequence[Ids]) -> int:
    """Return how many tokens that all prompts begin with are worth a pass of their own; 0 for none."""
    common = min(_common(prompts), min(map(len, prompts)) - 1)
    return common if (len(prompts) - 1) * common > pass_on(model) else 0


def pass_on(model: nn.Module) -> int:
    """Return the tokens that one more pass of a model must save on its device."""
    return PASS if next(model.parameters()).device.type == "cpu" else PASS_OF_DEVICE


def scored_hidden(
    model: nn.Module,
    prompts: Sequence[Ids],
    completions: Sequence[Ids],
    padded: tuple[Tensor, Tensor, Tensor],
    *,
    divides: bool,
) -> Tensor:
    """Return the last hidden states that predict scored tokens, in the passes that compute few tokens.

    Processes that exchange a sharded model's weights make the same passes: there it is one over all rows.

    Args:
        model: the student or a teacher.
        prompts: token ids.
        completions: up to their last scored token.
        padded: ids (B, L) of both together, padded on the right, and rows and positions (N,) of the states; int64, on
            the CPU.
        divides: whether rows may be divided into passes, and prefixes be shared; else it is one pass over all rows.

    Returns:
        Tensor of shape (N, D), in the model's dtype and on its device.
    """
    device = next(model.parameters()).device
    if is_sharded(model) or not divides or not any(completions):
        return last_hidden(model, *(each.to(device, non_blocking=True) for each in padded))
    plan = plan_passes(prompts, completions, shares=can_share_prefixes(model), a_pass=pass_on(model))
    return hidden_in_passes(model, *padded, plan)


def hidden_in_passes(
    model: nn.Module, ids_BL: Tensor, row_N: Tensor, position_N: Tensor, plan: Sequence[Family]
) -> Tensor:
    """Return the last hidden states at some positions, computed as planned; see `scored_hidden`."""
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
    if len(states) == 1:
        return states[0]
    return torch.cat(states).index_select(0, torch.cat(places).argsort().to(device))


def may_divide(student: nn.Module) -> bool:
    """Tell whether a model that trains may divide its rows into passes, and share prefixes.

    With gradient checkpointing it keeps no keys and values, and some kinds of it allow one pass only. With dropout, the
    rows that share a prefix would share its dropout as well.
    """
    checkpoints = getattr(language_model(student), "is_gradient_checkpointing", False)
    return not checkpoints and not any(isinstance(each, nn.Dropout) and each.p > 0 for each in student.modules())


def can_share_prefixes(model: nn.Module) -> bool:
    """Tell whether a model computes the same states from a shared prefix: one with keys and values alone does."""
    inside = language_model(model)
    attention = str(getattr(inside.config, "_attn_implementation", ""))
    if _SHARES.get(inside, ("", False))[0] != attention:
        _SHARES[inside] = (attention, _shares(model))
    return _SHARES[inside][1]


_SHARES: WeakKeyDictionary[nn.Module, tuple[str, bool]] = WeakKeyDictionary()  # by the kernel of attention


def _shares(model: nn.Module) -> bool:
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    positions = str([getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")])
    if any(kind in positions for kind in CHANGES_WITH_LENGTH):
        return False
    ids_BL = probe(model, embedded_tokens(model))
    shared = 3
    ids_BL[1, :shared] = ids_BL[0, :shared]
    row_N, position_N = torch.ones_like(ids_BL)[:, shared:].nonzero().unbind(-1)
    cpu = (ids_BL.cpu(), row_N.cpu(), position_N.cpu() + shared)
    with evaluating(model), precise(model, ids_BL.device.type) as dtype, not_counting():
        expected_ND = all_hidden(model, ids_BL).unflatten(0, ids_BL.shape)[:, shared:].flatten(0, 1)
        try:
            hidden_ND = hidden_in_passes(model, *cpu, [Family(shared, ((0, 1),))])
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a model of another kind says so in its own way
            return False
    gap = float((hidden_ND - expected_ND).abs().max() / expected_ND.abs().max().clamp(min=1e-6))
    return gap <= PROBE_TOLERANCE.get(dtype or hidden_ND.dtype, PROBE_TOLERANCE[torch.bfloat16])
