"""Passes of a teacher: what sequences begin with alike is computed once, and the states are those of one pass."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from conftest import make_llama
from helpers import MAKE_TEACHER, make_rollouts, make_trainer, prepared
from hypothesis import given
from hypothesis import strategies as st
from test_families import FAMILIES, make_model

from opsd import SameCheckpointTeacher
from opsd.models import passes
from opsd.models.forward import counting_passes, last_hidden
from opsd.models.passes import PASS, Family, can_share_prefixes, hidden_in_passes, plan_passes
from opsd.rollouts import Rollouts

UNSHARED = {"lfm2"}  # convolutions keep states of their own

ids = st.lists(st.integers(1, 3), min_size=1, max_size=6)
sequences = st.lists(st.tuples(ids, ids), min_size=1, max_size=9)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another pass is worth one token."""
    monkeypatch.setattr(passes, "PASS", 1)
    passes._ends.cache_clear()


@given(sequences, st.booleans(), st.sampled_from([1, 8]))
def test_a_plan_computes_every_row_once_and_never_more_than_one_pass_would(
    rows: list[tuple[list[int], list[int]]], shares: bool, least: int
) -> None:
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(passes, "PASS", least)
        passes._ends.cache_clear()
        whole = [prompt + rest for prompt, rest in rows] + [[]]
        first = [len(prompt) - 1 for prompt, _ in rows] + [0]
        plan = plan_passes(whole, first, shares=shares)
        assert sorted(row for family in plan for each in family.passes for row in each) == list(range(len(rows)))
        for family in plan:
            members = [row for each in family.passes for row in each]
            assert len({tuple(whole[row][: family.prefix]) for row in members}) == 1
            assert family.prefix <= min(first[row] for row in members) and (shares or not family.prefix)
        lengths = [len(each) for each in whole]
        one = Family(0, (tuple(range(len(rows))),)).cost(lengths)
        assert sum(family.cost(lengths) for family in plan) <= one


def test_rollouts_of_one_row_compute_its_prompt_once() -> None:
    """Eight rollouts of 200 tokens, and a trace of 1,500: less than a third of the tokens."""
    prompt = list(range(1500))
    (family,) = plan_passes([prompt + [7, number] * 100 for number in range(8)], [1499] * 8)
    assert family == Family(1499, (tuple(range(8)),))
    assert family.cost([1700] * 8) - 2 * PASS < 8 * 1700 / 4


def test_rows_with_the_same_examples_and_groups_in_them() -> None:
    examples = list(range(600))
    rows = [[*examples, 600 + number, *range(9)] for number in range(8)]
    assert plan_passes(rows, [600] * 8) == [Family(600, (tuple(range(8)),))]
    assert plan_passes(rows, [600] * 8, shares=False) == [Family(0, (tuple(range(8)),))]
    groups = [[*range(start, start + 1200), 5] for start in (0, 0, 0, 7, 7, 7)]
    assert plan_passes(groups, [1200] * 6) == [Family(1200, ((0, 1, 2),)), Family(1200, ((3, 4, 5),))]


def test_rows_of_like_length_share_a_pass() -> None:
    lengths = [10, 1000, 12, 990]
    (family,) = plan_passes([list(range(number, number + length)) for number, length in enumerate(lengths)], [9] * 4)
    assert sorted(family.passes) == [(0, 2), (1, 3)] and family.prefix == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_prefix_gives_the_states_of_one_pass(family: str) -> None:
    """Longer than a sliding window of 64, and in an order that is not that of the passes."""
    model, shared = make_model(family).eval(), 90
    assert can_share_prefixes(model, 400) is (family not in UNSHARED)
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


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("teacher", [name for name in MAKE_TEACHER if name not in ("served", "past_checkpoint")])
@pytest.mark.parametrize("student", ["full", "arriving adapter"])
def test_every_teacher_gives_the_states_of_one_pass(teacher: str, student: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, MAKE_TEACHER[teacher](), student)

    def states() -> tuple[list[torch.Tensor], list[int]]:
        with counting_passes() as made, torch.no_grad():
            signal = trainer.teacher.score(trainer.teacher.prompts.render(examined()))
        return [signal.logprobs(torch.tensor(examined().scored_ids))], made

    (shared,), made = states()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opsd.teachers.local.plan_passes", lambda *args, **kwargs: [])
        (one,), whole = states()
    assert 1 in made and len(made) > len(whole), "a prefix was computed for one row"
    assert (shared - one).abs().max() < 1e-5


def test_a_teacher_with_the_students_own_prompts_makes_the_students_pass() -> None:
    """Equal weights then give equal numbers, to the bit; and no other teacher's rows are computed for nothing."""
    model = make_llama(0)
    teacher = prepared(SameCheckpointTeacher(), model)
    rollouts = teacher.prompts.render(examined())
    batch = rollouts.pad("cpu")
    with torch.no_grad():
        own_ND = last_hidden(model.eval(), batch.ids_BL, batch.row_N, batch.position_N)
        assert torch.equal(teacher.score(rollouts).hidden_ND, own_ND)
    shown = prepared(SameCheckpointTeacher(context="answer_only"), make_llama(0))
    with counting_passes() as made:
        shown.score(shown.prompts.render(examined()))
    assert made == [6], "rows without a scored token are in no pass"
