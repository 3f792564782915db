"""The divergence between student and teacher at every scored token, over the full vocabulary.

Knows states, heads and weights; knows nothing of prompts, teachers or trainers. Logits exist only in tiles: memory
does not grow with rows × tokens × vocabulary (TRL's chunked kernel).

Shapes: N scored tokens of a micro-batch · D hidden width · V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from opsd.errors import ConfigError
from opsd.signals import Head, HiddenSignal

NEAR_AN_END = 0.05  # between 0 and this (or its mirror) the generalised JSD is close to 0 whatever the two models say


@dataclass(frozen=True)
class LossRecord:
    """What a divergence returns.

    Args:
        loss: scalar with gradient to the student, Σ weight_N · divergence_N.
        divergence_N: float32, nats per token, detached.
        entropy_N: float32, the student's entropy in nats, detached.
    """

    loss: Tensor
    divergence_N: Tensor
    entropy_N: Tensor


@dataclass(frozen=True)
class Divergence:
    """The generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649, eq. 1) with its two ends made exact.

    With M = β·teacher + (1-β)·student it is β·KL(teacher‖M) + (1-β)·KL(student‖M); β = 0 is the forward
    KL(teacher‖student) and β = 1 the reverse KL(student‖teacher), of which only JSD / (β(1-β)) is the limit.

    Args:
        beta: in [0, 1].
        temperature: divides both sides' logits, > 0.

    Raises:
        ConfigError: beta or temperature outside its range.
    """

    beta: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta <= 1.0:
            raise ConfigError(
                f"beta must lie between 0 and 1, and is {self.beta}. It interpolates from the forward KL (0) to the "
                "reverse KL (1). Use 1 for reverse KL, 0 for forward KL, 0.5 for the Jensen-Shannon divergence."
            )
        if not self.temperature > 0.0:
            raise ConfigError(
                f"temperature must be above 0, and is {self.temperature}. Logits are divided by it. Use 1 to train "
                "on the distributions as they are."
            )

    @property
    def words(self) -> str:
        """The divergence in words, as logs and reports name it."""
        if self.beta in (0.0, 1.0):
            name = "reverse KL(student ‖ teacher)" if self.beta else "forward KL(teacher ‖ student)"
        else:
            name = f"generalised JSD (β = {self.beta:g})"
        return name if self.temperature == 1.0 else f"{name} at temperature {self.temperature:g}"

    @property
    def formula(self) -> str:
        """The divergence as a formula; s is the student, t the teacher, v runs over the vocabulary."""
        if self.beta == 1.0:
            return "Σ_v s(v)·[log s(v) − log t(v)]"
        if self.beta == 0.0:
            return "Σ_v t(v)·[log t(v) − log s(v)]"
        b, a = f"{self.beta:g}", f"{1 - self.beta:g}"
        return f"{b}·KL(t ‖ m) + {a}·KL(s ‖ m),  m = {b}·t + {a}·s"

    def __call__(self, hidden_ND: Tensor, head: Head, signal: HiddenSignal, weight_N: Tensor) -> LossRecord:
        """Compute the weighted sum of per-token divergences.

        Args:
            hidden_ND: float, the student's last hidden states, with gradient.
            head: the student's head.
            signal: the teacher's answer for the same N tokens.
            weight_N: float32, what each token counts (row weight × token weight ÷ normaliser). A token of weight 0
                is left out altogether: even a NaN there changes nothing.

        Returns:
            The record; heads that are padded to different sizes are compared over the ids that both have.
        """
        assert hidden_ND.shape[0] == signal.hidden_ND.shape[0] == weight_N.shape[0], "student and teacher differ in N"
        used_N = weight_N != 0
        vocab_size = min(head.vocab_size, signal.head.vocab_size)
        divergence_N, entropy_N = self._per_token(
            hidden_ND[used_N], head.narrow(vocab_size), signal.hidden_ND[used_N], signal.head.narrow(vocab_size)
        )
        # The sum over no rows is 0 and reaches every parameter: a process without a scored token must not hang DDP.
        loss = (divergence_N * weight_N[used_N]).sum() + hidden_ND[:0].sum()
        return LossRecord(loss, _scatter(divergence_N, used_N), _scatter(entropy_N, used_N))

    def _per_token(self, student_ND: Tensor, head: Head, teacher_ND: Tensor, other: Head) -> tuple[Tensor, Tensor]:
        return ChunkedDivergenceFunction.apply(
            student_ND,
            head.weight_VD,
            head.bias_V,
            teacher_ND,
            other.weight_VD,
            other.bias_V,
            self.beta,
            self.temperature,
            head.scale,
            head.softcap,
            other.scale,
            other.softcap,
        )


def _scatter(values: Tensor, used_N: Tensor) -> Tensor:
    """Put the values of the used tokens back among N, zeros elsewhere."""
    out_N = torch.zeros(used_N.shape, dtype=torch.float32, device=used_N.device)
    out_N[used_N] = values.detach().float()
    return out_N
