"""A run that learns nothing says so: before step 1 where that is known, after step 1 otherwise, and in its last lines.

Every case is a real run of two steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama, make_rows, make_tokenizer
from datasets import Dataset
from helpers import LORA, make_args, make_trainer, returns
from peft import LoraConfig

from opsd import (
    EMATeacher,
    LiveTeacher,
    MixtureTeacher,
    OPSDTrainer,
    PastCheckpointTeacher,
    SameCheckpointTeacher,
    SiblingTeacher,
    SnapshotTeacher,
)
from opsd.contexts.schedule import ContextSchedule
from opsd.errors import ConfigError
from opsd.evaluation.run_folder import read_card
from opsd.teachers import recipe_of
from opsd.training.config import OPSDConfig
from opsd.training.learning import checksum

BEFORE, FIRST, LAST = "warning     ", "step 1      ", ""  # how a line begins that names a cause, by when it is known
GROUPS: dict[str, Any] = {"num_generations": 2, "grpo_coef": 1.0, "distill_on": "wrong"}


@dataclass(frozen=True)
class Case:
    """A run, what it says, and when it says it first.

    Args:
        saw: a part of the message.
        when: what the line begins with that says it first.
        teacher: makes the teacher.
        learned: whether the run learns something in spite of it.
        settings: of `make_trainer`.
    """

    saw: str
    when: str = BEFORE
    teacher: Callable[[], Any] = lambda: LiveTeacher(context="answer_only")
    learned: bool = False
    settings: Any = None


def same_model() -> SiblingTeacher:
    return SiblingTeacher(make_llama(0), tokenizer=make_tokenizer())


def rows_with(**columns: Any) -> Dataset:
    return Dataset.from_list([{**row, **columns} for row in make_rows()])


CASES = {
    "learning rate 0": Case("learning_rate is 0", settings={"learning_rate": 0.0}),
    "one step of warm-up": Case(
        "warm-up has 5 steps and the run 1, at which", settings={"warmup_steps": 5, "max_steps": 1}
    ),
    "a warm-up longer than the run": Case("to 2% of learning_rate", learned=True, settings={"warmup_steps": 50}),
    "a rate too small for float32": Case(
        "no trainable weight changed",
        LAST,
        settings={"learning_rate": 1e-30, "student": make_llama(tie=False)},  # no weight of which is 0
    ),
    "a live teacher without context": Case("no context and starts as the student", teacher=LiveTeacher),
    "the default teacher": Case("no context and starts as the student", teacher=SameCheckpointTeacher),
    "parts without context": Case(
        "no context and starts as the student",
        teacher=lambda: MixtureTeacher([EMATeacher(0.9), LiveTeacher()], [0.5, 0.5]),
    ),
    "a mixture that is the student": Case(
        "the gradient was 0 in 1 step",
        FIRST,
        lambda: MixtureTeacher([same_model(), same_model()], [0.5, 0.5]),
        settings={"learning_rate": 1e-9},
    ),
    "a sibling that is the student": Case("the gradient was 0 in 1 step", FIRST, same_model),
    "pass rates of 1": Case(
        "weighs each of them 0", settings={"rows": rows_with(rate=1.0), "pass_rate_column": "rate"}
    ),
    "no success": Case(
        "no token was scored in 1 step: 0 of 4 rollouts reached success_reward 1 (mean reward 0.2)",
        FIRST,
        lambda: EMATeacher(0.9, context="own_success"),
        settings={"reward_funcs": returns([0.2] * 4), "num_generations": 2},
    ),
    "all completions cut": Case(
        "every completion was cut at max_completion_length 6", FIRST, settings={"mask_truncated_completions": True}
    ),
    "named tokens only": Case(
        "no token was scored in 1 step: none is left of the tokens without 400",
        FIRST,
        settings={"mask_tokens": list(make_tokenizer().get_vocab())},
    ),
    "nothing wrong, equal rewards": Case(
        "4 rollouts all reached success_reward 1", FIRST, settings={**GROUPS, "reward_funcs": returns([1.0] * 4)}
    ),
    "equal rewards": Case(
        "GRPO term had no advantage", FIRST, learned=True, settings={**GROUPS, "reward_funcs": returns([0.0] * 4)}
    ),
    "a checkpoint that never comes": Case(
        "becomes the student of step 300, and the run ends after 2",
        teacher=lambda: PastCheckpointTeacher("checkpoint-300", context="answer_only"),
        learned=True,
    ),
    "a renewal that never comes": Case(
        "renewed every 50 steps, and the run ends after 2",
        teacher=lambda: SnapshotTeacher(50, context="answer_only"),
        learned=True,
    ),
    "a part that never moves": Case(
        "moves every 2 steps, and the run ends after 2",
        teacher=lambda: MixtureTeacher([EMATeacher(0.9, every=2), LiveTeacher()], [0.5, 0.5], context="answer_only"),
        learned=True,
    ),
    "a level that never comes": Case(
        "levels that begin after the run's 2 steps: answer_only",
        teacher=lambda: SameCheckpointTeacher(
            context=ContextSchedule(["worked_solution", "answer_only"], until_step={"worked_solution": 2})
        ),
        learned=True,
    ),
    "a gate that never opens": Case(
        "0 of 1 renewals: the gate refused each",
        LAST,
        lambda: SnapshotTeacher(1, gate={"bounds": {"group/right": [0.5, 1.5]}}, context="answer_only"),
        learned=True,
        settings={"reward_funcs": returns([0.0] * 4)},
    ),
    "a recipe without its args": Case(
        "beta 1.0 (there 0.0), entry_clip None (there 0.05)", teacher=lambda: "opsd", learned=True
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_run_names_what_kept_it_from_learning(case: Case, tmp_path: Path, capsys: Any) -> None:
    """Each of these ended with "saved the trained model" and not a word."""
    trainer = make_trainer(tmp_path, case.teacher(), **(case.settings or {}))
    trainer.train()
    lines = capsys.readouterr().out.splitlines()
    end = next(number for number, line in enumerate(lines) if line.startswith("trained     "))
    assert any(line.startswith(case.when) and case.saw in line for line in lines[: end if case.when else None]), lines
    what = case.saw.replace("in 1 step", "in 2 steps").replace("4 rollouts", "8 rollouts")
    title = "not done    " if case.learned else "learned     nothing: "
    assert any(line.startswith(title) and what in line for line in lines[end:]), lines[end:]
    assert trainer.learning.learned == case.learned
    outcome = read_card(str(tmp_path))["outcome"]
    assert outcome == {**trainer.learning.description, "health": outcome["health"]}


def test_a_run_that_learns_says_how_much(tmp_path: Path, capsys: Any) -> None:
    """No false alarm, and steps and tokens in the last line."""
    trainer = make_trainer(tmp_path, EMATeacher(0.9, context="answer_only"))
    trainer.train()
    counts = trainer.learning.counts
    assert trainer.learning.learned and trainer.learning.findings == []
    assert 0 < counts.tokens <= 2 * 4 * 6 and counts.with_gradient == counts.with_tokens == counts.steps == 2
    out = capsys.readouterr().out
    assert "warning" not in out and "step 1  " not in out
    assert out.splitlines()[-1] == f"trained     2 steps on {counts.tokens} tokens of 8 rollouts"


@pytest.mark.parametrize("settings", [{"learning_rate": 0.0}, {"warmup_steps": 5}])
def test_a_schedule_that_stays_at_0_is_named(settings: dict[str, Any], tmp_path: Path) -> None:
    """The learning rate of the settings says nothing where the user brings optimizer and schedule."""
    model = make_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    trainer = OPSDTrainer(
        model,
        LiveTeacher(context="answer_only"),
        args=make_args(tmp_path, **settings),
        train_dataset=Dataset.from_list(make_rows()),
        processing_class=make_tokenizer(),
        optimizers=(optimizer, schedule),
    )
    assert trainer.learning.findings == []
    trainer.train()
    assert [finding.saw for finding in trainer.learning.findings] == ["the learning rate was 0 in 2 steps"]


@pytest.mark.parametrize(
    ("settings", "peft", "rule"),
    [
        ({"skip_first_tokens": 6}, {}, "skip_first_tokens is 6 and max_completion_length 6: no token"),
        ({"skip_first_tokens": 3, "first_tokens_only": 3}, {}, "skip_first_tokens is 3 and first_tokens_only 3"),
        ({}, {"lora_alpha": 0}, "lora_alpha is 0"),
        ({}, {"alpha_pattern": {"q_proj": 0}}, "lora_alpha is 0"),
    ],
)
def test_what_could_never_train_is_refused_before_a_model_loads(
    settings: dict[str, Any], peft: dict[str, Any], rule: str, tmp_path: Path
) -> None:
    """No rollout and no weight could change it, so there is no use for such a run."""
    with pytest.raises(ConfigError, match=rule):
        OPSDTrainer(
            "no/such-model",
            LiveTeacher(context="answer_only"),
            args=make_args(tmp_path, **settings),
            train_dataset=Dataset.from_list(make_rows()),
            peft_config=LoraConfig(**{**LORA, **peft}),
        )


@pytest.mark.filterwarnings("ignore:top_p")  # the recipe samples as its paper does
def test_a_recipe_with_its_args_is_in_force(tmp_path: Path) -> None:
    """The way out that the message gives."""
    recipe = recipe_of("opsd")
    assert recipe is not None
    settings = {**recipe.args, "max_completion_length": 6, "report_to": "none", "use_cpu": True, "bf16": False}
    args = OPSDConfig(str(tmp_path), **settings)
    rows = Dataset.from_list(make_rows())
    trainer = OPSDTrainer(make_llama(), "opsd", args=args, train_dataset=rows, processing_class=make_tokenizer())
    assert trainer.learning.findings == []


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    """The last lines are of the whole run: what only the first half did counts too."""
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    whole = make_trainer(tmp_path, EMATeacher(0.9, context="answer_only"), **settings)
    whole.train()
    resumed = make_trainer(tmp_path, EMATeacher(0.9, context="answer_only"), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.learning.counts == whole.learning.counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_the_checksum_of_weights_sees_values_that_change_places(dtype: torch.dtype, monkeypatch) -> None:
    """It was a sum of bits, so [1, 2] and [2, 1] had the same, and a run that swaps values "changed no weight"."""
    values = torch.arange(1.0, 9.0)
    others = [values.flip(0), values.roll(1), values[[1, 0, *range(2, 8)]], values + torch.eye(8)[3], -values]
    sums = {checksum(each.to(dtype)) for each in (values, *others)}
    assert len(sums) == 1 + len(others) and checksum(values.to(dtype)) == checksum(values.to(dtype).clone())
    monkeypatch.setattr("opsd.training.learning.BLOCK", 3)
    assert sums == {checksum(each.to(dtype)) for each in (values, *others)}
