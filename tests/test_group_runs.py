"""Whole runs with groups: what a template may need, what is logged, what would only fail in mid-run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows
from datasets import Dataset
from helpers import logged, make_trainer, returns

from opsd import PrivilegedContext, SameCheckpointTeacher
from opsd.errors import DataError, OPSDWarning

SIBLING = '{% extends "base.jinja" %}{% block user %}{{ prompt }} It was: {{ sibling }}{% endblock %}'
GROUP: dict[str, Any] = {"num_generations": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


def needs_sibling(**settings: Any) -> SameCheckpointTeacher:
    return SameCheckpointTeacher(context=PrivilegedContext.from_string(SIBLING, name="mine", **settings))


def test_a_template_may_need_what_rows_that_are_only_reinforced_have_not(tmp_path: Path) -> None:
    """A right rollout without a right sibling is reinforced and shown nothing; its prompt must not be rendered."""
    rewards = returns([1.0, 0.0, 0.0, 0.0])
    settings = {"distill_on": "wrong", "grpo_coef": 0.5, "grpo_on": "undistilled", "max_steps": 2}
    trainer = make_trainer(tmp_path, needs_sibling(), reward_funcs=rewards, **GROUP, **settings)
    trainer.train()
    assert logged(trainer, "group/distilled") == [0.75, 0.75] and logged(trainer, "group/unused") == [0.0, 0.0]


@pytest.mark.slow
def test_the_entropy_is_that_of_the_tokens_trained_on_however_few(tmp_path: Path) -> None:
    """Unused rows fill whole micro-batches, whose entropy TRL logs as 0 and takes into the mean: gates read it."""
    entropies = []
    for name, rewards in (("all", [1.0] * 4), ("half", [1.0, 0.0, 0.0, 0.0])):
        settings = {"max_steps": 1, "learning_rate": 0.0, "distill_on": "right" if name == "half" else "all", "seed": 3}
        teacher = SameCheckpointTeacher(context="answer_only")
        trainer = make_trainer(tmp_path / name, teacher, reward_funcs=returns(rewards), **GROUP, **settings)
        trainer.train()
        entropies += logged(trainer, "entropy")
    assert entropies[1] == pytest.approx(entropies[0], rel=0.05) and entropies[1] > 1


def test_a_sibling_that_may_not_fit_is_refused_before_the_first_step(tmp_path: Path) -> None:
    """Up to max_completion_length tokens of it would stop the run on the day it is that long."""
    settings = {**GROUP, "max_completion_length": 250}
    with pytest.raises(DataError, match="teacher's prompt"):
        make_trainer(tmp_path, needs_sibling(), reward_funcs=returns([1.0] * 4), **settings)
    short = needs_sibling(truncate="sibling", max_prompt_tokens=200)
    make_trainer(tmp_path, short, reward_funcs=returns([1.0] * 4), **settings)


def test_evaluation_warns_that_it_has_no_siblings(tmp_path: Path) -> None:
    eval_rows = Dataset.from_list(make_rows(16)[12:])
    with pytest.warns(OPSDWarning, match="evaluation samples each row once"):
        make_trainer(tmp_path, needs_sibling(), reward_funcs=returns([1.0] * 4), eval_rows=eval_rows, **GROUP)
