"""What stops a run, before step 1 or in the middle of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import make_llama, make_rows
from datasets import Dataset, IterableDataset
from helpers import (
    MAKE_TEACHER,
    changed,
    make_args,
    make_student,
    make_trainer,
    snapshot,
)

from opsd import (
    PrivilegedContext,
    SameCheckpointTeacher,
)
from opsd.errors import ConfigError, DataError, NonFiniteLossError, OPSDWarning


def test_nan_in_the_loss_stops_before_the_update_and_names_step_and_rows(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, MAKE_TEACHER["same_checkpoint"](), max_steps=4, save_strategy="steps", save_steps=1
    )

    class Break(torch.nn.Module):
        calls = 0

    original = trainer.teacher.score

    def score(rollouts):  # type: ignore[no-untyped-def]
        signal = original(rollouts)
        Break.calls += 1
        if Break.calls == 5:
            signal.hidden_ND[0] = float("nan")
        return signal

    trainer.teacher.score = score
    with pytest.raises(NonFiniteLossError, match=r"step 3.*NaN or infinite in 1 row[\s\S]*What is"):
        trainer.train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_a_prompt_beyond_the_models_context_is_refused_by_row_before_step_one(tmp_path: Path) -> None:
    rows = Dataset.from_list([*make_rows(7), {**make_rows(1)[0], "solution": "long " * 600}])
    for context in ("worked_solution", PrivilegedContext("worked_solution", max_prompt_tokens=200)):
        with pytest.raises(DataError, match=r"row 7: .*tokens"):
            make_trainer(tmp_path, SameCheckpointTeacher(context=context), rows=rows)


def test_a_dataset_smaller_than_one_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 3 row"):
        make_trainer(tmp_path, None, rows=Dataset.from_list(make_rows(3))).train()


def test_a_frozen_adapter_is_refused(tmp_path: Path) -> None:
    student = make_student("lora").requires_grad_(False)
    with pytest.raises(ConfigError, match="is_trainable=True"):
        make_trainer(tmp_path, None, student)


def test_a_model_whose_head_has_another_transform_is_refused(tmp_path: Path) -> None:
    model = make_llama()
    forward = model.forward

    def shifted(*a, **k):  # type: ignore[no-untyped-def]
        out = forward(*a, **k)
        out.logits = out.logits + torch.arange(out.logits.shape[-1])
        return out

    model.forward = shifted
    with pytest.raises(TypeError, match="LlamaForCausalLM: logits computed from the last hidden states"):
        make_trainer(tmp_path, None, model)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lmbda": 1.5}, "between 0 and 1"),
        ({"lmbda": float("nan")}, "between 0 and 1"),
        ({"beta": -0.2}, "between 0 and 1"),
        ({"temperature": 0.0}, "above 0"),
        ({"max_completion_length": 0}, "at least 1"),
    ],
)
def test_settings_outside_their_range_are_refused(tmp_path: Path, setting: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_args(tmp_path, **setting)


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"lmbda": 0.2}, "exposure bias"), ({"seq_kd": True}, "no effect"), ({"beta": 0.01}, "nearly vanish")],
)
def test_settings_that_are_probably_not_meant_warn(tmp_path: Path, setting: dict, message: str) -> None:
    with pytest.warns(OPSDWarning, match=message):
        make_args(tmp_path, **setting)


def test_a_gradient_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, MAKE_TEACHER["same_checkpoint"](), max_steps=3)
    before = snapshot(trainer.model)
    next(trainer.model.parameters()).register_hook(lambda g: g * float("inf"))
    with pytest.raises(NonFiniteLossError, match="step 1: the gradient is not finite"):
        trainer.train()
    assert not changed(trainer, before)


def test_a_stream_that_ends_before_one_step_is_an_error(tmp_path: Path) -> None:
    stream = IterableDataset.from_generator(lambda: iter(make_rows(3)))
    with pytest.raises(DataError, match="before one step of 4 rows"):
        make_trainer(tmp_path, None, rows=stream).train()


def test_a_token_in_the_settings_is_refused(tmp_path: Path) -> None:
    """transformers would pickle it into every checkpoint."""
    with pytest.raises(ConfigError, match="HF_TOKEN"):
        make_args(tmp_path, hub_token="hf_abc")
