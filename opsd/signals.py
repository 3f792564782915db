"""What a teacher answers: a distribution over the vocabulary for every scored token.

One record stands between teachers and losses, so neither knows the other. It knows nothing of prompts, rollouts or
divergences; it only says how its states become log-probabilities.

Shapes: N scored tokens of a micro-batch (packed, padding gone) · D hidden width · V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from opsd.errors import UnsupportedModelError

ROWS_PER_CHUNK = 512  # logits of this many tokens exist at once when a signal is asked for log-probabilities


def _logit_scale(config: object) -> float:
    """Return the factor between `head(hidden)` and the logits, as the model families of transformers name it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere; Muse Glimmer; Falcon-H1
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    # HyperCLOVA X multiplies by what Granite and MiniCPM3 divide by.
    return float(scaling) if getattr(config, "model_type", "") == "hyperclovax" else 1.0 / float(scaling)


@dataclass(frozen=True, eq=False)
class Head:
    """The last step of a language model: logits = softcap(scale · (hidden @ weightᵀ + bias)).

    Args:
        weight_VD: float, the output embedding.
        bias_V: float, or None.
        scale: factor on the logits.
        softcap: c in c·tanh(logits / c) (Gemma 2, arXiv 2408.00118), or None.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Head:
        """Read the head of a transformers model (or of a PEFT model around one).

        Raises:
            UnsupportedModelError: the model has no output embedding with a weight.
        """
        head = model.get_output_embeddings()  # type: ignore[operator]
        if head is None or not isinstance(getattr(head, "weight", None), Tensor):
            raise UnsupportedModelError(
                f"{type(model).__name__} has no output embedding with a weight matrix, and opsd computes every "
                "distribution from one. Use a causal language model (AutoModelForCausalLM)."
            )
        config = model.config.get_text_config()  # type: ignore[union-attr, operator]
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(head.weight, getattr(head, "bias", None), _logit_scale(config), softcap)

    @property
    def vocab_size(self) -> int:
        """V, the rows of the output embedding (padding rows included)."""
        return self.weight_VD.shape[0]

    def narrow(self, vocab_size: int) -> Head:
        """Return the head over the first `vocab_size` ids: how heads that were padded differently are compared."""
        if vocab_size == self.vocab_size:
            return self
        bias_V = None if self.bias_V is None else self.bias_V[:vocab_size]
        return replace(self, weight_VD=self.weight_VD[:vocab_size], bias_V=bias_V)

    def detach(self) -> Head:
        """Return the same head outside the autograd graph."""
        bias_V = None if self.bias_V is None else self.bias_V.detach()
        return replace(self, weight_VD=self.weight_VD.detach(), bias_V=bias_V)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Return float32 logits of shape (N, V); the caller chooses an N that fits in memory."""
        weight_VD = self.weight_VD.to(hidden_ND.dtype)
        logits_NV = (hidden_ND @ weight_VD.T).float()
        if self.bias_V is not None:
            logits_NV = logits_NV + self.bias_V.float()
        logits_NV = logits_NV * self.scale
        return logits_NV if self.softcap is None else self.softcap * torch.tanh(logits_NV / self.softcap)


@runtime_checkable
class TeacherSignal(Protocol):
    """What every signal can answer, whatever it is made of."""

    def logprobs(self, token_ids_N: Tensor) -> Tensor:
        """Return log p(token) in nats, float32 of shape (N,), one for each scored token."""
        ...


@dataclass(frozen=True, eq=False)
class HiddenSignal:
    """Last hidden states and the head above them; the full distribution exists only chunk by chunk inside the loss.

    Args:
        hidden_ND: float, without gradient; row n predicts scored token n.
        head: the teacher's head.
    """

    hidden_ND: Tensor
    head: Head

    def logprobs(self, token_ids_N: Tensor) -> Tensor:
        """Return log p(token_ids_N[n]) in nats, float32 of shape (N,)."""
        chunks = zip(
            self.hidden_ND.split(ROWS_PER_CHUNK),
            token_ids_N.to(self.hidden_ND.device).split(ROWS_PER_CHUNK),
            strict=True,
        )
        parts = [
            torch.log_softmax(self.head.logits(hidden), dim=-1).gather(-1, ids[:, None])[:, 0] for hidden, ids in chunks
        ]
        return torch.cat(parts) if parts else self.hidden_ND.new_zeros(0, dtype=torch.float32)
