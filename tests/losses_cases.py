"""The tables that the tests of opsd/losses run over, and the problems they are run on.

A new support, tail, head, signal or objective is tested by adding a line.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import torch
from losses_twin import Problem
from torch import Tensor

from opsd.errors import ConfigError
from opsd.losses import Divergence, Objective, Tokens
from opsd.losses.supports import SUPPORTS, TAILS
from opsd.models.head import Head
from opsd.signals import HiddenSignal, MixtureSignal, TopKSignal

SIZES = (1, 3, 31, 47, 123)
BETAS = (0.0, 0.05, 0.5, 0.95, 1.0)
ENDS = (0.0, 0.3, 1.0)
TOP_K = tuple(name for name in SUPPORTS if name not in ("full", "sampled"))


def _table() -> list[dict]:
    rows: list[dict] = [{"beta": beta} for beta in BETAS]
    rows += [
        {"beta": beta, "support": support, "support_k": 4, "tail": tail, "force_tail": tail == "none"}
        for beta, support, tail in product(ENDS, TOP_K, TAILS)
    ]
    for clip, beta in product(
        ({"entry_clip": 0.02}, {"token_clip": 0.3}, {"entry_clip": 0.05, "token_clip": 0.1}), ENDS
    ):
        rows.append({"beta": beta} | clip)
        rows += [
            {"beta": beta, "support": "union", "support_k": 3, "tail": tail, "force_tail": tail == "none"} | clip
            for tail in TAILS
        ]
    rows += [{"support": "sampled", "baseline": b} | c for b in ("optimal", "none") for c in ({}, {"token_clip": 0.2})]
    for clip in ({}, {"entry_clip": 0.02}, {"token_clip": 0.5}):
        rows.append({"entropy_gate": 2.2} | clip)
        rows += [{"entropy_gate": 1.1, "support": "union", "support_k": 3, "tail": tail} | clip for tail in ("bucket",)]
    rows.append({"support": "teacher_top_k", "support_k": 1000})
    rows.append({"support": "union", "support_k": 1000, "tail": "renormalise"})
    return rows + [row | {"temperature": 1.7} for row in rows[:6] + rows[10:14] + rows[-8:]]


DIVERGENCE_CASES = [Divergence(**row) for row in _table()]

HEADS = {
    "plain": {},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 2.0},
    "bias": {"bias": True},
    "all of it": {"scale": 2.0, "softcap": 3.0, "bias": True},
}

MIXTURES = {
    "arithmetic": ((0.3, 0.7), "arithmetic"),
    "arithmetic, one of no weight": ((0.0, 1.0), "arithmetic"),
    "geometric": ((0.3, 0.7), "geometric"),
    "geometric, pushed away": ((1.5, -0.5), "geometric"),
}
SIGNALS = ("hidden", "top-k lists", *MIXTURES)

# Sides whose head masks ids by a bias of -inf, as some checkpoints do with reserved ids.
MASKED = {"neither": (), "the student's": ("student",), "the teacher's": ("teacher",), "both": ("student", "teacher")}

OBJECTIVES = {
    "reference policy": {"ref_kl_coef": 0.4},
    "importance": {"importance_clip": 1.5},
    "keep by entropy": {"keep_fraction": 0.4},
    "keep by disagreement": {"keep_fraction": 0.6, "keep_by": "disagreement"},
    "by drift": {"prefix_weight": 0.5},
    "discounted": {"reward_to_go": "discounted", "discount": 0.9},
    "undiscounted": {"reward_to_go": "discounted"},
    "length-normalised": {"reward_to_go": "mean"},
    "all of it": {
        "ref_kl_coef": 0.4,
        "importance_clip": 1.5,
        "keep_fraction": 0.7,
        "prefix_weight": 2.0,
        "reward_to_go": "discounted",
        "discount": 0.5,
    },
}


def name_of(divergence: Divergence) -> str:
    """The settings that differ from the defaults."""
    usual = Divergence()
    return " ".join(f"{k}={v}" for k, v in vars(divergence).items() if v != getattr(usual, k)) or "default"


def objectives() -> list[tuple[str, Objective]]:
    """Every objective with every divergence that it accepts."""
    result = []
    for (name, settings), divergence in product(OBJECTIVES.items(), DIVERGENCE_CASES):
        try:
            result.append((f"{name}: {name_of(divergence)}", Objective(divergence, **settings)))
        except ConfigError:
            assert divergence.beta != 1.0 and "reward_to_go" in settings
    return result


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head_of(v: int, d: int, seed: int, *, bias: bool = False, **settings: float) -> Head:
    return Head(0.6 * random(v, d, seed=seed), 0.5 * random(v, seed=seed + 1) if bias else None, **settings)


def with_masked_ids(head: Head, every: int, first: int) -> Head:
    bias = head.bias_V.clone() if head.bias_V is not None else torch.zeros(head.vocab_size).to(head.weight_VD)
    bias[first::every] = -torch.inf
    return replace(head, bias_V=bias)


def top_k_lists(logprobs_NV: Tensor, ids_N: Tensor, k: int = 4) -> TopKSignal:
    """Lists of the likeliest ids; every third is shorter by one, and filled up."""
    values, ids = logprobs_NV.topk(k)
    values[::3, -1], ids[::3, -1] = -torch.inf, ids[::3, 0]
    return TopKSignal(ids, values, logprobs_NV.gather(1, ids_N[:, None])[:, 0])


def problem(
    n: int = 7,
    *,
    v: int = 29,
    teacher_v: int | None = None,
    d: int = 5,
    seed: int = 0,
    signal: str = "hidden",
    head: str = "plain",
    masked: tuple[str, ...] = (),
    left_out: bool = False,
    tied: bool = False,
    contrast_signal: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """A problem of N tokens in rollouts of five, with everything that any objective needs.

    Args:
        left_out: whether every fourth token has no weight.
        tied: whether the teacher has the student's head.
    """
    settings, teacher_v = HEADS[head], teacher_v or v
    student_head = head_of(v, d, seed + 10, **settings)
    heads = [student_head if tied else head_of(teacher_v, d, seed + 20 + 10 * i, **settings) for i in range(4)]
    if "student" in masked:
        student_head = with_masked_ids(student_head, 7, 3)
    if "teacher" in masked:
        heads = [with_masked_ids(h, 5, 3 + (i == 1)) for i, h in enumerate(heads)]
    parts = [HiddenSignal(random(n, d, seed=seed + 60 + i).to(dtype), to(h, dtype)) for i, h in enumerate(heads)]
    ids_N = torch.randint(0, 3, (n,), generator=torch.Generator().manual_seed(seed)) + torch.arange(n) % 2 * 5
    weight_N = 0.2 + random(n, seed=seed + 70).abs()
    weight_N[1::4] = 0.0 if left_out else 1.0
    rollout_logprobs_N = random(n, seed=seed + 71) - 3.0
    rollout_logprobs_N[2::5] = torch.nan
    tokens = Tokens(weight_N.float(), ids_N, torch.arange(n) // 5, rollout_logprobs_N.float())
    return Problem(
        random(n, d, seed=seed + 80).to(dtype),
        to(student_head, dtype),
        _signal(signal, parts, min(v, teacher_v), ids_N),
        tokens,
        parts[2],
        parts[3] if contrast_signal else None,
    )


def _signal(kind: str, parts: list[HiddenSignal], v: int, ids_N: Tensor) -> HiddenSignal | MixtureSignal | TopKSignal:
    if kind == "hidden":
        return parts[0]
    if kind == "top-k lists":
        return top_k_lists(parts[0].narrow(v).combine([parts[0].head.narrow(v).logits(parts[0].hidden_ND)], 1.0), ids_N)
    weights, how = MIXTURES[kind]
    return MixtureSignal(parts[:2], weights, how)


def to(head: Head, dtype: torch.dtype) -> Head:
    return replace(
        head, weight_VD=head.weight_VD.to(dtype), bias_V=None if head.bias_V is None else head.bias_V.to(dtype)
    )


def answers(divergence: Divergence, signal: object) -> bool:
    """Whether the signal has what the divergence compares."""
    try:
        divergence.check_signal(signal)  # type: ignore[arg-type]
    except ConfigError:
        assert isinstance(signal, TopKSignal)
        return False
    return True


def of_logits(student: list | Tensor, teacher: list | Tensor, **tokens: Tensor) -> Problem:
    """A problem whose states are its logits, in float64."""
    student, teacher = (torch.as_tensor(x, dtype=torch.float64) for x in (student, teacher))
    eye = Head(torch.eye(student.shape[1], dtype=student.dtype))
    weight_N = tokens.pop("weight_N", torch.ones(len(student)))
    tokens.setdefault("ids_N", torch.zeros(len(student), dtype=torch.int64))
    return Problem(student, eye, HiddenSignal(teacher, eye), Tokens(weight_N, **tokens))
