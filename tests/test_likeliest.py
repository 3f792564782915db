"""What both sides would have sampled at traced tokens: equal to a sort of both distributions, token by token.

And the teacher's entropy: equal to its definition.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MAKE_TEACHER, make_trainer
from losses_cases import SIGNALS, problem
from losses_twin import Problem, listed, log_distribution, teacher_distribution

from opsd.health.traces import read_traces
from opsd.losses import Divergence, Objective, kernel
from opsd.losses.likeliest import COUNT, taken_apart, teacher_entropy
from opsd.signals import TopKSignal


def sorted_ids(logprobs: dict[int, float]) -> list[int]:
    return sorted(logprobs, key=lambda token: -logprobs[token])


def distribution(log_p: Any) -> dict[int, float]:
    return {token: float(value) for token, value in enumerate(log_p)}


def sides(given: Problem, n: int, temperature: float) -> tuple[dict[int, float], dict[int, float]]:
    """Both sides' log-probabilities by id; of a top-k list those that it has."""
    size = given.vocab_size(False)
    student = distribution(log_distribution(given.hidden_ND[n], given.head, size, temperature))
    if isinstance(given.signal, TopKSignal):
        ids, log_t, _ = listed(given.signal, n)
        return student, dict(zip(ids, log_t.tolist(), strict=True))
    return student, distribution(teacher_distribution(given.signal, n, size, temperature))


def traced(given: Problem, every: int = 3) -> Problem:
    count = len(given.hidden_ND)
    return replace(given, tokens=replace(given.tokens, is_traced_N=torch.arange(count) % every == 0))


CASES: list[tuple[str, dict[str, Any]]] = [
    *((signal, {}) for signal in SIGNALS),
    *(("hidden", settings) for settings in ({"keep_fraction": 0.5}, {"loss_budget_mb": 0.002}, {"compile_loss": True})),
    ("top-k lists", {"loss_budget_mb": 0.002}),
]


@pytest.mark.parametrize(("signal", "settings"), CASES, ids=str)
def test_alternatives_are_the_likeliest_tokens_of_both_sides(
    signal: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(kernel.BLOCK_VALUES, "cpu", 70)  # several blocks
    temperature = 1.0 if signal == "top-k lists" else 1.7
    given = traced(problem(23, signal=signal, left_out=True))
    objective = Objective(Divergence(support="teacher_top_k", support_k=4, temperature=temperature), **settings)
    record = objective(given.hidden_ND, given.head, given.signal, given.tokens, reference=given.reference)
    found = [taken_apart(row) for row in record.alternatives_NA.tolist()]
    entropy_N = teacher_entropy(record.alternatives_NA)
    seen = 0
    for n, each in enumerate(found):
        if n % 3 or given.tokens.weight_N[n] == 0:
            assert each is None and entropy_N[n].isnan()
            continue
        if each is None:
            assert "keep_fraction" in settings  # it was left out of the loss
            continue
        seen += 1
        student, teacher = sides(given, n, temperature)
        own = int(given.tokens.ids_N[n])  # type: ignore[index]
        assert each.student_ids == sorted_ids(student)[:COUNT]
        assert each.student_logprobs == pytest.approx([student[token] for token in each.student_ids], abs=1e-5)
        assert each.student_rank == 1 + sum(value > student[own] for value in student.values())
        assert each.teacher_ids == sorted_ids(teacher)[:COUNT]
        assert each.teacher_logprobs == pytest.approx([teacher[token] for token in each.teacher_ids], abs=1e-5)
        if signal == "top-k lists":
            assert entropy_N[n].isnan()
        else:
            entropy = -sum(math.exp(value) * value for value in teacher.values())
            assert float(entropy_N[n]) == pytest.approx(entropy, abs=1e-5)
        assert each.teacher_rank == (1 + sum(v > teacher[own] for v in teacher.values()) if own in teacher else 0)
    assert seen >= 2


@pytest.mark.parametrize("recompute", [False, True])
def test_tracing_changes_no_loss_and_no_gradient(recompute: bool) -> None:
    objective = Objective(Divergence(), ref_kl_coef=0.2, keep_fraction=0.7, recompute_loss=recompute)
    results = []
    for given in (problem(23), traced(problem(23))):
        states = given.hidden_ND.clone().requires_grad_()
        record = objective(states, given.head, given.signal, given.tokens, reference=given.reference)
        record.loss.backward()
        results.append((record.loss, record.divergence_N, states.grad))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("teacher", ["same_checkpoint", "mixture", "routed"])
def test_traces_have_them_at_every_scored_token(teacher: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, MAKE_TEACHER[teacher](), max_steps=2, trace_rollouts=3)
    trainer.train()
    rollouts = list(read_traces(tmp_path, alternatives=True))
    assert len(rollouts) == 6
    for rollout in rollouts:
        assert len(rollout.alternatives) == len(rollout.teacher_entropy) == len(rollout.ids)
        assert all(0 < nats < 20 for nats in rollout.teacher_entropy)
        for place, found in enumerate(rollout.alternatives):
            assert found is not None
            assert len(found.student_tokens) == len(found.teacher_tokens) == COUNT
            if found.student_rank <= COUNT:
                assert found.student_logprobs[found.student_rank - 1] == pytest.approx(rollout.logprob[place], abs=0.01)
                assert found.student_tokens[found.student_rank - 1] == rollout.tokens[place]
            if found.teacher_rank <= COUNT:
                place_of = found.teacher_logprobs[found.teacher_rank - 1]
                assert place_of == pytest.approx(rollout.teacher_logprob[place], abs=0.01)
