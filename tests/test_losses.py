"""Every divergence, support, tail, clip, signal, head and objective: value and gradient against the float64 twin."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from losses_cases import (
    BETAS,
    DIVERGENCE_CASES,
    HEADS,
    MASKED,
    SIGNALS,
    SIZES,
    answers,
    name_of,
    objectives,
    of_logits,
    problem,
)
from losses_twin import Problem, agrees, is_close, math_value, measured, reference

from opsd.losses import Divergence, Objective, Tokens
from opsd.models.head import Head
from opsd.signals import HiddenSignal

OBJECTIVES = objectives()
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCE_CASES, ids=name_of)


@every_divergence
@pytest.mark.parametrize("n", SIZES)
def test_value_and_gradient_equal_the_definition(n: int, divergence: Divergence) -> None:
    agrees(Objective(divergence), problem(n, v=19 + n % 7, seed=n, dtype=torch.float32, left_out=n > 1))


@every_divergence
@pytest.mark.parametrize("signal", SIGNALS)
def test_every_signal_that_a_divergence_takes(signal: str, divergence: Divergence) -> None:
    case = problem(signal=signal, left_out=True)
    if answers(divergence, case.signal):
        agrees(Objective(divergence), case)


@every_divergence
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("v", "teacher_v"), [(29, 23), (23, 29)], ids=["student padded", "teacher padded"])
def test_every_head_and_heads_padded_differently(v: int, teacher_v: int, head: str, divergence: Divergence) -> None:
    agrees(Objective(divergence), problem(5, v=v, teacher_v=teacher_v, head=head))


@pytest.mark.parametrize("objective", [o for _, o in OBJECTIVES], ids=[name for name, _ in OBJECTIVES])
def test_every_objective_of_every_divergence(objective: Objective) -> None:
    agrees(objective, problem(12, v=17, left_out=True, dtype=torch.float32))


@every_divergence
@pytest.mark.parametrize("masked", MASKED.values(), ids=MASKED)
def test_ids_that_a_head_masks_out_add_no_nan(masked: tuple[str, ...], divergence: Divergence) -> None:
    agrees(Objective(divergence, ref_kl_coef=0.3), problem(6, masked=masked))


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("masked", MASKED.values(), ids=MASKED)
@pytest.mark.parametrize("beta", BETAS)
def test_ids_that_a_head_masks_out_in_a_mixture(beta: float, masked: tuple[str, ...], signal: str) -> None:
    # Where the second context alone masks an id, p^1.5 / p'^0.5 has no value; masked in both, it is left out.
    case = problem(6, masked=masked, signal=signal)
    if signal == "geometric, pushed away" and "teacher" in masked:
        one, two = case.signal.signals
        same = replace(two, head=replace(two.head, bias_V=one.head.bias_V))
        case = replace(case, signal=replace(case.signal, signals=[one, same]))
    divergence = Divergence(beta)
    if answers(divergence, case.signal):
        agrees(Objective(divergence), case)


@every_divergence
def test_a_teacher_that_shares_the_students_head_gives_it_no_gradient(divergence: Divergence) -> None:
    agrees(Objective(divergence), problem(tied=True, head="bias"))


def logits_of(case: Problem) -> tuple[list[list[float]], list[list[float]]]:
    student = case.head.logits(case.hidden_ND)
    return student.tolist(), case.signal.head.logits(case.signal.hidden_ND).tolist()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("masked", MASKED.values(), ids=MASKED)
def test_values_equal_a_twin_without_tensors(masked: tuple[str, ...], beta: float) -> None:
    case = problem(9, masked=masked)
    result = measured(Objective(Divergence(beta)), case).values["divergence"]
    expected = [math_value(s, t, beta) for s, t in zip(*logits_of(case), strict=True)]
    assert is_close(result, torch.tensor(expected, dtype=torch.float64), 1e-6)


# ---- extremes -------------------------------------------------------------------------------------------------------

BIG = 1e4
EXTREME = {
    "far apart": ([[BIG, -BIG, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]], [[BIG, 0.0, -BIG, 2.0], [0.0, BIG, -BIG, 3.0]]),
    "one token owns all, the same": ([[BIG, 0.0, 0.0, 0.0]], [[BIG, 0.0, 0.0, 0.0]]),
    "one token owns all, another": ([[BIG, 0.0, 0.0, 0.0]], [[0.0, BIG, 0.0, 0.0]]),
    "all logits large": ([[BIG, BIG + 1, BIG + 2, BIG]], [[-BIG, -BIG - 1, -BIG, -BIG]]),
    "beyond the floor": ([[0.0, 1.0, -90.0, -300.0]], [[1.0, 0.0, -300.0, -90.0]]),
    "far beyond the floor": ([[0.0, -150.0, -800.0, 1.0]], [[-150.0, 0.0, 1.0, -800.0]]),
}
every_extreme = pytest.mark.parametrize("logits", EXTREME.values(), ids=EXTREME)


@every_extreme
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_extreme_logits_equal_the_definition(temperature: float, beta: float, logits: tuple) -> None:
    agrees(Objective(Divergence(beta, temperature)), of_logits(*logits))


@every_extreme
@every_divergence
def test_extreme_logits_give_finite_numbers_in_float32(divergence: Divergence, logits: tuple) -> None:
    case = of_logits(*logits)
    eye = Head(torch.eye(4))
    case = replace(case, hidden_ND=case.hidden_ND.float(), head=eye)
    case = replace(case, signal=HiddenSignal(case.signal.hidden_ND.float(), eye))
    result = measured(Objective(divergence), case)
    for numbers in (*(result.values[x] for x in ("loss", "divergence", "entropy")), *result.gradients.values()):
        assert numbers.isfinite().all()


# ---- worked by hand -------------------------------------------------------------------------------------------------

LN = math.log
HALF, QUARTER = [0.0, 0.0], [LN(3.0), 0.0]  # student (1/2, 1/2), teacher (3/4, 1/4)
BY_HAND = {
    "reverse": ({}, 0.5 * LN(4 / 3), 0.25 * LN(1 / 3)),
    "forward": ({"beta": 0.0}, 0.75 * LN(1.5) + 0.25 * LN(0.5), -0.25),
    # m = (5/8, 3/8); ∂/∂s = ½·log(s/m), so ∂/∂z = s·(that - its mean) = ⅛·log((4/5)/(4/3)).
    "jsd": (
        {"beta": 0.5},
        0.5 * (0.75 * LN(6 / 5) + 0.25 * LN(2 / 3)) + 0.5 * (0.5 * LN(4 / 5) + 0.5 * LN(4 / 3)),
        0.125 * LN(3 / 5),
    ),
    # Entries 0.3041 and -0.1733: the first is capped, and keeps no gradient; -t₂·log s₂ has ∂/∂z₁ = t₂·s₁ = ⅛.
    "forward, clipped": ({"beta": 0.0, "entry_clip": 0.05}, 0.05 + 0.25 * LN(0.5), 0.125),
    "reverse, token clipped": ({"token_clip": 0.1}, 0.1, 0.0),
    # y = 0: log(½ / ¾), less the KL, times (1 - ½).
    "sampled": ({"support": "sampled"}, LN(2 / 3), 0.5 * (LN(2 / 3) - 0.5 * LN(4 / 3))),
    "sampled, no baseline": ({"support": "sampled", "baseline": "none"}, LN(2 / 3), 0.5 * LN(2 / 3)),
    # H(t) = 0.562
    "gated in": ({"entropy_gate": 0.5}, 0.5 * LN(4 / 3) + 0.75 * LN(1.5) + 0.25 * LN(0.5), 0.25 * LN(1 / 3) - 0.25),
    "gated out": ({"entropy_gate": 0.6}, 0.5 * LN(4 / 3), 0.25 * LN(1 / 3)),
    "top 1, none": ({"beta": 0.0, "support": "teacher_top_k", "support_k": 1, "tail": "none"}, 0.75 * LN(1.5), -0.375),
    "top 1, bucket": ({"support": "teacher_top_k", "support_k": 1}, 0.5 * LN(4 / 3), 0.25 * LN(1 / 3)),
    "top 1, renormalised": ({"support": "teacher_top_k", "support_k": 1, "tail": "renormalise"}, 0.0, 0.0),
}


@pytest.mark.parametrize(("settings", "value", "slope"), BY_HAND.values(), ids=BY_HAND)
def test_a_case_worked_by_hand(settings: dict, value: float, slope: float) -> None:
    case = of_logits([HALF], [QUARTER])
    result = measured(Objective(Divergence(**settings)), case)
    assert result.values["loss"].item() == pytest.approx(value, abs=1e-12)
    assert result.gradients["states"][0].tolist() == pytest.approx([slope, -slope], abs=1e-12)


def test_the_twin_itself_gives_the_case_worked_by_hand() -> None:
    for settings, value, slope in BY_HAND.values():
        result = reference(Objective(Divergence(**settings)), of_logits([HALF], [QUARTER]))
        assert result.values["loss"].item() == pytest.approx(value, abs=1e-12)
        assert result.gradients["states"][0].tolist() == pytest.approx([slope, -slope], abs=1e-12)


# ---- tokens without weight ------------------------------------------------------------------------------------------


def poisoned(case: Problem) -> Problem:
    """NaN wherever a token of weight 0 could leak from."""

    def nan_where(x: torch.Tensor, places: slice) -> torch.Tensor:
        x = x.clone()
        x[places] = torch.nan
        return x

    out, tokens = slice(1, None, 4), case.tokens
    parts = {
        name: replace(signal, hidden_ND=nan_where(signal.hidden_ND, out))
        for name in ("signal", "reference", "contrast_signal")
        if isinstance(signal := getattr(case, name), HiddenSignal)
    }
    return replace(
        case,
        hidden_ND=nan_where(case.hidden_ND, out),
        tokens=replace(tokens, rollout_logprobs_N=nan_where(tokens.rollout_logprobs_N, out)),
        **parts,
    )


@pytest.mark.parametrize("contrast_signal", [False, True], ids=["", "contrastive"])
@pytest.mark.parametrize(
    "objective",
    [o for _, o in OBJECTIVES[:: len(DIVERGENCE_CASES) // 9]],
    ids=[x for x, _ in OBJECTIVES[:: len(DIVERGENCE_CASES) // 9]],
)
def test_nan_in_a_token_of_weight_zero_changes_nothing(objective: Objective, contrast_signal: bool) -> None:
    clean = problem(11, left_out=True, contrast_signal=contrast_signal)
    a, b = measured(objective, clean), measured(objective, poisoned(clean))
    assert all(torch.equal(a.values[name], b.values[name]) for name in a.values)
    assert all(torch.equal(a.gradients[name], b.gradients[name]) for name in a.gradients)


EMPTY = {"no tokens": 0, "no token of weight": 4}


@pytest.mark.parametrize("n", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("objective", [o for _, o in OBJECTIVES[::7]], ids=[x for x, _ in OBJECTIVES[::7]])
def test_nothing_to_train_on_is_a_loss_of_zero_that_reaches_every_input(
    objective: Objective, recompute: bool, n: int
) -> None:
    case = problem(n, contrast_signal=True, head="bias")
    case = replace(case, tokens=replace(case.tokens, weight_N=torch.zeros(n)))
    result = measured(replace(objective, recompute_loss=recompute), case)
    assert result.values["loss"].item() == 0.0
    assert set(result.gradients) == {"states", "weight", "bias"}
    assert all(g is not None and g.abs().sum().item() == 0.0 for g in result.gradients.values())
    assert all(column.shape == (n,) for name, column in result.values.items() if name != "loss")


# ---- what carries a gradient ----------------------------------------------------------------------------------------

SMOOTH = [d for d in DIVERGENCE_CASES if d.support != "sampled" and d.entry_clip is None and d.token_clip is None]


@pytest.mark.parametrize("divergence", SMOOTH, ids=name_of)
def test_the_gradient_is_that_of_the_value(divergence: Divergence) -> None:
    """Finite differences: the only comparison here that uses no formula of a gradient."""
    case = problem(3, v=9, d=3, head="all of it")
    objective = Objective(divergence, ref_kl_coef=0.3, recompute_loss=True)  # gradcheck goes backward more than once

    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        head = replace(case.head, weight_VD=weight, bias_V=bias)
        return objective(hidden, head, case.signal, case.tokens, reference=case.reference).loss

    inputs = [x.clone().requires_grad_() for x in (case.hidden_ND, case.head.weight_VD, case.head.bias_V)]
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


@pytest.mark.parametrize(("states", "weight"), list(product([True, False], repeat=2))[:3])
@pytest.mark.parametrize("recompute", [False, True])
def test_only_what_is_trained_gets_a_gradient(recompute: bool, states: bool, weight: bool) -> None:
    case, objective = problem(9, head="bias"), Objective(recompute_loss=recompute)
    expected = reference(objective, case)
    hidden = case.hidden_ND.clone().requires_grad_(states)
    head = replace(case.head, weight_VD=case.head.weight_VD.clone().requires_grad_(weight))
    objective(hidden, head, case.signal, case.tokens).loss.backward()
    for leaf, name, is_trained in ((hidden, "states", states), (head.weight_VD, "weight", weight)):
        assert (leaf.grad is not None) == is_trained
        assert not is_trained or is_close(leaf.grad, expected.gradients[name], 1e-9)
    assert head.bias_V.grad is None


@pytest.mark.parametrize("recompute", [False, True])
def test_a_loss_that_is_scaled_before_it_goes_back_scales_its_gradients(recompute: bool) -> None:
    case, objective = problem(9, head="bias"), Objective(recompute_loss=recompute)
    one, three = measured(objective, case), measured(objective, case, factor=3.0)
    assert all(is_close(three.gradients[name], 3.0 * g, 1e-12) for name, g in one.gradients.items())


def test_a_second_backward_pass_is_refused() -> None:
    case = problem(3)
    loss = Objective()(case.hidden_ND.requires_grad_(), case.head, case.signal, case.tokens).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"backward was called twice.*Compute the loss again"):
        loss.backward()


def test_a_second_backward_pass_of_a_recomputed_loss_gives_the_same_again() -> None:
    case = problem(3)
    hidden = case.hidden_ND.requires_grad_()
    loss = Objective(recompute_loss=True)(hidden, case.head, case.signal, case.tokens).loss
    once, again = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, again)


@every_divergence
def test_without_gradients_the_values_are_the_same(divergence: Divergence) -> None:
    case, objective = problem(9), Objective(divergence)
    with torch.no_grad():
        record = objective(case.hidden_ND, case.head, case.signal, case.tokens)
    assert torch.equal(record.loss, measured(objective, case).values["loss"]) and not record.loss.requires_grad


def test_tokens_are_selected_together() -> None:
    tokens = problem(4).tokens.select(torch.tensor([2, 0]))
    assert isinstance(tokens, Tokens) and tokens.row_N.tolist() == [0, 0] and tokens.advantage_N is None
