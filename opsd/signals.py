"""What a teacher answers: a distribution over the vocabulary for every scored token.

One record stands between teachers and losses, so neither knows the other. It knows nothing of prompts, rollouts or
divergences; it only says how what it holds becomes log-probabilities.

Shapes: N scored tokens of a micro-batch (packed, padding gone) · R of them · D hidden width · V vocabulary · K ids.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from opsd.errors import ConfigError, not_one_of
from opsd.models.head import Head

ROWS_PER_CHUNK = 512  # logits of this many tokens exist at once when a signal is asked for log-probabilities
KINDS = ("arithmetic", "geometric")


@runtime_checkable
class TeacherSignal(Protocol):
    """What every signal can answer, whatever it is made of."""

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
        """Return which tokens one plain signal answers for, and that signal; most answer for all."""
        ...


class DenseSignal(ABC):
    """A signal that knows the whole vocabulary; the base of the two that do."""

    @property
    @abstractmethod
    def parts(self) -> Sequence[HiddenSignal]:
        """The states whose logits it is made of."""

    @abstractmethod
    def combine(self, logits: Sequence[Tensor], temperature: float) -> Tensor:
        """Return log-probabilities (R, V) from the parts' logits of the same tokens."""

    @abstractmethod
    def select(self, index: Tensor | slice) -> DenseSignal:
        """Return the signal of some of the tokens."""

    @abstractmethod
    def narrow(self, vocab_size: int) -> DenseSignal:
        """Return the signal over the first ids only."""

    def __len__(self) -> int:
        return self.parts[0].hidden_ND.shape[0]

    def groups(self) -> Sequence[tuple[slice, DenseSignal]]:
        """Return all tokens, and itself."""
        return [(slice(None), self)]

    @property
    def vocab_size(self) -> int:
        """The ids that all parts have: heads that are padded to different sizes differ in it."""
        return min(part.head.vocab_size for part in self.parts)

    def logprobs(self, token_ids_N: Tensor) -> Tensor:
        """Return log p(token_ids_N[n]) in nats, float32 of shape (N,)."""
        found = []
        for start in range(0, len(self), ROWS_PER_CHUNK):
            rows = slice(start, start + ROWS_PER_CHUNK)
            logits = [part.head.logits(part.hidden_ND[rows]) for part in self.narrow(self.vocab_size).parts]
            log_t = self.combine(logits, temperature=1.0)
            found.append(log_t.gather(-1, token_ids_N[rows, None].to(log_t.device))[:, 0].float())
        return torch.cat(found) if found else self.parts[0].hidden_ND.new_zeros(0, dtype=torch.float32)


@dataclass(frozen=True, eq=False)
class HiddenSignal(DenseSignal):
    """Last hidden states and the head above them; the full distribution exists only chunk by chunk inside the loss.

    Args:
        hidden_ND: float, without gradient; row n predicts scored token n.
        head: the teacher's head.
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
        """Return the signal over the first ids only."""
        return replace(self, head=self.head.narrow(vocab_size))


@dataclass(frozen=True, eq=False)
class MixtureSignal(DenseSignal):
    """Several teachers, or one under several contexts, as one distribution.

    Args:
        signals: of the same tokens.
        weights: of the signals, adding up to 1. A geometric mixture may have negative ones, which push away from a
            signal: (2, -1) over a right and a wrong context keeps what only the right one says (contrastive decoding).
        kind: "arithmetic", Σ w·p, or "geometric", ∏ p^w normalised.

    Raises:
        ConfigError: weights that do not fit the signals or the kind.
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
        """Return the mixture's log-probabilities; each part has the temperature, the mixture has none of its own."""
        each = [part.combine([z], temperature) for part, z in zip(self.signals, logits, strict=True)]
        if self.kind == "geometric":
            # -inf · 0 and -inf · -1 have no meaning: what a head masks out stays out through the floor.
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
        """Return the signal over the first ids only."""
        return replace(self, signals=[signal.narrow(vocab_size) for signal in self.signals])


def check_mixture(parts: int, weights: Sequence[float], kind: str) -> None:
    """Refuse weights that make no distribution of `parts` distributions.

    Raises:
        ConfigError: weights that do not fit the parts or the kind.
    """
    if kind not in KINDS:
        raise ConfigError(not_one_of("kind", kind, KINDS))
    if len(weights) != parts or not math.isclose(sum(weights), 1.0, abs_tol=1e-6):
        raise ConfigError(
            f"a mixture of {parts} has the weights {list(weights)}. It needs one weight for each, adding up to 1, or "
            "the target would be no distribution."
        )
    if kind == "arithmetic" and min(weights) < 0:
        raise ConfigError(
            f"an arithmetic mixture has the weights {list(weights)}. A negative weight gives negative probabilities. "
            'Use kind="geometric" to push away from a part.'
        )


@dataclass(frozen=True, eq=False)
class TopKSignal:
    """The likeliest ids of a teacher and their log-probabilities: what a served or cached teacher can give.

    Args:
        ids_NK: int64, distinct ids of each token.
        logprobs_NK: float32, nats, at temperature 1 over the whole vocabulary; -inf fills a shorter list (with any id).
        sampled_logprobs_N: float32, nats, of the scored tokens themselves.
    """

    ids_NK: Tensor
    logprobs_NK: Tensor
    sampled_logprobs_N: Tensor

    def __len__(self) -> int:
        return self.ids_NK.shape[0]

    def logprobs(self, token_ids_N: Tensor) -> Tensor:
        """Return log p of the scored tokens; it knows no others."""
        return self.sampled_logprobs_N

    def select(self, index: Tensor | slice) -> TopKSignal:
        """Return the signal of some of the tokens."""
        return TopKSignal(self.ids_NK[index], self.logprobs_NK[index], self.sampled_logprobs_N[index])

    def groups(self) -> Sequence[tuple[slice, TopKSignal]]:
        """Return all tokens, and itself."""
        return [(slice(None), self)]


@dataclass(frozen=True, eq=False)
class RoutedSignal:
    """Several teachers, each for tokens of its own.

    Args:
        signals: one per teacher, of its tokens in order.
        indices: int64, the positions of each one's tokens among the N; together they are 0 … N-1.
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
        """Return the signal over the first ids only, of those who know the whole vocabulary."""
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
            [signal.select(place_N[mine]) for signal, mine in zip(self.signals, chosen, strict=True)],
            [mine.nonzero()[:, 0] for mine in chosen],
        )
