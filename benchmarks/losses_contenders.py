"""The cases of benchmarks/losses.py, their inputs, and the contenders that compute a loss from them.

It measures and writes nothing. Inputs are random (logits of deviation 2), and every token weighs the same.

Shapes: N tokens · D hidden width · V vocabulary · K ids of a support.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from opsd.losses import Divergence, Objective, Tokens
from opsd.models.head import Head
from opsd.signals import HiddenSignal


@dataclass(frozen=True)
class Case:
    """One problem that all contenders solve."""

    device: str
    dtype: str
    tokens: int
    width: int
    vocab: int
    head: str
    loss: str = "reverse KL"

    def __str__(self) -> str:
        shape = f"{self.tokens:,} × {self.width:,} × {self.vocab:,}"
        return f"{self.loss}, {self.device} {self.dtype}, {shape}, head {self.head}"


class Inputs(NamedTuple):
    """Student and teacher, and the weights of the tokens."""

    hidden_ND: Tensor
    weight_VD: Tensor
    teacher_ND: Tensor
    teacher_VD: Tensor
    tokens: Tokens


def make(case: Case) -> Inputs:
    """Return random inputs, the same in every process."""
    torch.manual_seed(0)
    like: dict[str, Any] = {"device": case.device, "dtype": getattr(torch, case.dtype)}
    states = [torch.randn(case.tokens, case.width, **like) for _ in range(2)]
    heads = [torch.randn(case.vocab, case.width, **like).mul_(2 / case.width**0.5) for _ in range(2)]
    weight_N = torch.full((case.tokens,), 1 / case.tokens, device=case.device)
    ids_N = torch.randint(case.vocab, (case.tokens,), device=case.device)
    tokens = Tokens(weight_N, ids_N if case.loss == "sampled" else None)
    student_head = heads[0].requires_grad_(case.head == "trained")
    return Inputs(states[0].requires_grad_(), student_head, states[1], heads[1], tokens)


# ---- the losses by definition ---------------------------------------------------------------------------------------


def reverse_kl(log_s: Tensor, log_t: Tensor, tokens: Tokens) -> Tensor:
    """KL(student ‖ teacher)."""
    return (log_s.exp() * (log_s - log_t)).sum(-1)


def forward_kl(log_s: Tensor, log_t: Tensor, tokens: Tokens) -> Tensor:
    """KL(teacher ‖ student)."""
    return reverse_kl(log_t, log_s, tokens)


def jsd(log_s: Tensor, log_t: Tensor, tokens: Tokens) -> Tensor:
    """The Jensen-Shannon divergence."""
    log_m = torch.logaddexp(log_s, log_t) - np.log(2)
    return (reverse_kl(log_s, log_m, tokens) + reverse_kl(log_t, log_m, tokens)) / 2


def top_100(log_s: Tensor, log_t: Tensor, tokens: Tokens) -> Tensor:
    """Reverse KL over the teacher's 100 likeliest ids and one bucket for the rest."""
    ids_NK = log_t.topk(100).indices
    rests = [p.exp().scatter(-1, ids_NK, 0.0).sum(-1, keepdim=True).log() for p in (log_s, log_t)]
    pairs = zip((log_s, log_t), rests, strict=True)
    s, t = (torch.cat([p.gather(-1, ids_NK), rest], -1) for p, rest in pairs)
    return reverse_kl(s, t, tokens)


def sampled(log_s: Tensor, log_t: Tensor, tokens: Tokens) -> Tensor:
    """log s(y) - log t(y), whose gradient is that of the policy gradient without a baseline."""
    assert tokens.ids_N is not None
    at_s, at_t = (p.gather(-1, tokens.ids_N[:, None])[:, 0] for p in (log_s, log_t))
    ratio_N = (at_s - at_t).detach()
    return ratio_N + ratio_N * (at_s - at_s.detach())


LOSSES: dict[str, tuple[Divergence, Callable[[Tensor, Tensor, Tokens], Tensor]]] = {
    "reverse KL": (Divergence(1.0), reverse_kl),
    "forward KL": (Divergence(0.0), forward_kl),
    "JSD 0.5": (Divergence(0.5), jsd),
    "top-100": (Divergence(1.0, support="teacher_top_k", support_k=100, tail="bucket"), top_100),
    "sampled": (Divergence(1.0, support="sampled", baseline="none"), sampled),
}

# ---- the contenders: a scalar loss to send backward, or None where gradients are set already ------------------


def ours(x: Inputs, loss: str, *, recompute: bool = False) -> Tensor:
    """One pass; or two, keeping no gradient of the head between them."""
    signal = HiddenSignal(x.teacher_ND, Head(x.teacher_VD))
    objective = Objective(LOSSES[loss][0], recompute_loss=recompute)
    return objective(x.hidden_ND, Head(x.weight_VD), signal, x.tokens).loss


def trl(x: Inputs, loss: str) -> Tensor:
    """TRL's chunked kernel."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    teacher = x.teacher_ND, x.teacher_VD, None
    values_N, _ = ChunkedDivergenceFunction.apply(x.hidden_ND, x.weight_VD, None, *teacher, LOSSES[loss][0].beta)
    return (values_N * x.tokens.weight_N).sum()


def full_logits(x: Inputs, loss: str) -> Tensor:
    """Full logits of both models, and autograd."""
    log_s = torch.log_softmax((x.hidden_ND @ x.weight_VD.T).float(), -1)
    with torch.no_grad():
        log_t = torch.log_softmax((x.teacher_ND @ x.teacher_VD.T).float(), -1)
    return (x.tokens.weight_N * LOSSES[loss][1](log_s, log_t, x.tokens)).sum()


def liger(x: Inputs, loss: str) -> Tensor:
    """Liger's chunked kernel, which takes the mean over tokens."""
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=LOSSES[loss][0].beta)(x.hidden_ND, x.weight_VD, x.teacher_ND, x.teacher_VD)


@torch.no_grad()
def products(x: Inputs, loss: str) -> None:
    """Products of the sizes that the loss needs; their results are not its gradients."""
    student_NV, _ = torch.mm(x.hidden_ND, x.weight_VD.T), torch.mm(x.teacher_ND, x.teacher_VD.T)
    x.hidden_ND.grad = torch.mm(student_NV, x.weight_VD)
    if x.weight_VD.requires_grad:
        x.weight_VD.grad = torch.mm(student_NV.T, x.hidden_ND)


def two_pass(x: Inputs, loss: str) -> Tensor:
    """Ours, keeping no gradient of the head between forward and backward."""
    return ours(x, loss, recompute=True)


CONTENDERS: dict[str, Callable[[Inputs, str], Tensor | None]] = {
    "ours": ours, "ours, two-pass": two_pass, "TRL": trl, "Liger": liger, "full logits": full_logits,
    "products alone": products,
}  # fmt: skip


def contenders(case: Case) -> list[str]:
    """The contenders for a case."""
    if case.loss != "reverse KL":
        return ["ours", *(["TRL"] if LOSSES[case.loss][0].support == "full" else []), "full logits"]
    if case.device == "cpu" and case.dtype == "bfloat16":
        return ["ours", "TRL"]
    return [name for name in CONTENDERS if name != "Liger" or (case.device == "cuda" and find_spec("liger_kernel"))]
