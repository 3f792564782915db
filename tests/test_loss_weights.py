"""Which tokens count and how much: the pure functions against loops, and the objective that applies them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses_cases import DIVERGENCE_CASES, name_of, of_logits, problem, random
from losses_twin import agrees, measured

from opsd.losses import Divergence, Objective, token_weights
from opsd.losses.estimators import (
    ESTIMATORS,
    discounted_reward_to_go,
    importance_weight,
    k1,
    k2,
    k3,
    mean_reward_to_go,
)
from opsd.losses.pointwise import log_ratio

quick = settings(max_examples=25, deadline=None, derandomize=True)
rows_of = st.lists(st.integers(1, 7), min_size=1, max_size=5)


def packed(lengths: list[int]) -> torch.Tensor:
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))


# ---- the tokens of a rollout ----------------------------------------------------------------------------------------


@quick
@given(lengths=rows_of, fraction=st.floats(0.01, 1.0), seed=st.integers(0, 999))
def test_the_highest_scores_of_each_rollout_share_its_weight(lengths: list[int], fraction: float, seed: int) -> None:
    row_N, score_N = packed(lengths), random(sum(lengths), seed=seed)
    result = token_weights.keep_top_fraction(score_N, row_N, fraction)
    for row, length in enumerate(lengths):
        weights, score = result[row_N == row], score_N[row_N == row]
        kept = weights > 0
        assert kept.sum().item() == math.ceil(round(fraction * length, 6))
        assert weights.sum().item() == pytest.approx(length)
        assert kept.all() or score[kept].min() >= score[~kept].max()


def test_the_earlier_of_two_equal_scores_is_kept() -> None:
    assert token_weights.keep_top_fraction(torch.tensor([1.0, 2.0, 2.0, 2.0]), packed([4]), 0.5).tolist() == [
        0,
        2,
        2,
        0,
    ]


@pytest.mark.parametrize(("fraction", "count"), [(0.2, 5), (0.1, 30), (0.7, 10), (0.3, 10), (0.6, 5), (0.07, 100)])
def test_a_fraction_that_is_whole_in_tokens_keeps_no_token_more(fraction: float, count: int) -> None:
    kept = token_weights.keep_top_fraction(random(count, seed=1), packed([count]), fraction).count_nonzero().item()
    assert kept == round(fraction * count)


@quick
@given(lengths=rows_of, seed=st.integers(0, 999))
def test_contrast_weighs_by_the_gap_over_its_mean_in_the_rollout(lengths: list[int], seed: int) -> None:
    row_N = packed(lengths)
    right, contrast_signal = random(len(row_N), seed=seed), random(len(row_N), seed=seed + 1)
    result = token_weights.contrastive(right, contrast_signal, row_N)
    for row in range(len(lengths)):
        gap = (right - contrast_signal)[row_N == row].abs().tolist()
        assert result[row_N == row].tolist() == pytest.approx([x / (sum(gap) / len(gap)) for x in gap])


@quick
@given(lengths=rows_of, gamma=st.floats(0.0, 5.0), seed=st.integers(0, 999))
def test_earlier_tokens_weigh_more_by_the_drift_after_them(lengths: list[int], gamma: float, seed: int) -> None:
    row_N, ratio_N = packed(lengths), random(sum(lengths), seed=seed)
    result = token_weights.by_drift(ratio_N, row_N, gamma)
    for row, length in enumerate(lengths):
        weights, gaps = result[row_N == row].tolist(), ratio_N[row_N == row].abs().tolist()
        raw = [1 + gamma * (1 - sum(gaps[:n]) / sum(gaps)) for n in range(length)]
        assert weights == pytest.approx([x * length / sum(raw) for x in raw], rel=1e-5)
        assert weights == sorted(weights, reverse=True)


def test_drift_weights_worked_by_hand() -> None:
    """The paper's 1 + 0.5·(1, 3/4, 1/4), whose mean is 4/3; the second rollout has no drift."""
    result = token_weights.by_drift(torch.tensor([-1.0, 2.0, 1.0, 0.0, 0.0]), packed([3, 2]), 0.5)
    assert result.tolist() == pytest.approx([1.5 * 3 / 4, 1.375 * 3 / 4, 1.125 * 3 / 4, 1.0, 1.0])


def test_contrast_of_a_rollout_that_nothing_tells_apart_is_zero() -> None:
    same = torch.tensor([-1.0, -2.0])
    assert token_weights.contrastive(same, same, packed([2])).tolist() == [0.0, 0.0]
    assert token_weights.contrastive(same[:0], same[:0], packed([1])[:0]).tolist() == []


# ---- estimators -----------------------------------------------------------------------------------------------------


@quick
@given(lengths=rows_of, discount=st.floats(0.0, 1.0), seed=st.integers(0, 999))
def test_rewards_to_go_stay_within_the_rollout(lengths: list[int], discount: float, seed: int) -> None:
    row_N = packed(lengths)
    r = random(len(row_N), seed=seed)
    later = [[m for m in range(n + 1, len(r)) if row_N[m] == row_N[n]] for n in range(len(r))]
    discounted = [sum(discount ** (m - n) * r[m].item() for m in ms) for n, ms in enumerate(later)]
    assert discounted_reward_to_go(r, row_N, discount).tolist() == pytest.approx(discounted)
    means = [sum(r[m].item() for m in ms) / max(len(ms), 1) for ms in later]
    assert mean_reward_to_go(r, row_N).tolist() == pytest.approx(means, abs=1e-12)


def test_estimators_worked_by_hand() -> None:
    r = torch.tensor([0.0, math.log(2.0), -math.log(2.0)], dtype=torch.float64)
    assert k1(r).tolist() == r.tolist()
    assert k2(r).tolist() == pytest.approx([0.0, math.log(2.0) ** 2 / 2, math.log(2.0) ** 2 / 2])
    assert k3(r).tolist() == pytest.approx([0.0, math.log(2.0) - 0.5, 1 - math.log(2.0)])
    assert set(ESTIMATORS) == {"k1", "k2", "k3"}


def test_a_log_ratio_is_floored_on_both_sides() -> None:
    result = log_ratio(torch.tensor([-1.0, -math.inf, -math.inf]), torch.tensor([-math.inf, -2.0, -math.inf]))
    assert result.tolist() == [99.0, -98.0, 0.0]


def test_an_importance_ratio_is_truncated_above_only_and_1_where_unknown() -> None:
    student = torch.tensor([-1.0, -1.0, -1.0, -3.0, -1.0])
    sampler = torch.tensor([-1.0, -9.0, math.nan, -1.0, -math.inf])
    ratio, truncated = importance_weight(student, sampler, 2.0)
    assert ratio.tolist() == pytest.approx([1.0, 2.0, 1.0, math.exp(-2.0), 2.0])
    assert truncated.tolist() == [0, 1, 0, 0, 1]


# ---- the objective that applies them --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"keep_fraction": 0.5}, {"prefix_weight": 0.5}, {"importance_clip": 1.2, "ref_kl_coef": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("divergence", DIVERGENCE_CASES[::3], ids=name_of)
def test_contrast_multiplies_every_other_weight(divergence: Divergence, settings: dict) -> None:
    agrees(
        Objective(divergence, **settings), problem(12, v=17, left_out=True, contrast_signal=True, dtype=torch.float32)
    )


@pytest.mark.parametrize("sizes", [(23, 29), (29, 23)], ids=["teacher padded", "student padded"])
def test_reference_and_contrast_over_heads_padded_differently(sizes: tuple[int, int]) -> None:
    case = problem(9, v=sizes[0], teacher_v=sizes[1], contrast_signal=True, dtype=torch.float32)
    agrees(Objective(ref_kl_coef=0.5), case)


def test_a_weight_by_drift_moves_the_gradient_and_not_the_logged_divergence() -> None:
    case = problem(10)
    plain, weighed = (measured(Objective(prefix_weight=gamma), case) for gamma in (0.0, 2.0))
    assert torch.equal(plain.values["divergence"], weighed.values["divergence"])
    assert not torch.allclose(plain.gradients["states"], weighed.gradients["states"])


def test_contrast_of_equal_contexts_trains_on_nothing() -> None:
    case = problem(6)
    result = measured(Objective(), replace(case, contrast_signal=case.signal))
    assert result.values["loss"].item() == 0.0 and result.gradients["weight"].abs().sum().item() == 0.0


@pytest.mark.parametrize("signal", ["arithmetic", "geometric, pushed away", "top-k lists"])
def test_rewards_to_go_of_every_signal(signal: str) -> None:
    divergence = Divergence(support="sampled")
    agrees(
        Objective(divergence, reward_to_go="discounted", discount=0.7), problem(11, signal=signal, dtype=torch.float32)
    )


@pytest.mark.parametrize(
    "settings", [{"keep_fraction": 0.4}, {"reward_to_go": "discounted"}, {"reward_to_go": "mean"}], ids=str
)
def test_tokens_of_other_rollouts_change_nothing(settings: dict) -> None:
    case = problem(15, dtype=torch.float64)
    alone = replace(
        case,
        hidden_ND=case.hidden_ND[5:10],
        signal=case.signal.select(slice(5, 10)),
        tokens=case.tokens.select(slice(5, 10)),
    )
    together, separate = measured(Objective(**settings), case), measured(Objective(**settings), alone)
    assert torch.allclose(together.gradients["states"][5:10], separate.gradients["states"], atol=1e-12)


def test_tokens_that_are_not_kept_have_no_gradient_and_are_logged() -> None:
    """A mean with zeros for those left out would show the two models closer than they are."""
    result, whole = (measured(Objective(keep_fraction=f), problem(10)) for f in (0.2, 1.0))
    kept = result.gradients["states"].abs().sum(-1) > 0
    assert kept.sum().item() == 2 and torch.equal(result.values["divergence"], whole.values["divergence"])


def test_a_reward_counts_for_the_tokens_before_and_has_no_gradient_itself() -> None:
    """Student and teacher differ at the second of two tokens: the gradient of the first is exactly r₂·(e_y - s)."""
    second = torch.tensor([0.0, math.log(3.0)])
    case = of_logits(torch.zeros(2, 2), torch.stack([torch.zeros(2), second]), row_N=torch.tensor([0, 0]))
    case = replace(case, tokens=replace(case.tokens, ids_N=torch.tensor([1, 0])))
    objective = Objective(Divergence(support="sampled", baseline="none"), reward_to_go="discounted", discount=0.5)
    result = measured(objective, case).gradients["states"]
    r_2 = math.log(0.5 / 0.25)
    assert result[0].tolist() == pytest.approx([-0.25 * r_2, 0.25 * r_2])
    assert result[1].tolist() == pytest.approx([0.5 * r_2, -0.5 * r_2])


def test_without_rollout_logprobs_there_is_no_correction() -> None:
    case = problem(6)
    case = replace(case, tokens=replace(case.tokens, rollout_logprobs_N=None))
    a, b = measured(Objective(importance_clip=2.0), case), measured(Objective(), case)
    assert torch.equal(a.values["loss"], b.values["loss"]) and "importance/ratio" not in a.values


def test_a_reference_kl_of_coefficient_zero_is_not_computed() -> None:
    assert "ref_kl" not in measured(Objective(), problem(4)).values


def test_a_reference_policy_that_is_the_student_adds_nothing() -> None:
    case = problem(4)
    case = replace(case, reference=replace(case.reference, hidden_ND=case.hidden_ND, head=case.head))
    with_kl, without = measured(Objective(ref_kl_coef=2.0), case), measured(Objective(), case)
    assert with_kl.values["loss"].item() == pytest.approx(without.values["loss"].item(), abs=1e-12)
    assert torch.equal(with_kl.gradients["states"], without.gradients["states"])
