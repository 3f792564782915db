"""One log entry of several batches, and of several processes: means over all rows or tokens, and extremes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows
from datasets import Dataset
from helpers import MAKE_TEACHER, make_trainer, returns

from opsd.training.averages import Averages, Tally


def entry(*batches: dict[str, Tally]) -> dict[str, float]:
    averages, metrics = Averages(), dict[str, list[float]]()
    for batch in batches:
        averages.add(batch)
    averages.write_into(metrics)
    assert not averages.tallies
    return {name: value for name, (value,) in metrics.items()}


def test_uneven_batches_count_by_their_size() -> None:
    batches = [{"reward": Tally.of([1.0, 0.0, 1.0])}, {"reward": Tally.of([0.0])}, {"reward": Tally.of([math.nan])}]
    assert entry(*batches) == {"reward": 0.5}


@pytest.mark.parametrize("kind", ["max", "min"])
def test_extremes_are_those_of_all_batches_that_have_any(kind: str) -> None:
    values = [[4.0, 6.0], [], [9.0]]
    assert entry(*({"x": Tally.of(each, kind)} for each in values)) == {"x": {"max": 9.0, "min": 4.0}[kind]}
    assert entry({"x": Tally.of([], kind)}) == {"x": 0.0}


def test_what_a_checkpoint_holds_goes_on() -> None:
    first, second = Averages(), Averages()
    first.add({"a": Tally.of([1.0, 1.0]), "b": Tally.of([3.0], "max")})
    second.load(first.state)
    for averages in (first, second):
        averages.add({"a": Tally.of([4.0]), "b": Tally.of([2.0], "max")})
    assert first.tallies == second.tallies == {"a": Tally(6.0, 3), "b": Tally(3.0, 2, "max")}


LENGTHS = [f"{kind}_{which}length" for kind in ("mean", "min", "max") for which in ("", "terminated_")]


ENDS = [2, *range(100, 130)]  # so that about half of the completions end


def expected_lengths(completions: list[list[int]]) -> dict[str, float]:
    """The definition, from all completions of an entry."""
    of = {"": completions, "terminated_": [ids for ids in completions if ids[-1] in ENDS]}
    kinds = {"mean": lambda values: sum(values) / len(values), "min": min, "max": max}
    lengths = {
        f"{kind}_{which}length": float(function([len(ids) for ids in some])) if some else 0.0
        for which, some in of.items()
        for kind, function in kinds.items()
    }
    return {**lengths, "clipped_ratio": 1 - len(of["terminated_"]) / len(completions)}


@pytest.mark.parametrize("evaluates", [False, True])
def test_lengths_are_those_of_all_completions_of_a_log_entry(tmp_path: Path, evaluates: bool) -> None:
    """The shortest was a mean of each step's shortest, and an evaluation between two entries mixed values up."""
    settings: dict[str, Any] = {"logging_steps": 4, "max_steps": 4, "generation_kwargs": {"eos_token_id": ENDS}}
    if evaluates:
        settings |= {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2}
    eval_rows = Dataset.from_list(make_rows(17)[12:]) if evaluates else None
    trainer = make_trainer(tmp_path, MAKE_TEACHER["ema"](), eval_rows=eval_rows, **settings)
    seen: dict[bool, list[list[int]]] = {True: [], False: []}
    generate = trainer._generate_single_turn

    def listening(*args: Any, **kwargs: Any) -> Any:
        completions = generate(*args, **kwargs)
        seen[trainer.model.training] += completions
        return completions

    trainer._generate_single_turn = listening  # type: ignore[method-assign]
    trainer.train()
    log = trainer.state.log_history
    ended = [ids for ids in seen[True] if ids[-1] in ENDS]
    assert 0 < len(ended) < len(seen[True]), "some must end, and some must be cut"
    (training,) = [e for e in log if "completions/min_length" in e]
    assert {k: training[f"completions/{k}"] for k in [*LENGTHS, "clipped_ratio"]} == pytest.approx(
        expected_lengths(seen[True])
    )
    if evaluates:
        last = [e for e in log if "eval_completions/min_length" in e][-1]
        expected = expected_lengths(seen[False][-5:])
        assert {k: last[f"eval_completions/{k}"] for k in [*LENGTHS, "clipped_ratio"]} == pytest.approx(expected)


def test_a_reward_that_is_called_like_an_extreme_is_a_mean(tmp_path: Path) -> None:
    """`rewards/minimal_edit` was logged as the smallest of all rewards."""
    reward = returns([0.0, 1.0, 0.0, 1.0])
    reward.__name__ = "minimal_edit"
    trainer = make_trainer(tmp_path, MAKE_TEACHER["ema"](), reward_funcs=reward, max_steps=2, logging_steps=2)
    trainer.train()
    (training,) = [e for e in trainer.state.log_history if "rewards/minimal_edit" in e]
    assert training["rewards/minimal_edit"] == 0.5


def test_an_evaluation_after_a_prediction_begins_anew(tmp_path: Path) -> None:
    rows = Dataset.from_list(make_rows(17)[12:])
    trainer = make_trainer(tmp_path, MAKE_TEACHER["ema"](), eval_rows=rows, per_device_eval_batch_size=2)
    trainer.predict(rows)
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_reward_that_is_unknown_everywhere_is_not_logged_as_0(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, MAKE_TEACHER["ema"](), reward_funcs=returns([None] * 4), max_steps=1)
    trainer.train()
    assert not any("reward" in entry for entry in trainer.state.log_history)
    assert any("group/right" in entry for entry in trainer.state.log_history)
