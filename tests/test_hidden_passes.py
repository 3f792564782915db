"""Passes of a teacher: what sequences begin with alike is computed once, and the states are those of one pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import make_llama
from helpers import MAKE_TEACHER, make_rollouts, make_trainer
from hypothesis import given
from hypothesis import strategies as st
from test_families import FAMILIES, SMALL, make_model
from transformers import AutoConfig, AutoModelForCausalLM

from opsd import SameCheckpointTeacher
from opsd.models import passes
from opsd.models.forward import counting_passes, last_hidden
from opsd.models.passes import Family, can_share_prefixes, hidden_in_passes, may_divide, plan_passes, tokens_of
from opsd.rollouts import Rollouts

UNSHARED = {"lfm2"}  # convolutions keep states of their own

ids = st.lists(st.integers(1, 3), min_size=1, max_size=6)
sequences = st.lists(st.tuples(ids, ids | st.just([])), min_size=1, max_size=9)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another pass is worth one token."""
    monkeypatch.setattr(passes, "PASS", 1)


@given(sequences, st.booleans(), st.sampled_from([1, 8]))
def test_a_plan_computes_every_row_once_and_never_more_than_one_pass_would(
    rows: list[tuple[list[int], list[int]]], shares: bool, a_pass: int
) -> None:
    prompts, completions = zip(*rows, strict=True)
    plan = plan_passes(prompts, completions, shares=shares, a_pass=a_pass)
    scored = [row for row, completion in enumerate(completions) if completion]
    assert sorted(row for family in plan for each in family.passes for row in each) == scored
    for family in plan:
        members = [row for each in family.passes for row in each]
        assert len({tuple(prompts[row][: family.prefix]) for row in members}) == 1
        assert family.prefix < min(len(prompts[row]) for row in members) and (shares or not family.prefix)
    lengths = [len(prompt) + len(completion) - 1 for prompt, completion in rows]
    one = Family(0, (tuple(scored),)).cost(lengths, a_pass) if scored else 0
    assert sum(family.cost(lengths, a_pass) for family in plan) <= one


def test_rollouts_of_one_row_compute_its_prompt_once() -> None:
    """Eight rollouts of 200 tokens, and a trace of 1,500: less than a quarter of the tokens."""
    prompts, completions = [list(range(1500))] * 8, [[7, number] * 100 for number in range(8)]
    (family,) = plan_passes(prompts, completions)
    assert family == Family(1499, (tuple(range(8)),))
    assert tokens_of(prompts, completions) < 8 * 1700 / 4


def test_rows_with_the_same_examples_and_groups_in_them() -> None:
    examples, completion = list(range(600)), list(range(9))
    prompts = [[*examples, 600 + number] for number in range(8)]
    assert plan_passes(prompts, [completion] * 8) == [Family(600, (tuple(range(8)),))]
    assert plan_passes(prompts, [completion] * 8, shares=False) == [Family(0, (tuple(range(8)),))]
    groups = [list(range(start, start + 1200)) for start in (0, 0, 0, 7, 7, 7)]
    assert plan_passes(groups, [[5]] * 6) == [Family(1199, ((0, 1, 2),)), Family(1199, ((3, 4, 5),))]


def test_rows_of_like_length_share_a_pass() -> None:
    prompts = [[number] * length for number, length in enumerate([10, 1000, 12, 990])]
    (family,) = plan_passes(prompts, [[5, 6]] * 4)
    assert sorted(family.passes) == [(0, 2), (1, 3)] and family.prefix == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_prefix_gives_the_states_of_one_pass(family: str) -> None:
    """Longer than a sliding window of 64, and in an order that is not that of the passes."""
    model, shared = make_model(family).eval(), 90
    assert can_share_prefixes(model) is (family not in UNSHARED)
    ids_BL = torch.randint(3, 400, (5, 120), generator=torch.Generator().manual_seed(0))
    ids_BL[:4, :shared] = ids_BL[:1, :shared]
    row_N, position_N = torch.tensor([0, 0, 1, 2, 2, 3, 4, 4]), torch.tensor([90, 119, 95, 91, 100, 119, 3, 80])
    families = [Family(0, ((4,),)), Family(shared, ((3, 1), (2, 0)))]
    with torch.no_grad():
        expected_ND = last_hidden(model, ids_BL, row_N, position_N)
        if family not in UNSHARED:
            hidden_ND = hidden_in_passes(model, ids_BL, row_N, position_N, families)
            assert (hidden_ND - expected_ND).abs().max() <= 2e-5 * expected_ND.abs().max()
        unshared_ND = hidden_in_passes(model, ids_BL, row_N, position_N, [Family(0, ((4, 2), (0, 1, 3)))])
    assert (unshared_ND - expected_ND).abs().max() <= 2e-5 * expected_ND.abs().max()


def examined(count: int = 8) -> Rollouts:
    """Rollouts of which some have no scored token."""
    return make_rollouts(count).mask_rows([number in (1, 5) for number in range(count)])


@contextmanager
def one_pass() -> Iterator[None]:
    """Plan one pass over all rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            passes, "plan_passes", lambda prompts, *args, **kwargs: [Family(0, (tuple(range(len(prompts))),))]
        )
        yield


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("teacher", [name for name in MAKE_TEACHER if name != "served"])
@pytest.mark.parametrize("student", ["full", "arriving adapter"])
def test_loss_and_gradients_are_those_of_one_pass(teacher: str, student: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, MAKE_TEACHER[teacher](), student, ref_kl_coef=0.1)
    rollouts = trainer.scorer.prepare_rollouts(examined())

    def step() -> tuple[float, torch.Tensor, list[int]]:
        trainer.model.train()
        trainer.model.zero_grad()
        with counting_passes() as made:
            loss = trainer.compute_loss(trainer.model, trainer._scored(rollouts.with_num_loss_tokens(9)))
        loss.backward()
        gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
        return float(loss.detach()), torch.cat(gradients), made

    loss, gradients, made = step()
    with one_pass():
        expected_loss, expected, whole = step()
    assert 0 in made and len(made) >= 2 * len(whole), "a prefix was computed for one row, in each pass"
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert (gradients - expected).norm() <= 2e-5 * expected.norm()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.usefixtures("eager")
def test_a_teacher_with_the_students_own_prompts_makes_the_students_passes(checkpointing: bool, tmp_path: Path) -> None:
    """Equal weights then give equal numbers, to the bit; rows without a scored token are in no pass."""
    trainer = make_trainer(tmp_path, SameCheckpointTeacher(), gradient_checkpointing=checkpointing)
    if checkpointing:
        trainer.model.gradient_checkpointing_enable()
    rollouts = trainer.scorer.prepare_rollouts(examined())
    trainer.model.train()
    with counting_passes() as made:
        signal = trainer.teacher.score(rollouts)
        own_ND = trainer.scorer.hidden(trainer.model, rollouts, rollouts.pad("cpu"))
    assert torch.equal(signal.hidden_ND, own_ND) and own_ND.requires_grad
    assert made[: len(made) // 2] == made[len(made) // 2 :]
    assert made == [8, 8] if checkpointing else (0 in made and sum(made) == 2 * 6)


def test_positions_whose_factors_depend_on_the_length_share_nothing() -> None:
    config = AutoConfig.for_model("phi3", **SMALL)
    factors = {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "original_max_position_embeddings": 64}
    config.rope_parameters = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    torch.manual_seed(0)
    assert not can_share_prefixes(AutoModelForCausalLM.from_config(config))


def test_rows_share_no_dropout() -> None:
    trains = make_llama(0)
    assert may_divide(trains)
    trains.append_dropout = torch.nn.Dropout(0.1)
    assert not may_divide(trains)


def test_a_prefix_is_shared_where_that_saves_a_fair_part() -> None:
    """Attention pays for it with a mask: 200 tokens in common are not worth it before completions of 8,000."""
    prompts = [[*range(200), 200 + row] for row in range(8)]
    assert plan_passes(prompts, [[5] * 8000] * 8) == [Family(0, (tuple(range(8)),))]
    assert plan_passes(prompts, [[5] * 200] * 8) == [Family(200, (tuple(range(8)),))]
