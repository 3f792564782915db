"""Which tokens are trained on: masks and row weights, from ids and positions alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama, make_rows, make_tokenizer
from datasets import Dataset
from helpers import logged, make_args, make_trainer, prepared
from tokenizers import AddedToken

from opsd import SameCheckpointTeacher
from opsd.errors import ConfigError, DataError
from opsd.rollouts import Rollouts
from opsd.training.token_selection import (
    TokenSelection,
    TokenSelectionSettings,
    first_only,
    skip_first,
    without_ids,
    without_truncated,
)

END = 2
ROLLOUTS = Rollouts(
    [{"prompt": "a", "p": 0.5}, {"prompt": "b", "p": 1.0}, {"prompt": "c", "p": 0.25}],
    [[5], [5, 6], [5]],
    [[10, 11, 12, END], [10, 11, 12, 13, 14], [END]],
    [[1, 1, 0, 1], [1] * 5, [1]],
)
ALL = [[1, 1, 0, 1], [1] * 5, [1]]

# selection -> what is scored afterwards
CASES: dict[str, tuple[dict[str, Any], list[list[int]]]] = {
    "nothing left out": ({}, ALL),
    "the first tokens": ({"skip_first_tokens": 2}, [[0, 0, 0, 1], [0, 0, 1, 1, 1], [0]]),
    "all but the first": ({"first_tokens_only": 3}, [[1, 1, 0, 0], [1, 1, 1, 0, 0], [1]]),
    "a window": ({"skip_first_tokens": 1, "first_tokens_only": 2}, [[0, 1, 0, 0], [0, 1, 0, 0, 0], [0]]),
    "truncated completions": (
        {"mask_truncated_completions": True, "end_ids": frozenset([END])},
        [[1, 1, 0, 1], [0] * 5, [1]],
    ),
    "named ids": ({"left_out_ids": frozenset([11, END])}, [[1, 0, 0, 0], [1, 0, 1, 1, 1], [0]]),
    "rows that all pass": ({"pass_rate_column": "p"}, [[1, 1, 0, 1], [0] * 5, [1]]),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_left_out_is_not_scored(case: str) -> None:
    settings, expected = CASES[case]
    selected = TokenSelection(**settings).apply(ROLLOUTS)
    assert selected.loss_mask == expected
    assert selected.num_scorable == sum(map(sum, expected))
    assert selected.completion_ids == ROLLOUTS.completion_ids, "a completion's ids never change"


MASKS = {
    "skip none": (skip_first([1, 1, 0, 1], 0), [1, 1, 0, 1]),
    "skip more than there are": (skip_first([1, 1], 9), [0, 0]),
    "first of none": (first_only([], 3), []),
    "ended": (without_truncated([1, 0], [5, END], {END}), [1, 0]),
    "an end in the middle": (without_truncated([1, 1], [END, 5], {END}), [0, 0]),
    "nothing generated": (without_truncated([], [], {END}), []),
}


@pytest.mark.parametrize(("mask", "expected"), MASKS.values(), ids=MASKS)
def test_masks_at_the_ends_of_their_range(mask: list[int], expected: list[int]) -> None:
    assert mask == expected


def test_a_mask_and_ids_of_another_length_are_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        without_ids([1], [1, 2], set())


def test_rows_weigh_most_where_half_of_the_attempts_pass() -> None:
    assert TokenSelection(pass_rate_column="p").apply(ROLLOUTS).row_weights == [1.0, 0.0, 0.75]


@pytest.mark.parametrize("value", [1.5, -0.1, None, "often", float("nan")])
def test_a_pass_rate_that_is_none_is_an_error_that_names_the_column(value: Any) -> None:
    rows = [{**ROLLOUTS.rows[0], "p": value}, *ROLLOUTS.rows[1:]]
    with pytest.raises(DataError, match=r"'p'.*from 0 to 1"):
        TokenSelection(pass_rate_column="p").apply(replace(ROLLOUTS, rows=rows))


def test_pass_rates_are_checked_before_a_model_loads(tmp_path: Path) -> None:
    rows = Dataset.from_list([{**row, "p": 0.5 if i else 7.0} for i, row in enumerate(make_rows())])
    problems = {
        "p": r"column 'p', which holds no pass rate \(7\.0\) in 1 row .*: 0\.",
        "no such column": "needs the column 'no such column', and the train dataset has",
    }
    for column, problem in problems.items():
        with pytest.raises(DataError, match=problem):
            make_trainer(tmp_path, SameCheckpointTeacher(context="answer_only"), "no such model", rows,
                         pass_rate_column=column)  # fmt: skip


def test_passes_end_at_the_last_token_that_is_trained_on() -> None:
    """Later tokens do not change earlier states, so the batch can be shorter."""
    whole, short = ROLLOUTS.pad("cpu"), TokenSelection(first_tokens_only=2).apply(ROLLOUTS).pad("cpu")
    assert whole.ids_BL.shape[1] == 2 + 5 and short.ids_BL.shape[1] == 2 + 2
    assert short.scored_ids_N.tolist() == [10, 11, 10, 11, END]
    assert short.row_N.tolist() == [0, 0, 1, 1, 2]


def test_descriptions_differ_for_what_is_left_out() -> None:
    texts = {TokenSelection(**settings).describe() for settings, _ in CASES.values()}
    assert len(texts) == len(CASES) and "all" in texts


def test_tokens_are_named_as_the_vocabulary_writes_them_or_as_text() -> None:
    tokenizer = make_tokenizer()
    special = set(tokenizer.all_special_ids)
    named = next(token for token, i in tokenizer.get_vocab().items() if i not in special)
    args = make_args("unused", mask_tokens=[named], mask_special_tokens=True)
    selection = TokenSelection.from_config(args, tokenizer, [])
    assert selection.left_out_ids == special | {tokenizer.get_vocab()[named]}


def test_a_named_token_that_is_several_is_refused() -> None:
    args = make_args("unused", mask_tokens=["what is one and one, and why?"])
    with pytest.raises(ConfigError, match="single tokens"):
        TokenSelection.from_config(args, make_tokenizer(), [])


def test_a_run_counts_what_it_leaves_out_and_divides_by_what_is_left(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, SameCheckpointTeacher(context="answer_only"), skip_first_tokens=2)
    trainer.train()
    for scored, share in zip(logged(trainer, "scored_tokens"), logged(trainer, "tokens/left_out"), strict=True):
        sampled = scored / (1 - share)
        assert 0 < share < 1 and sampled == pytest.approx(round(sampled), abs=0.01)
    assert "without the first 2" in trainer.scorer.describe()


def test_a_run_whose_every_token_is_left_out_logs_it_and_changes_nothing(tmp_path: Path) -> None:
    settings = {"mask_truncated_completions": True}
    trainer = make_trainer(tmp_path, SameCheckpointTeacher(context="answer_only"), **settings)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert set(logged(trainer, "tokens/left_out")) == {1.0} and set(logged(trainer, "divergence")) == {0.0}
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_a_prefix_is_scored_as_it_is_within_the_whole() -> None:
    """Invariant 3, for the passes that end early."""
    model, tokenizer = make_llama(), make_tokenizer()
    teacher = prepared(SameCheckpointTeacher(), model)
    prompt = tokenizer("What is 1 + 1?")["input_ids"]
    whole = teacher.prompts.render(Rollouts(make_rows(1), [prompt], [[10, 11, 12, 13, 14]]))
    part = teacher.prompts.render(TokenSelection(first_tokens_only=2).apply(whole))
    a, b = (teacher.score(r).logprobs(r.pad("cpu").scored_ids_N) for r in (whole, part))
    assert torch.allclose(a[:2], b, atol=1e-5)


def test_a_marker_that_is_an_added_token_only_is_special() -> None:
    """Gemma's and Phi's ends of turns are not in `all_special_ids`, and stayed in the loss."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<end_of_turn>", special=True)])
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert end not in tokenizer.all_special_ids
    settings = TokenSelectionSettings(mask_special_tokens=True)
    assert end in TokenSelection.from_config(settings, tokenizer, [end]).left_out_ids
