"""The slow twin of opsd/losses: float64, token by token, from the definitions; and the comparison with it.

It shares no code with opsd/losses: it reads settings from an `Objective` and numbers from heads and signals, and takes
autograd of the formulas. `math_value` uses no tensors at all.

Shapes: N tokens · D width · V vocabulary · E entries that are compared: the vocabulary, or a support and its bucket.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from opsd.losses import Divergence, Objective, Tokens
from opsd.models.head import Head
from opsd.signals import HiddenSignal, MixtureSignal, TopKSignal

LOWEST = -100.0  # nats
INF = float("inf")

# Tolerance as a share of 1 + the largest number: (value, gradient). Sums are float64 or float32; a gradient of
# bfloat16 states or weights is rounded to 8 bits at the end.
TOLERANCE = {torch.float64: (1e-10, 1e-9), torch.float32: (2e-5, 2e-5), torch.bfloat16: (2e-5, 1e-2)}

# ---- without tensors ------------------------------------------------------------------------------------------------


def math_logs(logits: Sequence[float]) -> list[float]:
    """log(e^z / Σ e^z)."""
    top = max(logits)
    total = math.log(math.fsum(math.exp(z - top) for z in logits))
    return [z - top - total for z in logits]


def math_value(student: Sequence[float], teacher: Sequence[float], beta: float) -> float:
    """One token's divergence from two lists of logits, by its definition."""

    def kl(p: list[float], q: list[float]) -> float:
        return math.fsum(math.exp(a) * (max(a, LOWEST) - max(b, LOWEST)) for a, b in zip(p, q, strict=True))

    s, t = math_logs(student), math_logs(teacher)
    if beta in (0.0, 1.0):
        return kl(s, t) if beta else kl(t, s)
    masses = [beta * math.exp(b) + (1 - beta) * math.exp(a) for a, b in zip(s, t, strict=True)]
    m = [math.log(mass) if mass > 0 else -INF for mass in masses]
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


# ---- distributions --------------------------------------------------------------------------------------------------


class _Floored(torch.autograd.Function):
    """The value is floored, the gradient is that of the number itself."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clamp(min=LOWEST)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


floored = _Floored.apply


def log_normalised(z: Tensor) -> Tensor:
    top = z.max().detach()
    return z - top - (z - top).exp().sum().log()


def log_distribution(hidden_D: Tensor, head: Head, vocab_size: int, temperature: float) -> Tensor:
    """The definition of a head at one token."""
    z = head.weight_VD[:vocab_size].double() @ hidden_D.double()
    if head.bias_V is not None:
        z = z + head.bias_V[:vocab_size].double()
    z = z * head.scale
    if head.softcap is not None:
        z = torch.tanh(z / head.softcap) * head.softcap
    return log_normalised(z / temperature)


def teacher_distribution(signal: HiddenSignal | MixtureSignal, n: int, vocab_size: int, temperature: float) -> Tensor:
    parts = [signal] if isinstance(signal, HiddenSignal) else signal.signals
    logs = [log_distribution(p.hidden_ND[n], p.head, vocab_size, temperature).detach() for p in parts]
    if isinstance(signal, HiddenSignal):
        return logs[0]
    if signal.kind == "arithmetic":
        return sum(w * log_p.exp() for w, log_p in zip(signal.weights, logs, strict=True)).log()
    powers = [
        sum(w * x[v] for w, x in zip(signal.weights, logs, strict=True))
        if all(x[v] > -INF for x in logs)
        else torch.tensor(-INF)
        for v in range(vocab_size)
    ]
    return log_normalised(torch.stack(powers).double())


# ---- terms of vocabulary entries ------------------------------------------------------------------------------------


def weighted(log_p: Tensor, nats: Tensor) -> Tensor:
    """p · nats, entry by entry; nothing where p is nothing."""
    return torch.where(log_p > -INF, log_p.exp() * nats, torch.zeros_like(nats))


def entry_values(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    if beta == 1.0:
        return weighted(log_s, floored(log_s) - floored(log_t))
    if beta == 0.0:
        return weighted(log_t, floored(log_t) - floored(log_s))
    mass = beta * log_t.exp() + (1.0 - beta) * log_s.exp()
    log_m = torch.where(mass > 0, mass, torch.ones_like(mass)).log()
    return beta * weighted(log_t, floored(log_t) - log_m) + (1.0 - beta) * weighted(log_s, floored(log_s) - log_m)


def best(log_p: Tensor, k: int) -> list[int]:
    values = log_p.tolist()
    return sorted(range(len(values)), key=lambda v: -values[v])[:k]


def support_ids(d: Divergence, log_s: Tensor, log_t: Tensor) -> list[int]:
    sides = {"teacher_top_k": [log_t], "student_top_k": [log_s], "union": [log_s, log_t]}[d.support]
    return sorted({v for side in sides for v in best(side, d.support_k)})


def log_mass(log_p: Tensor, ids: list[int]) -> Tensor:
    kept = [v for v in ids if log_p[v] > -INF]
    return torch.logsumexp(log_p[kept], 0) if kept else torch.tensor(-INF, dtype=torch.float64)


def listed(signal: TopKSignal, n: int) -> tuple[list[int], Tensor, Tensor]:
    """The ids of a list, their log-probabilities and the log of the mass outside."""
    kept = [j for j in range(signal.ids_NK.shape[1]) if signal.logprobs_NK[n, j] > -INF]
    log_t = signal.logprobs_NK[n, kept].double()
    rest = max(1.0 - math.fsum(log_t.exp().tolist()), 1e-6)
    return signal.ids_NK[n, kept].tolist(), log_t, torch.tensor(math.log(rest), dtype=torch.float64)


def compared(d: Divergence, log_s: Tensor, teacher: Tensor | tuple, metrics: dict[str, float]) -> tuple[Tensor, Tensor]:
    """Student and teacher, (E,) each, over a top-k support and its tail."""
    if isinstance(teacher, Tensor):
        ids = support_ids(d, log_s, teacher)
        outside = [v for v in range(len(log_s)) if v not in ids]
        log_t, rest_t = teacher[ids], log_mass(teacher, outside)
    else:
        ids, log_t, rest_t = teacher
        outside = [v for v in range(len(log_s)) if v not in ids]
        log_t = log_t / d.temperature
    rest_s = log_mass(log_s, outside)
    metrics["support/student"], metrics["support/teacher"] = (1 - x.exp().item() for x in (rest_s, rest_t))
    if d.tail == "none":
        return log_s[ids], log_t
    if d.tail == "renormalise":
        return log_normalised(log_s[ids]), log_normalised(log_t)
    return torch.cat([log_s[ids], rest_s[None]]), log_normalised(torch.cat([log_t, rest_t[None]]))


class Token(NamedTuple):
    """One token: its value, a number with its gradient, log s(y), log t(y), H(s), and its metrics."""

    value: Tensor
    with_gradient: Tensor
    log_s_y: Tensor
    log_t_y: Tensor
    entropy: Tensor
    metrics: dict[str, float]


def distribution_value(d: Divergence, log_s: Tensor, teacher: Tensor | tuple, metrics: dict[str, float]) -> Tensor:
    sides = (log_s, teacher) if d.support == "full" else compared(d, log_s, teacher, metrics)
    each = entry_values(*sides, d.beta)
    if d.entropy_gate is not None:
        entropy = -weighted(sides[1], floored(sides[1])).sum().item()
        metrics["gated"] = float(entropy > d.entropy_gate)
        each = each + metrics["gated"] * entry_values(*sides, 0.0)
    if d.entry_clip is not None:
        metrics["clipped/entries"] = float(any(x > d.entry_clip for x in each.tolist()))
        each = torch.stack([x if x <= d.entry_clip else x.detach() * 0 + d.entry_clip for x in each])
    return each.sum()


def baseline_of(d: Divergence, log_s: Tensor, teacher: Tensor | tuple) -> float:
    """E[r·|∇log s|²] / E[|∇log s|²]: where d/db of the gradient's second moment is 0."""
    if d.baseline == "none":
        return 0.0
    coarse = Divergence(support="teacher_top_k")
    log_s, log_t = (log_s, teacher) if isinstance(teacher, Tensor) else compared(coarse, log_s, teacher, {})
    s, up, down = log_s.exp().tolist(), 0.0, 0.0
    for y in range(len(s)):
        size = sum(((v == y) - s[v]) ** 2 for v in range(len(s)))  # ∂log s(y)/∂z(v) = [v = y] - s(v)
        ratio = max(log_s[y].item(), LOWEST) - max(log_t[y].item(), LOWEST)
        up, down = up + s[y] * size * ratio, down + s[y] * size
    return up / down if down > 0 else 0.0


def token(d: Divergence, log_s: Tensor, teacher: Tensor | tuple, y: int, log_t_y: Tensor) -> Token:
    metrics: dict[str, float] = {}
    if d.support == "sampled":
        value = (log_s[y].clamp(min=LOWEST) - log_t_y.clamp(min=LOWEST)).detach()
        with_gradient = (value - baseline_of(d, log_s.detach(), teacher)) * log_s[y]
    else:
        value = with_gradient = distribution_value(d, log_s, teacher, metrics)
    if d.token_clip is not None:
        metrics["clipped/tokens"] = float(value.item() > d.token_clip)
        if metrics["clipped/tokens"]:
            value, with_gradient = torch.full_like(value, d.token_clip), 0.0 * log_s.sum().nan_to_num(0, 0, 0)
    entropy = -weighted(log_s, floored(log_s)).sum()
    return Token(value, with_gradient, log_s[y], log_t_y, entropy, metrics)


# ---- the whole objective --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """The arguments of an objective."""

    hidden_ND: Tensor
    head: Head
    signal: HiddenSignal | MixtureSignal | TopKSignal
    tokens: Tokens
    reference: HiddenSignal | None = None
    contrast_signal: HiddenSignal | None = None

    def vocab_size(self, has_reference: bool) -> int:
        """The number of ids that all used heads share."""
        used = [self.signal, self.contrast_signal, *([self.reference] if has_reference else [])]
        others = [part for each in used for part in getattr(each, "signals", [each]) if isinstance(part, HiddenSignal)]
        return min(len(head.weight_VD) for head in (self.head, *(o.head for o in others)))


@dataclass
class Result:
    """Values and gradients by name."""

    values: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)


def rollouts(tokens: Tokens, places: Sequence[int]) -> list[list[int]]:
    result: dict[int, list[int]] = defaultdict(list)
    for n in places:
        result[0 if tokens.row_N is None else int(tokens.row_N[n])].append(n)
    return list(result.values())


def kept_weights(objective: Objective, rows: list[list[int]], each: dict[int, Token]) -> dict[int, float]:
    """n → the factor of each token that is kept."""
    factors = {}
    for row in rows:
        count = math.ceil(round(objective.keep_fraction * len(row), 6))
        score = (lambda n: -each[n].entropy) if objective.keep_by == "entropy" else (lambda n: -each[n].value)
        factors |= dict.fromkeys(sorted(row, key=score)[:count], len(row) / count)
    return factors


def cost(objective: Objective, row: list[int], n: int, each: dict[int, Token]) -> float:
    """The reward to go of token n, with its sign turned: what later tokens of its rollout cost."""
    r = {m: (each[m].log_s_y.clamp(min=LOWEST) - each[m].log_t_y.clamp(min=LOWEST)).item() for m in row if m > n}
    if objective.reward_to_go == "discounted":
        return sum(objective.discount ** (row.index(m) - row.index(n)) * r[m] for m in r)
    return sum(r.values()) / len(r) if objective.reward_to_go == "mean" and r else 0.0


def drift_weights(objective: Objective, rows: list[list[int]], each: dict[int, Token]) -> dict[int, float]:
    """n → 1 + γ·(1 − d/D) over its mean in the rollout."""
    factors = {}
    for row in rows:
        gaps = [abs((each[n].log_s_y.clamp(min=LOWEST) - each[n].log_t_y.clamp(min=LOWEST)).item()) for n in row]
        shares = [sum(gaps[:place]) / sum(gaps) if any(gaps) else 0.0 for place in range(len(row))]
        raw = [1 + objective.prefix_weight * (1 - share) for share in shares]
        factors |= {n: value * len(raw) / sum(raw) for n, value in zip(row, raw, strict=True)}
    return factors


def contrast(problem: Problem, rows: list[list[int]], vocab_size: int) -> dict[int, float]:
    factors = {}
    for row in rows:
        gaps = {}
        for n in row:
            y = int(problem.tokens.ids_N[n])
            sides = (problem.signal, problem.contrast_signal)
            right, contrast_signal = (teacher_distribution(x, n, vocab_size, 1.0)[y] for x in sides)
            gaps[n] = abs((right - contrast_signal).item())
        mean = sum(gaps.values()) / len(gaps)
        factors |= {n: gap / mean if mean else 0.0 for n, gap in gaps.items()}
    return factors


def reference(objective: Objective, problem: Problem) -> Result:
    """The objective by its definition."""
    d, tokens = objective.divergence, problem.tokens
    v = problem.vocab_size(objective.ref_kl_coef > 0)
    leaves = {"states": problem.hidden_ND, "weight": problem.head.weight_VD, "bias": problem.head.bias_V}
    leaves = {name: x.detach().double().requires_grad_() for name, x in leaves.items() if x is not None}
    head = replace(problem.head, weight_VD=leaves["weight"], bias_V=leaves.get("bias"))
    places = [n for n, weight in enumerate(tokens.weight_N.tolist()) if weight != 0]
    share = lambda n: 1.0 if tokens.distill_weight_N is None else float(tokens.distill_weight_N[n])  # noqa: E731
    advantage = lambda n: 0.0 if tokens.advantage_N is None else float(tokens.advantage_N[n])  # noqa: E731
    each, logs = {}, {}
    for n in places:
        y = int(tokens.ids_N[n])
        logs[n] = log_distribution(leaves["states"][n], head, v, d.temperature)
        if isinstance(problem.signal, TopKSignal):
            teacher, log_t_y = listed(problem.signal, n), problem.signal.sampled_logprobs_N[n].double()
        else:
            teacher = teacher_distribution(problem.signal, n, v, d.temperature)
            log_t_y = teacher[y]
        one = token(d, logs[n], teacher, y, log_t_y)
        each[n] = one._replace(
            value=share(n) * one.value,
            with_gradient=share(n) * one.with_gradient,
            log_t_y=one.log_t_y if share(n) else one.log_s_y.detach(),
            metrics={name: share(n) * value for name, value in one.metrics.items()},
        )
    rows = rollouts(tokens, places)
    row_of = {n: row for row in rows for n in row}
    weight = {n: float(tokens.weight_N[n]) for n in places}
    if objective.keep_fraction < 1:
        kept = kept_weights(objective, rows, each)
        weight = {n: weight[n] * (kept.get(n, 0.0) if share(n) else 1.0) for n in weight}
    if objective.prefix_weight:
        factors = drift_weights(objective, rows, each)
        weight = {n: weight[n] * (factors[n] if share(n) else 1.0) for n in weight}
    if problem.contrast_signal is not None:
        factors = contrast(problem, rows, v)
        weight = {n: weight[n] * (factors[n] if share(n) else 1.0) for n in weight}
    weight = {n: w for n, w in weight.items() if w}
    loss, steered = leaves["states"].sum().nan_to_num(0, 0, 0) * 0, leaves["states"].sum().nan_to_num(0, 0, 0) * 0
    columns: dict[str, dict[int, float]] = defaultdict(dict)
    # A pass over all tokens before some were left out leaves the metrics of all of them.
    has_statistics_pass = objective.keep_fraction < 1 or objective.prefix_weight or objective.reward_to_go != "none"
    for n in places if has_statistics_pass else weight:
        for name, value in metrics_of(objective, tokens, n, each[n]).items():
            columns[name][n] = value
    for n, w in weight.items():
        one = each[n]
        w *= columns["importance/ratio"].get(n, 1.0)
        steer = one.with_gradient + (share(n) * cost(objective, row_of[n], n, each) - advantage(n)) * one.log_s_y
        total = one.value.detach()
        if objective.ref_kl_coef:
            held = distribution_value(
                Divergence(), logs[n], teacher_distribution(problem.reference, n, v, d.temperature), {}
            )
            columns["ref_kl"][n] = held.item()
            steer, total = steer + objective.ref_kl_coef * held, total + objective.ref_kl_coef * held.detach()
        loss, steered = loss + w * total, steered + w * steer
    steered.backward()
    values = {"loss": loss.detach()} | {name: scattered(x, len(tokens.weight_N)) for name, x in columns.items() if x}
    return Result(values, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None})


def metrics_of(objective: Objective, tokens: Tokens, n: int, one: Token) -> dict[str, float]:
    """The metrics of a token."""
    result = {"divergence": one.value.item(), "entropy": one.entropy.item(), **one.metrics}
    result |= {"logprob": one.log_s_y.item(), "teacher_logprob": one.log_t_y.item()}
    if objective.importance_clip is not None and tokens.rollout_logprobs_N is not None:
        sampler = float(tokens.rollout_logprobs_N[n])
        ratio = 1.0 if math.isnan(sampler) else math.exp(min(one.log_s_y.item() - sampler, 700.0))
        result["importance/truncated"] = float(ratio > objective.importance_clip)
        result["importance/ratio"] = min(ratio, objective.importance_clip)
    if objective.divergence.support == "sampled" or objective.reward_to_go != "none":
        r = one.log_s_y.clamp(min=LOWEST).item() - one.log_t_y.clamp(min=LOWEST).item()
        result |= {"k1": r, "k2": r * r / 2, "k3": math.exp(-r) - 1 + r}
    return result


def scattered(column: dict[int, float], count: int) -> Tensor:
    return torch.tensor([column.get(n, 0.0) for n in range(count)], dtype=torch.float64)


# ---- the comparison -------------------------------------------------------------------------------------------------


def measured(objective: Objective, problem: Problem, factor: float = 1.0) -> Result:
    """Values and gradients of opsd for the same problem."""
    leaves = {"states": problem.hidden_ND, "weight": problem.head.weight_VD, "bias": problem.head.bias_V}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items() if x is not None}
    head = replace(problem.head, weight_VD=leaves["weight"], bias_V=leaves.get("bias"))
    record = objective(
        leaves["states"],
        head,
        problem.signal,
        problem.tokens,
        reference=problem.reference,
        contrast_signal=problem.contrast_signal,
    )
    (record.loss * factor).backward()
    values = {"loss": record.loss.detach(), "divergence": record.divergence_N, "entropy": record.entropy_N}
    return Result(values | dict(record.metrics), {name: leaf.grad for name, leaf in leaves.items()})


def is_close(result: Tensor, expected: Tensor, tolerance: float) -> bool:
    size = 1.0 + (expected.abs().max().item() if expected.numel() else 0.0)
    return result.shape == expected.shape and bool(((result.double() - expected).abs() <= tolerance * size).all())


def agrees(objective: Objective, problem: Problem, dtype: torch.dtype | None = None) -> None:
    """Assert that every value, metric and gradient equals the twin's."""
    result, expected = measured(objective, problem), reference(objective, problem)
    of_value, of_gradient = TOLERANCE[dtype or problem.hidden_ND.dtype]
    for name, value in expected.values.items():
        # Metrics are float32 for states of any dtype.
        tolerance = of_value if name == "loss" else max(of_value, 1e-6)
        assert is_close(result.values[name], value, tolerance), (name, result.values[name], value)
    for name, gradient in expected.gradients.items():
        assert is_close(result.gradients[name], gradient, of_gradient), (name, result.gradients[name], gradient)
