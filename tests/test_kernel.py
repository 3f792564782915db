"""The fused kernel: chunks, blocks, memory, recomputation, dtypes; and broken code that the comparison must notice."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from losses_cases import DIVERGENCE_CASES, HEADS, SIZES, name_of, objectives, problem
from losses_twin import agrees, measured, reference

from opsd.losses import Divergence, Objective, divergence, kernel, pointwise, rule, supports
from opsd.losses import objective as objective_module
from opsd.losses.pointwise import PointwiseTerms
from opsd.losses.supports import SUPPORTS
from opsd.models.head import Head

ONE_PER_SUPPORT = {name: Divergence(support=name, support_k=3) for name in SUPPORTS}
every_support = pytest.mark.parametrize("divergence", ONE_PER_SUPPORT.values(), ids=ONE_PER_SUPPORT)
# MiB for the logits of a chunk; 47 tokens × 31 ids × 2 sides take 0.022 in float64.
BUDGETS = {"one row": 1e-9, "two rows": 2 * 2 * 31 * 8 / 2**20, "seven rows": 7 * 2 * 31 * 8 / 2**20, "all": 1.0}
BLOCKS = {"one row": 1, "two rows": 62, "five rows": 155, "all": 2**19}


@every_support
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("budget_mb", BUDGETS.values(), ids=BUDGETS)
def test_chunks_and_blocks_change_nothing(
    budget_mb: float, block: int, divergence: Divergence, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(kernel.BLOCK_VALUES, "cpu", block)
    objective = Objective(divergence, loss_budget_mb=budget_mb, ref_kl_coef=0.2)
    agrees(objective, problem(47, v=31, head="bias", left_out=True))


@pytest.mark.parametrize("signal", ["arithmetic", "top-k lists"])
@pytest.mark.parametrize("n", SIZES)
def test_chunks_of_every_size_and_signal(n: int, signal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernel.BLOCK_VALUES, "cpu", 70)
    objective = Objective(
        Divergence(support="teacher_top_k"), loss_budget_mb=0.003, reward_to_go="discounted", keep_fraction=0.5
    )
    agrees(objective, problem(n, v=23, head="all of it", signal=signal, dtype=torch.float32))


def test_a_chunk_takes_what_the_budget_says(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    real = kernel._buffers
    monkeypatch.setattr(kernel, "_buffers", lambda shape, *a: sizes.append(shape) or real(shape, *a))
    measured(Objective(loss_budget_mb=BUDGETS["seven rows"]), problem(47, v=31))
    assert sizes == [(2, 7, 31)]


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_the_compiled_rule_computes_the_same_for_every_size() -> None:
    """One graph: a second size, and a last chunk that is shorter, are not compiled again."""
    objective = Objective(compile_loss=True, ref_kl_coef=0.2, loss_budget_mb=BUDGETS["seven rows"])
    agrees(objective, problem(31, dtype=torch.float32))
    agrees(objective, problem(9, dtype=torch.float32))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# ---- dtypes ---------------------------------------------------------------------------------------------------------

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every_dtype
@pytest.mark.parametrize("divergence", DIVERGENCE_CASES[::3], ids=name_of)
def test_states_of_every_dtype(divergence: Divergence, dtype: torch.dtype) -> None:
    agrees(Objective(divergence, loss_budget_mb=0.001), problem(9, dtype=dtype, head="all of it"))


@every_dtype
@pytest.mark.parametrize("head", HEADS)
def test_heads_of_every_dtype_widened_in_parts(head: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opsd.models.head.WIDENED_ROWS", 8)
    agrees(Objective(loss_budget_mb=0.001), problem(9, dtype=dtype, head=head))


def test_float32_states_over_a_bfloat16_head() -> None:
    case = problem(9, dtype=torch.bfloat16, head="bias")
    agrees(Objective(), replace(case, hidden_ND=case.hidden_ND.float()), torch.bfloat16)


@every_support
def test_autocast_changes_nothing(divergence: Divergence) -> None:
    case, objective = problem(9, dtype=torch.float32, head="bias"), Objective(divergence)
    without = measured(objective, case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = measured(objective, case)
    assert all(torch.equal(within.gradients[name], g) for name, g in without.gradients.items())
    assert all(torch.equal(within.values[name], x) for name, x in without.values.items())


def test_gradients_have_the_dtype_of_what_they_belong_to() -> None:
    case = problem(5, dtype=torch.bfloat16, head="bias")
    result = measured(Objective(), replace(case, hidden_ND=case.hidden_ND.float()))
    assert [g.dtype for g in result.gradients.values()] == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert result.values["loss"].dtype == torch.float32


# ---- recomputation and memory ---------------------------------------------------------------------------------------

SOME = objectives()[::5]


@pytest.mark.parametrize("objective", [o for _, o in SOME], ids=[name for name, _ in SOME])
def test_recomputing_gives_exactly_the_same(objective: Objective) -> None:
    case = problem(12, dtype=torch.float32, head="all of it", left_out=True, contrast_signal=True)
    kept = measured(replace(objective, loss_budget_mb=0.001), case)
    again = measured(replace(objective, loss_budget_mb=0.001, recompute_loss=True), case)
    assert all(torch.equal(again.values[name], x) for name, x in kept.values.items())
    assert all(torch.equal(again.gradients[name], g) for name, g in kept.gradients.items())


def test_recomputing_under_autocast_uses_the_products_of_the_forward_pass() -> None:
    case = problem(9, dtype=torch.float32)
    hidden = case.hidden_ND.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = Objective(recompute_loss=True)(hidden, case.head, case.signal, case.tokens).loss
    loss.backward()
    assert torch.equal(hidden.grad, measured(Objective(), case).gradients["states"])


MEMORY = """
import resource, sys, torch
from opsd.models.head import Head
from opsd.losses import Divergence, Objective, Tokens
from opsd.signals import HiddenSignal
n, support, recompute = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
g = torch.Generator().manual_seed(0)
h = torch.randn(n, 8, generator=g).requires_grad_(); w = torch.randn(20_000, 8, generator=g).requires_grad_()
objective = Objective(Divergence(support=support), loss_budget_mb=8, recompute_loss=recompute)
def run(k):
    tokens = Tokens(torch.ones(k), torch.zeros(k, dtype=torch.int64))
    objective(h[:k], Head(w), HiddenSignal(h[:k].detach(), Head(w)), tokens).loss.backward()
run(100)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(n)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("support", "recompute"), [("full", False), ("union", False), ("full", True)])
def test_memory_does_not_grow_with_tokens_times_vocabulary(support: str, recompute: bool) -> None:
    """Logits exist a chunk at a time: peak memory after 100 tokens and after 3,200 is nearly the same.

    Small tensors kept from every block once pinned the heap between the large tensors: 990 MiB here.
    """
    command = [sys.executable, "-c", MEMORY, "3200", support, str(recompute)]
    grown = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    one_side = 3200 * 20_000 * 4 / 2**20
    assert grown < 0.3 * one_side, f"{grown:.0f} MiB more, and logits of one side are {one_side:.0f}"


# ---- sabotage -------------------------------------------------------------------------------------------------------

real_scatter, real_transform = supports.scatter_to_vocab, Head.backward_transform
real_choose, real_clip = supports.choose, pointwise.clip_terms
real_return, real_importance = objective_module.discounted_reward_to_go, rule.importance_weight
real_call, real_corrected = rule.TrainingRule.__call__, rule.TrainingRule._corrected


def flipped(terms: Callable[..., PointwiseTerms]) -> Callable[..., PointwiseTerms]:
    def of_flipped_sign(*args: Any) -> PointwiseTerms:
        right = terms(*args)
        return PointwiseTerms(-right.value, -right.grad_log_s, -right.shift)

    return of_flipped_sign


def swapped(terms: Callable[..., PointwiseTerms]) -> Callable[..., PointwiseTerms]:
    return lambda log_s, s, log_t, *beta: terms(log_t, log_t.exp(), log_s, *beta)


def row(name: str, change: Callable[..., Any]) -> tuple[Any, str, Any]:
    """A row of the table whose terms are changed."""
    table = pointwise.DIVERGENCES
    return table, name, replace(table[name], terms=change(table[name].terms))


def without_tail_gradient(result: PointwiseTerms, *rest: Any) -> Any:
    grad_log_s = result.grad_log_s.clone()
    grad_log_s[:, -1] = 0.0
    return real_scatter(result._replace(grad_log_s=grad_log_s), *rest)


def all_used(*args: Any) -> tuple:
    ids, used = real_choose(*args)
    return ids, used | True


def times(factor: float) -> Callable[..., Any]:
    def call(self: Any, *args: Any) -> Any:
        outcome = real_call(self, *args)
        return outcome._replace(grad_RV=outcome.grad_RV * factor)

    return call


def reversed_time(ratio: Any, row: Any, discount: float) -> Any:
    return real_return(ratio.flip(0), row.flip(0), discount).flip(0)


def of(**settings: Any) -> Objective:
    names = Divergence.__dataclass_fields__
    inner = Divergence(**{k: v for k, v in settings.items() if k in names})
    return Objective(inner, **{k: v for k, v in settings.items() if k not in names})


UNION = {"support": "union", "support_k": 4}
FUTURE = {"reward_to_go": "discounted", "discount": 0.8}
SABOTAGE: dict[str, tuple[Any, str, Any, Objective]] = {
    "reverse KL's sign": (*row("reverse_kl", flipped), of()),
    "forward KL's sign": (*row("forward_kl", flipped), of(beta=0.0)),
    "JSD's sign": (*row("generalised_jsd", flipped), of(beta=0.5)),
    "reverse KL of the other side": (*row("reverse_kl", swapped), of()),
    "forward KL of the other side": (*row("forward_kl", swapped), of(beta=0.0)),
    "JSD of the other side": (*row("generalised_jsd", swapped), of(beta=0.3)),
    "forward KL in a gate": (divergence, "forward_kl", flipped(pointwise.forward_kl), of(entropy_gate=2.0)),
    "JSD's mixture the other way round": (pointwise, "_log_mixture", lambda gap, b: (gap * 0, gap * 0), of(beta=0.3)),
    "weights dropped": (rule.TrainingRule, "_corrected", lambda s, w, *a: w * 0 + 1, of()),
    "advantages dropped": (rule.TrainingRule, "_with_policy_gradient", lambda self, grad, tokens: grad, of(**FUTURE)),
    "the bucket's gradient": (divergence, "scatter_to_vocab", without_tail_gradient, of(**UNION)),
    "the bucket's gradient, forward": (divergence, "scatter_to_vocab", without_tail_gradient, of(beta=0.0, **UNION)),
    "ids counted twice": (divergence, "choose", all_used, of(**UNION, tail="renormalise")),
    "ids counted twice, bucket": (divergence, "choose", all_used, of(beta=0.3, **UNION)),
    "the wrong side's ids": (
        divergence,
        "choose",
        lambda n, k, s, t: real_choose(n, k, t, s),
        of(support="student_top_k", support_k=4),
    ),
    "a bucket too many": (
        divergence,
        "with_tail",
        lambda p, rest, tail: torch.cat([p, rest], -1),
        of(**UNION, tail="renormalise"),
    ),
    "no gradient": (Head, "backward_transform", lambda self, grad, z: grad * 0, of()),
    "half the gradient": (rule.TrainingRule, "__call__", times(0.5), of()),
    "temperature left out of the chain": (rule.TrainingRule, "__call__", times(1.5), of(temperature=1.5)),
    "temperature twice in the chain": (rule.TrainingRule, "__call__", times(1 / 1.5), of(temperature=1.5)),
    "soft-cap left out of the chain": (Head, "backward_transform", lambda self, grad, z: grad * self.scale, of()),
    "scale left out of the chain": (
        Head,
        "backward_transform",
        lambda self, grad, z: real_transform(self, grad, z) / self.scale,
        of(),
    ),
    "a reward's sign": (objective_module, "discounted_reward_to_go", lambda *a: -real_return(*a), of(**FUTURE)),
    "rewards of earlier tokens": (objective_module, "discounted_reward_to_go", reversed_time, of(**FUTURE)),
    "the token's reward counted twice": (
        objective_module,
        "discounted_reward_to_go",
        lambda r, row, d: r + real_return(r, row, d),
        of(**FUTURE),
    ),
    "rewards across rollouts": (
        objective_module,
        "discounted_reward_to_go",
        lambda r, row, d: real_return(r, row * 0, d),
        of(**FUTURE),
    ),
    "no discount": (
        objective_module,
        "discounted_reward_to_go",
        lambda r, row, d: real_return(r, row, 1.0),
        of(**FUTURE),
    ),
    "mean over all": (
        objective_module,
        "mean_reward_to_go",
        lambda r, row: r * 0 + r.mean(),
        of(reward_to_go="mean"),
    ),
    "ratios not truncated": (
        rule,
        "importance_weight",
        lambda s, q, c: real_importance(s, q, 1e9),
        of(importance_clip=1.2),
    ),
    "ratios upside down": (
        rule,
        "importance_weight",
        lambda s, q, c: real_importance(q, s, c),
        of(importance_clip=1.2),
    ),
    "no ratios": (rule.TrainingRule, "_corrected", lambda self, w, *a: w, of(importance_clip=1.2)),
    "reference KL the other way round": (rule, "reverse_kl", swapped(pointwise.reverse_kl), of(ref_kl_coef=0.5)),
    "reference KL's sign": (rule, "reverse_kl", flipped(pointwise.reverse_kl), of(ref_kl_coef=0.5)),
    "no entry clip": (divergence, "clip_terms", lambda f, s, c: real_clip(f, s, 1e9), of(entry_clip=0.02)),
    "an entry clip with a gradient": (
        divergence,
        "clip_terms",
        lambda f, s, c: (real_clip(f, s, c)[0]._replace(grad_log_s=f.grad_log_s), real_clip(f, s, c)[1]),
        of(entry_clip=0.02),
    ),
    "another baseline": (Divergence, "_baseline", lambda self, *a: 0.3, of(support="sampled")),
    "a sampled ratio's sign": (divergence, "log_ratio", lambda s, t: t - s, of(support="sampled")),
    "all tokens kept": (
        objective_module,
        "keep_top_fraction",
        lambda s, *a: torch.ones_like(s),
        of(keep_fraction=0.5),
    ),
    "the worst kept": (
        objective_module,
        "keep_top_fraction",
        lambda s, row, f, real=objective_module.keep_top_fraction: real(-s, row, f),
        of(keep_fraction=0.5),
    ),
    "contrast without a mean": (objective_module, "contrastive", lambda r, w, row: (r - w).abs(), of()),
    "a mean over the batch": (
        objective_module,
        "contrastive",
        lambda r, w, row, real=objective_module.contrastive: real(r, w, row * 0),
        of(),
    ),
}


class TestSabotage:
    """The comparison that the tests above use notices code that is broken on purpose."""

    @pytest.fixture
    def case(self) -> Any:
        return problem(12, v=23, head="all of it", contrast_signal=True, dtype=torch.float32)

    @pytest.mark.parametrize(("place", "name", "broken", "objective"), SABOTAGE.values(), ids=SABOTAGE)
    def test_is_noticed(
        self, place: Any, name: str, broken: Any, objective: Objective, case: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        agrees(objective, case)
        (monkeypatch.setitem if isinstance(place, dict) else monkeypatch.setattr)(place, name, broken)
        with pytest.raises(AssertionError):
            agrees(objective, case)

    def test_a_loss_without_its_gradient_is_noticed(self, case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = reference(Objective(), case)
        monkeypatch.setattr(Head, "hidden_grad_into", lambda self, grad, out: out.zero_())
        assert not torch.allclose(
            measured(Objective(), case).gradients["states"].double(), expected.gradients["states"]
        )
