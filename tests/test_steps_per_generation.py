"""Rollouts that are sampled for several optimizer steps at once: whose rows, how old, and through a stop."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama, make_rows, make_tokenizer
from datasets import Dataset
from fault_server import FaultServer
from helpers import MAKE_TEACHER, make_args, make_trainer

from opsd import OPSDTrainer, ServedTeacher
from opsd.errors import CheckpointError, ConfigError, DataError, OPSDWarning, ServerError
from opsd.health.bound import STALENESS as AGE
from opsd.health.bound import shares_of_step
from opsd.losses import Objective
from opsd.training.checkpoints import SAMPLES, problem
from opsd.training.metrics import GAP

SAVING = {"save_strategy": "steps", "save_steps": 1}
POLICY_GRADIENT = {"support": "sampled", "importance_clip": 2.0}
FORWARD = {"beta": 0.0}
# Two optimizer steps of two micro-batches each, unless a test says otherwise.
TWO = {"steps_per_generation": 4}


def rows(count: int = 24) -> Dataset:
    return Dataset.from_list([{**row, "completion": "It is nineteen."} for row in make_rows(count)])


def listened(trainer: OPSDTrainer) -> tuple[list[tuple[int, int]], list[list[Any]]]:
    """Return lists that fill while a trainer trains: (step, prompts sampled), and each step's prompts."""
    calls, of_steps, generate, sample = [], [], trainer._generate, trainer._sample

    def generating(prompts: Any) -> Any:
        calls.append((trainer.state.global_step, len(prompts)))
        return generate(prompts)

    def sampling(batch: Any, count: int) -> Any:
        of_steps.append([row["prompt"] for row in batch])
        return sample(batch, count)

    trainer._generate, trainer._sample = generating, sampling  # type: ignore[method-assign]
    return calls, of_steps


def trained_on_answers(folder: Path, **settings: Any) -> OPSDTrainer:
    return make_trainer(folder, MAKE_TEACHER["same_checkpoint"](), **{"rows": rows(), **settings})


def logged(trainer: OPSDTrainer, name: str) -> list[float | None]:
    return [entry.get(name) for entry in trainer.state.log_history if "divergence" in entry]


def same(one: OPSDTrainer, other: OPSDTrainer) -> bool:
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return all(a.equal(b) for a, b in pairs)


def test_rollouts_of_several_steps_are_sampled_at_once_and_none_for_steps_that_do_not_come(tmp_path: Path) -> None:
    one = trained_on_answers(tmp_path / "one", max_steps=5)
    two = trained_on_answers(tmp_path / "two", max_steps=5, **TWO)
    calls, prompts = zip(*(listened(trainer) for trainer in (one, two)), strict=True)
    one.train()
    two.train()
    assert calls[0] == [(step, 4) for step in range(5)]
    assert calls[1] == [(0, 8), (2, 8), (4, 4)]
    assert prompts[0] == prompts[1], "a step's rows are the same"
    assert [gap is None for gap in logged(two, GAP)] == [False, True, False, True, False], "older weights sampled these"
    assert logged(two, AGE) == [0, 1, 0, 1, 0] and logged(one, AGE) == [None] * 5


def test_later_steps_train_on_what_the_first_weights_sampled(tmp_path: Path) -> None:
    """With a likelihood ratio that is not clipped, its product with the old probability is the new one."""
    trainer = make_trainer(
        tmp_path,
        MAKE_TEACHER["same_checkpoint"](),
        rows=rows(),
        max_steps=3,
        steps_per_generation=6,
        beta=0.0,
        importance_clip=1e6,
    )
    before = make_llama(0)
    trainer.train()
    waiting = trainer.ahead._waiting
    assert sorted(waiting) == [0, 1, 2] and trainer.ahead.sampled_at == 0
    assert all(math.isnan(value) for row in waiting[0].logprobs for value in row), "the same weights need no ratio"
    for step in (1, 2):
        for prompt, ids, logprobs in zip(
            waiting[step].prompt_ids, waiting[step].completion_ids, waiting[step].logprobs, strict=True
        ):
            with torch.no_grad():
                log_p = before(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = log_p[torch.arange(len(ids)), torch.tensor(ids)]
            assert torch.tensor(logprobs).allclose(expected, atol=1e-4)
    ratios = logged(trainer, "importance/ratio")
    assert ratios[0] == 1.0 and all(ratio is not None and abs(ratio - 1.0) > 1e-3 for ratio in ratios[1:])


def test_ratios_are_of_the_temperature_that_sampled(tmp_path: Path) -> None:
    trainer = trained_on_answers(tmp_path, **TWO, **POLICY_GRADIENT, learning_rate=0.0, temperature=0.5)
    trainer.train()
    assert logged(trainer, "importance/ratio") == pytest.approx([1.0, 1.0], abs=1e-4)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "frozen": ("same_checkpoint", FORWARD),
    "ema": ("ema", {}),
    "snapshot": ("snapshot", {"logging_steps": 2}),
    "policy gradient": ("same_checkpoint", POLICY_GRADIENT),
    "some rows off-policy": ("ema", {"lmbda": 0.5, "beta": 0.0}),
    "off-policy first": ("same_checkpoint", {"lmbda_schedule": {0: 0.0, 1: 1.0}}),
    "longer rollouts": ("live", {"completion_length_schedule": {0: 2, 3: 6}}),
    "groups": ("same_checkpoint", {"num_generations": 2}),
}


@pytest.mark.parametrize(("teacher", "settings"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_resumed_between_the_steps_of_a_batch_is_the_run_without_the_stop(
    tmp_path: Path, teacher: str, settings: dict[str, Any], stop: int
) -> None:
    settings = {"rows": rows(), "max_steps": 5, "steps_per_generation": 6, **SAVING, **settings}
    whole = make_trainer(tmp_path / "whole", MAKE_TEACHER[teacher](), **settings)
    expected, _ = listened(whole)
    whole.train()
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{stop}", tmp_path / "again" / f"checkpoint-{stop}")
    again = make_trainer(tmp_path / "again", MAKE_TEACHER[teacher](), **settings)
    calls, _ = listened(again)
    again.train(resume_from_checkpoint=True)
    assert same(whole, again)
    assert calls == [call for call in expected if call[0] >= stop], "what waits in the checkpoint is not sampled again"
    for name in (AGE, "divergence", "completions/mean_length"):
        assert logged(whole, name)[-1] == logged(again, name)[-1]


def test_a_checkpoint_without_the_samples_that_wait_is_passed_over(tmp_path: Path) -> None:
    trained_on_answers(tmp_path, max_steps=3, **TWO, **SAVING).train()
    checkpoint = tmp_path / "checkpoint-3"
    assert problem(checkpoint) is None
    (checkpoint / SAMPLES.format(0)).unlink()
    assert problem(checkpoint) == "it has no opsd_samples_0.json"


def test_rows_that_a_resumed_run_may_change_are_sampled_anew(tmp_path: Path) -> None:
    settings = {"rows": rows(), **TWO, **SAVING}
    trained_on_answers(tmp_path, max_steps=3, **settings).train()
    changed = {**settings, "rows": rows().select(range(8, 24)), "allow_changes": ["data", "rows", "max_steps"]}
    again = trained_on_answers(tmp_path, max_steps=4, **changed)
    calls, _ = listened(again)
    again.train(resume_from_checkpoint=True)
    assert calls == [(3, 4)] and logged(again, AGE)[-1] == 0


def test_another_number_of_steps_is_refused_on_resume(tmp_path: Path) -> None:
    trained_on_answers(tmp_path, **TWO, **SAVING).train()
    again = make_trainer(
        tmp_path, MAKE_TEACHER["same_checkpoint"](), rows=rows(), max_steps=4, steps_per_generation=8, **SAVING
    )
    with pytest.raises(CheckpointError, match="steps_per_generation: 4 in the checkpoint, 8 now"):
        again.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_run_whose_server_fails_goes_on_as_the_run_whose_server_did_not(tmp_path: Path, fails_at: int) -> None:
    with FaultServer(make_llama(5), make_tokenizer()) as server:

        def trainer(folder: str, **changes: Any) -> OPSDTrainer:
            teacher = ServedTeacher(server.url, top_k=50, context="answer_only")
            return make_trainer(tmp_path / folder, teacher, rows=rows(), max_steps=7, steps_per_generation=6, **changes)

        whole = trainer("whole", **SAVING)
        whole.train()
        broken = trainer("broken")
        score = broken.scorer.score

        def failing(rollouts: Any) -> Any:
            if broken.state.global_step == fails_at:
                raise ServerError("no server answers.")
            return score(rollouts)

        broken.scorer.score = failing  # type: ignore[method-assign]
        with pytest.raises(ServerError, match=f"checkpoint-{fails_at} is saved"):
            broken.train()
        again = trainer("broken")
        again.train(resume_from_checkpoint=True)
    assert same(whole, again)


def test_rows_of_a_stream_come_in_generation_batches(tmp_path: Path) -> None:
    stream = rows().to_iterable_dataset()
    trainer = trained_on_answers(tmp_path, rows=stream, max_steps=4, **TWO)
    calls, prompts = listened(trainer)
    trainer.train()
    assert calls == [(0, 8), (2, 8)]
    seen = [str(prompt) for of_step in prompts for prompt in of_step]
    assert len(seen) == len(set(seen)) == 16


def test_an_epoch_has_whole_generation_batches(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, MAKE_TEACHER["same_checkpoint"](), rows=rows(20), max_steps=-1, num_train_epochs=2, **TWO
    )
    calls, _ = listened(trainer)
    trainer.train()
    assert trainer.state.global_step == 8 and calls == [(step, 8) for step in (0, 2, 4, 6)]
    with pytest.raises(DataError, match=r"has 4 row\(s\), and one batch of rollouts takes 8"):
        trained_on_answers(tmp_path / "few", rows=rows(4), **TWO).train()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no step": ({"steps_per_generation": 0}, "steps_per_generation must be 1 or more"),
    "half a step": ({"steps_per_generation": 3}, "one optimizer step takes 2 micro-batches"),
    "less than a step": ({"steps_per_generation": 1}, "one optimizer step takes 2 micro-batches"),
    "a length that changes between": (
        {**TWO, "completion_length_schedule": {0: 2, 3: 4}},
        "changes at step 3, and the rollouts of 2 optimizer steps are sampled at once",
    ),
    "a policy gradient without a ratio": (
        {**TWO, "support": "sampled"},
        "1 of 2 steps would train on samples of older",
    ),
    "rewards to go without a ratio": ({**TWO, "reward_to_go": "mean"}, "importance_clip: 2"),
}


@pytest.mark.parametrize(("settings", "says"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_before_a_model_loads(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        make_args("runs/none", **settings)


def test_a_control_corrects_for_older_weights_as_its_method_does(tmp_path: Path) -> None:
    fixed = {"control": "constant-advantage", **TWO}
    with pytest.raises(ConfigError, match="cannot go with control 'constant-advantage'"):
        make_args(tmp_path, **fixed)
    assert make_args(tmp_path, importance_clip=2.0, **fixed).objective.importance_clip == 2.0


def test_workers_that_would_each_repeat_batches_of_a_stream_are_refused(tmp_path: Path) -> None:
    stream = rows().to_iterable_dataset(num_shards=2)
    with pytest.raises(DataError, match="dataloader_num_workers is 2, and a batch of rollouts gives 4 micro-batches"):
        trained_on_answers(tmp_path, rows=stream, dataloader_num_workers=2, **TWO)


def test_what_bounds_a_step_is_told_by_whole_generation_batches() -> None:
    """Every second step samples, for 6 s; the first two fill caches."""
    log = [
        {"step_time": 8.0 if first else 2.0, "seconds/rollouts": 6.0 if first else 0.0, AGE: 0.0 if first else 1.0}
        for first in (True, False) * 3
    ]
    assert shares_of_step(log) == {"rollouts": 0.6, "training": 0.4, "teacher": 0.0}
    assert shares_of_step(log[:3]) == {"rollouts": 0.6, "training": 0.4, "teacher": 0.0}


def test_settings_that_change_nothing_are_named(tmp_path: Path) -> None:
    with pytest.warns(OPSDWarning, match="importance_clip has no effect"):
        make_args(tmp_path, importance_clip=2.0, steps_per_generation=2)
    assert isinstance(make_args(tmp_path, importance_clip=2.0, **TWO).objective, Objective)  # and no warning
