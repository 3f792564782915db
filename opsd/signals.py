"""Signals: what a teacher returns, a distribution over the vocabulary for every scored token.

One record stands between teachers and losses, so that neither knows the other. It knows how to become
log-probabilities, and nothing of prompts, rollouts or divergences.

Shapes: N scored tokens of a micro-batch (packed, padding gone) · R of them · D hidden width · V vocabulary · K ids.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from opsd.errors import ConfigError, not_one_of
from opsd.models.head import Head

ROWS_PER_CHUNK = 512  # logits of this many tokens exist at once while a signal computes log-probabilities
KINDS = ("arithmetic", "geometric")
TOP_K = 100  # likeliest tokens of a support and of a served teacher's list, by default (SDPO, arXiv 2601.20802)


@runtime_checkable
class TeacherSignal(Protocol):
    """The methods of every signal."""

    def __len__(self) -> int:
        """Return N."""
        ...

    def logprobs(self, token_ids_N: Tensor) -> Tensor:
        """Return log p(token) in nats, float32 of shape (N,), one for each scored token."""
        ...

    def select(self, index: Tensor | slice) -> TeacherSignal:
        """Return the signal of some of the tokens."""
        ...

    def groups(self) -> Sequence[tuple[Tensor | slice, DenseSignal | TopKSignal]]:
        """Return (tokens, plain signal) pairs: a plain signal has one pair, a routed one a pair per teacher."""
        ...


class DenseSignal(ABC):
    """A signal over the whole vocabulary; the base of HiddenSignal and MixtureSignal."""

    @property
    @abstractmethod
    def parts(self) -> Sequence[HiddenSignal]:
        """The states whose logits it combines."""

    @abstractmethod
    def combine(self, logits: Sequence[Tensor], temperature: float) -> Tensor:
        """Return log-probabilities (R, V) from the parts' logits of the same tokens."""

    @abstractmethod
    def select(self, index: Tensor | slice) -> DenseSignal:
        """Return the signal of some of the tokens."""

    @abstractmethod
    def narrow(self, vocab_size: int) -> DenseSignal:
        """Return the signal over the first `vocab_size` ids."""

    def __len__(self) -> int:
        return self.parts[0].hidden_ND.shape[0]

    def groups(self) -> Sequence[tuple[slice, DenseSignal]]:
        """Return one pair: all tokens, and this signal."""
        return [(slice(None), self)]

    @property
    def vocab_size(self) -> int:
        """The number of ids that all parts have; heads that are padded to different sizes differ."""
        return min(part.head.vocab_size for part in self.parts)

    def logprobs(self, token_ids_N: Tensor, temperature: float = 1.0) -> Tensor:
        """Return log p(token_ids_N[n]) in nats, float32 of shape (N,)."""
        chunks = [
            log_t.gather(-1, token_ids_N[rows, None].to(log_t.device))[:, 0].float()
            for rows, log_t in self._chunks(temperature)
        ]
        return torch.cat(chunks) if chunks else self.parts[0].hidden_ND.new_zeros(0, dtype=torch.float32)

    def listed(self, token_ids_N: Tensor, count: int) -> TopKSignal:
        """Return the `count` likeliest ids of every token, as a teacher that is not at hand would list them."""
        tops = [log_t.float().topk(min(count, log_t.shape[-1]), dim=-1) for _, log_t in self._chunks()]
        ids, values = (torch.cat([getattr(top, name) for top in tops]) for name in ("indices", "values"))
        return TopKSignal(ids, values, self.logprobs(token_ids_N))

    def _chunks(self, temperature: float = 1.0) -> Iterator[tuple[slice, Tensor]]:
        """Yield the log-probabilities of a few tokens at a time, (R, V), and which tokens they are."""
        parts = self.narrow(self.vocab_size).parts
        heads = [part.head.gathered() for part in parts]  # once, and in a process without tokens too
        for start in range(0, len(self), ROWS_PER_CHUNK):
            rows = slice(start, start + ROWS_PER_CHUNK)
            logits = [head.logits(part.hidden_ND[rows]) for part, head in zip(parts, heads, strict=True)]
            yield rows, self.combine(logits, temperature)


@dataclass(frozen=True, eq=False)
class HiddenSignal(DenseSignal):
    """Last hidden states and the head above them; the full distribution exists only chunk by chunk inside the loss.

    Args:
        hidden_ND: floating point, without gradient; row n predicts scored token n.
        head: the teacher's head, detached.

    Example:
        >>> signal = HiddenSignal(hidden_ND, Head.from_model(model).detach())
        >>> signal.logprobs(token_ids_N)  # (N,) nats
    """

    hidden_ND: Tensor
    head: Head

    @property
    def parts(self) -> Sequence[HiddenSignal]:
        """Itself."""
        return (self,)

    def combine(self, logits: Sequence[Tensor], temperature: float) -> Tensor:
        """Return the log-softmax of logits / temperature."""
        return torch.log_softmax(logits[0] if temperature == 1.0 else logits[0] / temperature, dim=-1)

    def select(self, index: Tensor | slice) -> HiddenSignal:
        """Return the signal of some of the tokens."""
        return replace(self, hidden_ND=self.hidden_ND[index])

    def narrow(self, vocab_size: int) -> HiddenSignal:
        """Return the signal over the first `vocab_size` ids."""
        return replace(self, head=self.head.narrow(vocab_size))


@dataclass(frozen=True, eq=False)
class MixtureSignal(DenseSignal):
    """Several teachers, or one under several contexts, as one distribution.

    Args:
        signals: of the same tokens.
        weights: of the signals, adding up to 1. A geometric mixture may have negative ones, which push away from a
            signal: (2, -1) over a right and a wrong context amplifies what only the right one adds (contrastive
            decoding).
        kind: "arithmetic", Σ w·p, or "geometric", ∏ p^w normalised.

    Raises:
        ConfigError: weights that do not fit the signals or the kind.

    Example:
        >>> MixtureSignal([first, second], [0.3, 0.7]).logprobs(token_ids_N)
    """

    signals: Sequence[HiddenSignal]
    weights: Sequence[float]
    kind: str = "arithmetic"

    def __post_init__(self) -> None:
        check_mixture(len(self.signals), self.weights, self.kind)

    @property
    def parts(self) -> Sequence[HiddenSignal]:
        """The signals."""
        return self.signals

    def combine(self, logits: Sequence[Tensor], temperature: float) -> Tensor:
        """Return the mixture's log-probabilities; the temperature applies to each part, not to the mixture."""
        each = [part.combine([z], temperature) for part, z in zip(self.signals, logits, strict=True)]
        if self.kind == "geometric":
            # -inf · 0 and -inf · -1 are undefined: a floor keeps masked ids at a probability of 0.
            floor = torch.finfo(each[0].dtype).min / (2 * sum(abs(w) for w in self.weights))
            blend = sum(w * log_p.clamp(min=floor) for w, log_p in zip(self.weights, each, strict=True))
            return torch.log_softmax(blend, dim=-1)  # type: ignore[arg-type]
        used = [log_p + math.log(w) for w, log_p in zip(self.weights, each, strict=True) if w > 0]
        mixed = used[0]
        for log_p in used[1:]:
            mixed = torch.logaddexp(mixed, log_p)
        return mixed

    def select(self, index: Tensor | slice) -> MixtureSignal:
        """Return the signal of some of the tokens."""
        return replace(self, signals=[signal.select(index) for signal in self.signals])

    def narrow(self, vocab_size: int) -> MixtureSignal:
        """Return the signal over the first `vocab_size` ids."""
        return replace(self, signals=[signal.narrow(vocab_size) for signal in self.signals])


def check_mixture(parts: int, weights: Sequence[float], kind: str) -> None:
    """Refuse weights that do not combine `parts` distributions into one.

    Raises:
        ConfigError: weights that do not fit the parts or the kind.
    """
    if kind not in KINDS:
        raise ConfigError(not_one_of("kind", kind, KINDS))
    if len(weights) != parts or not math.isclose(sum(weights), 1.0, abs_tol=1e-6):
        raise ConfigError(
            f"a mixture of {parts} has the weights {list(weights)}. It needs one weight for each, adding up to 1, or "
            "the result would be no distribution."
        )
    if kind == "arithmetic" and min(weights) < 0:
        raise ConfigError(
            f"an arithmetic mixture has the weights {list(weights)}. A negative weight gives negative probabilities. "
            'Use kind="geometric" to push away from a part.'
        )


@dataclass(frozen=True, eq=False)
class TopKSignal:
    """The likeliest ids of a teacher and their log-probabilities, as a served or cached teacher returns them.

    Args:
        ids_NK: int64, distinct ids of each token.
        logprobs_NK: float32, nats, at temperature 1 over the whole vocabulary; -inf fills a shorter list (with any id).
        sampled_logprobs_N: float32, nats, of the scored tokens.

    Example:
        >>> log_p, ids = logits_NV.log_softmax(-1).topk(20)
        >>> TopKSignal(ids, log_p, logits_NV.log_softmax(-1).gather(-1, token_ids_N[:, None])[:, 0])
    """

    ids_NK: Tensor
    logprobs_NK: Tensor
    sampled_logprobs_N: Tensor

    def __len__(self) -> int:
        return self.ids_NK.shape[0]

    def logprobs(self, token_ids_N: Tensor) -> Tensor:
        """Return log p of the scored tokens; others are not known, so `token_ids_N` is not read."""
        return self.sampled_logprobs_N

    def select(self, index: Tensor | slice) -> TopKSignal:
        """Return the signal of some of the tokens."""
        return TopKSignal(self.ids_NK[index], self.logprobs_NK[index], self.sampled_logprobs_N[index])

    def groups(self) -> Sequence[tuple[slice, TopKSignal]]:
        """Return one pair: all tokens, and this signal."""
        return [(slice(None), self)]


@dataclass(frozen=True, eq=False)
class RoutedSignal:
    """Several teachers, each for some of the tokens.

    Args:
        signals: one per teacher, of its tokens in order.
        indices: int64, the positions of each teacher's tokens among the N; together they are 0 … N-1.

    Example:
        >>> RoutedSignal([first, second], [torch.tensor([0, 2]), torch.tensor([1])])
    """

    signals: Sequence[DenseSignal | TopKSignal]
    indices: Sequence[Tensor]

    def __len__(self) -> int:
        return sum(map(len, self.signals))

    def groups(self) -> Sequence[tuple[Tensor, DenseSignal | TopKSignal]]:
        """Return each teacher's tokens and its signal."""
        return list(zip(self.indices, self.signals, strict=True))

    def logprobs(self, token_ids_N: Tensor) -> Tensor:
        """Return log p(token_ids_N[n]) in nats, float32 of shape (N,)."""
        out_N = torch.empty(len(self), dtype=torch.float32, device=token_ids_N.device)
        for index, signal in self.groups():
            out_N[index] = signal.logprobs(token_ids_N[index])
        return out_N

    def narrow(self, vocab_size: int) -> RoutedSignal:
        """Return the signal with its dense parts over the first `vocab_size` ids."""
        narrowed = [each.narrow(vocab_size) if isinstance(each, DenseSignal) else each for each in self.signals]
        return replace(self, signals=narrowed)

    def select(self, index: Tensor | slice) -> RoutedSignal:
        """Return the signal of some of the tokens."""
        owner_N, place_N = (torch.empty(len(self), dtype=torch.long, device=self.indices[0].device) for _ in "op")
        for number, tokens in enumerate(self.indices):
            owner_N[tokens], place_N[tokens] = number, torch.arange(len(tokens), device=tokens.device)
        owner_N, place_N = owner_N[index], place_N[index]
        chosen = [owner_N == number for number in range(len(self.signals))]
        return RoutedSignal(
            [signal.select(place_N[is_own]) for signal, is_own in zip(self.signals, chosen, strict=True)],
            [is_own.nonzero()[:, 0] for is_own in chosen],
        )


def as_list(signal: TeacherSignal, token_ids_N: Tensor, count: int) -> TopKSignal:
    """Return the `count` likeliest ids of every token, whatever kind of signal it is.

    Raises:
        ConfigError: a part lists fewer.
    """
    found: list[tuple[Tensor | slice, TopKSignal]] = []
    for index, part in signal.groups():
        listed = part if isinstance(part, TopKSignal) else part.listed(token_ids_N[index], count)
        if listed.ids_NK.shape[1] < count:
            raise ConfigError(
                f"{count} likeliest tokens were asked for, and this teacher lists {listed.ids_NK.shape[1]}. Ask for as "
                "many as it lists (support_k)."
            )
        found.append(
            (index, TopKSignal(listed.ids_NK[:, :count], listed.logprobs_NK[:, :count], listed.sampled_logprobs_N))
        )
    shapes = ((count,), torch.long), ((count,), torch.float32), ((), torch.float32)
    whole = [torch.empty((len(signal), *shape), dtype=dtype, device=token_ids_N.device) for shape, dtype in shapes]
    for index, listed in found:
        for tensor, part_of in zip(whole, (listed.ids_NK, listed.logprobs_NK, listed.sampled_logprobs_N), strict=True):
            tensor[index] = part_of.to(tensor)
    return TopKSignal(*whole)
