"""One log entry of several batches: means over all rows or tokens, and extremes."""

from __future__ import annotations

from collections import defaultdict

import pytest
from conftest import make_rows
from datasets import Dataset
from helpers import make_trainer

from opsd.training.averages import BatchSizes


def test_lengths_of_uneven_batches_are_those_of_all_completions() -> None:
    """TRL averages its batches: two batches of 2 and 1 completions, of lengths 4, 6 and 9 of which 9 was cut."""
    sizes, metrics = BatchSizes(), defaultdict(list)
    sizes.rows += [2, 1]
    for name, values in {
        "mean_length": [5.0, 9.0],
        "min_length": [4.0, 9.0],
        "max_length": [6.0, 9.0],
        "clipped_ratio": [0.0, 1.0],
        "mean_terminated_length": [5.0, 0.0],
        "min_terminated_length": [4.0, 0.0],
        "max_terminated_length": [6.0, 0.0],
    }.items():
        metrics[f"completions/{name}"] = values
    sizes.reduce(metrics)
    assert {name.removeprefix("completions/"): values for name, values in metrics.items()} == {
        "mean_length": [pytest.approx(19 / 3)],
        "min_length": [4.0],
        "max_length": [9.0],
        "clipped_ratio": [pytest.approx(1 / 3)],
        "mean_terminated_length": [5.0],
        "min_terminated_length": [4.0],
        "max_terminated_length": [6.0],
    }


def test_sizes_are_of_one_log_entry_only() -> None:
    sizes = BatchSizes()
    for metrics in ({"reward": [1.0, 0.0]}, {"reward": [0.0, 1.0]}):
        sizes.add(["reward"], 3)
        sizes.add(["reward"], 1)
        sizes.reduce(metrics)
        assert metrics["reward"] in ([0.75], [0.25])


def test_training_logs_the_shortest_rollout_of_several_steps(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """With logging_steps above 1 "the shortest rollout" was the mean of each step's shortest."""
    lengths = []
    trainer = make_trainer(tmp_path, rows=Dataset.from_list(make_rows()), logging_steps=3, max_steps=3)
    generate = trainer._generate_single_turn
    trainer._generate_single_turn = lambda *a, **k: lengths.extend(map(len, out := generate(*a, **k))) or out  # type: ignore
    trainer.train()
    entry = next(e for e in trainer.state.log_history if "completions/min_length" in e)
    assert (entry["completions/min_length"], entry["completions/max_length"]) == (min(lengths), max(lengths))
