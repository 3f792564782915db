"""Rollouts: sorting, splitting and padding move no token and lose no row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsd.errors import DataError
from opsd.models.forward import check_lengths
from opsd.rollouts import Rollouts

PER_ROW = ("prompt_ids", "completion_ids", "loss_mask", "row_weights", "rollout_logprobs")
ids = st.lists(st.integers(1, 99), min_size=1, max_size=6)


@st.composite
def rollouts(draw: st.DrawFn, rows: int | None = None) -> Rollouts:
    n = draw(st.integers(1, 6)) if rows is None else rows
    completions = [draw(st.lists(st.integers(1, 99), max_size=6)) for _ in range(n)]
    mask = [[draw(st.integers(0, 1)) for _ in c] for c in completions]
    made = Rollouts([{"prompt": str(i)} for i in range(n)], [draw(ids) for _ in range(n)], completions, mask)
    made = replace(
        made, row_weights=[float(i) for i in range(n)], rollout_logprobs=[[-t for t in c] for c in completions]
    )
    return made.with_teacher_prompts("teacher", [draw(ids) for _ in range(n)])


@settings(max_examples=60, deadline=None)
@given(rollouts(), st.sampled_from([None, "teacher"]))
def test_padding_keeps_exactly_the_scored_tokens_in_order(made: Rollouts, seen_by: str | None) -> None:
    batch = made.pad("cpu", seen_by)
    prompts = made.prompt_ids if seen_by is None else made.teacher_prompt_ids[seen_by]
    expected = [
        t for c, m in zip(made.completion_ids, made.loss_mask, strict=True) for t, s in zip(c, m, strict=True) if s
    ]
    assert batch.scored_ids_N.tolist() == expected == made.scored_ids
    assert batch.ids_BL[batch.row_N, batch.position_N + 1].tolist() == expected
    rows = [b for b, mask in enumerate(made.loss_mask) for scored in mask if scored]
    assert batch.row_N.tolist() == rows
    for b, (prompt, completion) in enumerate(zip(prompts, made.trimmed_completions, strict=True)):
        n = len(prompt) + len(completion)
        assert batch.ids_BL[b, :n].tolist() == prompt + completion
    assert batch.ids_BL.shape[1] == max(len(p) + len(c) for p, c in zip(prompts, made.trimmed_completions, strict=True))


@settings(max_examples=60, deadline=None)
@given(rollouts())
def test_only_tokens_after_the_last_scored_one_are_not_needed(made: Rollouts) -> None:
    for ids, needed, mask in zip(made.completion_ids, made.trimmed_completions, made.loss_mask, strict=True):
        assert ids[: len(needed)] == needed and not any(mask[len(needed) :])
        assert not needed or mask[len(needed) - 1]


@settings(max_examples=40, deadline=None)
@given(rollouts(rows=6), st.sampled_from([1, 2, 3, 6]))
def test_sorting_and_splitting_keep_every_row_with_all_that_belongs_to_it(made: Rollouts, parts: int) -> None:
    pieces = list(made.with_num_loss_tokens(7).sorted_by_length().split(parts))
    assert [len(p) for p in pieces] == [6 // parts] * parts
    together = {
        row["prompt"]: belongings
        for piece in pieces
        for row, *belongings in zip(
            piece.rows, *map(piece.__getattribute__, PER_ROW), piece.teacher_prompt_ids["teacher"], strict=True
        )
    }
    for i in range(6):
        assert together[str(i)] == [
            *(getattr(made, name)[i] for name in PER_ROW),
            made.teacher_prompt_ids["teacher"][i],
        ]
    lengths = [
        len(p) + len(c) for piece in pieces for p, c in zip(piece.prompt_ids, piece.trimmed_completions, strict=True)
    ]
    assert lengths == sorted(lengths, reverse=True)
    assert all(piece.num_loss_tokens == 7 for piece in pieces)


def test_micro_batches_are_trimmed_to_their_own_longest_row() -> None:
    made = Rollouts([{}, {}], [[1], [1] * 9], [[2], [2] * 9])
    short = list(made.sorted_by_length().split(2))[1]
    assert short.pad("cpu").ids_BL.shape == (1, 2)


def test_the_row_of_a_packed_token_is_found() -> None:
    made = Rollouts([{}, {}, {}], [[1]] * 3, [[5, 6], [], [7, 8]], [[1, 0], [], [1, 1]])
    assert [made.row_of_token(n) for n in range(3)] == [0, 2, 2]
    with pytest.raises(IndexError):
        made.row_of_token(3)


def test_a_prompt_longer_than_the_models_context_is_refused_by_row() -> None:
    check_lengths(10, [[1] * 6], [4], "student")
    check_lengths(None, [[1] * 600], [4], "student")
    with pytest.raises(DataError, match=r"row 1: .* 7 tokens .* 4, together more than the 10 tokens"):
        check_lengths(10, [[1] * 6, [1] * 7], [4, 4], "teacher")


def test_an_empty_completion_scores_nothing() -> None:
    batch = Rollouts([{}], [[1, 2]], [[]]).pad("cpu")
    assert batch.scored_ids_N.numel() == 0 == batch.position_N.numel()
    assert batch.ids_BL.equal(torch.tensor([[1, 2]]))
