"""What stops a run, before step 1 or in the middle of it."""

from __future__ import annotations

import pickle
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
    OPSDConfig,
    PrivilegedContext,
    SameCheckpointTeacher,
)
from opsd.cli import main
from opsd.errors import ConfigError, DataError, NonFiniteLossError, OPSDWarning
from opsd.training.config import RENAMED, RENAMED_VALUES


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


RENAMED_VALUE_CASES = [(name, old, new) for name, values in RENAMED_VALUES.items() for old, new in values.items()]


def refused(folder: Path, setting: dict[str, str], way: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Give a setting to a run in one of three ways; returns the message of the error."""
    if way == "OPSDConfig":
        with pytest.raises(ConfigError) as caught:
            make_args(folder, **setting)
        return str(caught.value)
    (name, value), path = next(iter(setting.items())), folder / "run.yaml"
    path.write_text("model_name_or_path: none\ndataset_name: none\n" + (f"{name}: {value}\n" if way == "YAML" else ""))
    flags = [] if way == "YAML" else [f"--{name.replace('_', '-') if way == 'dashes' else name}", value]
    assert main(["train", str(path), *flags]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("way", ["OPSDConfig", "YAML", "command line", "dashes"])
@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_name_of_a_setting_is_refused_with_the_new_one(
    tmp_path: Path, old: str, new: str, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(tmp_path, {old: "1"}, way, capsys)
    assert f"the setting '{old}' is now called '{new}'" in message and f"Write {new}" in message
    names = OPSDConfig.__dataclass_fields__
    assert old not in names and new in names


@pytest.mark.parametrize("way", ["OPSDConfig", "YAML", "command line"])
@pytest.mark.parametrize(("name", "old", "new"), RENAMED_VALUE_CASES)
def test_an_old_value_of_a_setting_is_refused_with_the_new_one(
    tmp_path: Path, name: str, old: str, new: str, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"{name} is '{old}', which is now called '{new}'" in refused(tmp_path, {name: old}, way, capsys)


def test_a_warning_names_the_line_that_made_the_config(tmp_path: Path) -> None:
    with pytest.warns(OPSDWarning, match="has no effect|nearly vanish") as caught:
        OPSDConfig(str(tmp_path), use_cpu=True, bf16=False, keep_by="disagreement", beta=0.01)
    assert [warning.filename for warning in caught if warning.category is OPSDWarning] == [__file__] * 2


def test_a_config_is_the_same_after_it_was_pickled(tmp_path: Path) -> None:
    """transformers pickles it into every checkpoint."""
    args = make_args(tmp_path, ref_kl_coef=0.1, divergence="forward_kl")
    again = pickle.loads(pickle.dumps(args))
    assert again == args and again.objective == args.objective


def test_a_gradient_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, MAKE_TEACHER["same_checkpoint"](), max_steps=3)
    before = snapshot(trainer.model)
    next(trainer.model.parameters()).register_hook(lambda g: g * float("inf"))
    with pytest.raises(NonFiniteLossError, match="step 1: the gradient is not finite"):
        trainer.train()
    assert not changed(trainer, before)


def test_a_stream_that_ends_before_one_step_is_an_error(tmp_path: Path) -> None:
    stream = IterableDataset.from_generator(lambda: iter(make_rows(3)))
    with pytest.raises(DataError, match="before one batch of rollouts of 4 rows"):
        make_trainer(tmp_path, None, rows=stream).train()


def test_a_token_in_the_settings_is_refused(tmp_path: Path) -> None:
    """transformers would pickle it into every checkpoint."""
    with pytest.raises(ConfigError, match="HF_TOKEN"):
        make_args(tmp_path, hub_token="hf_abc")


@pytest.mark.parametrize("name", ["bf16_full_eval", "fp16_full_eval"])
def test_an_evaluation_that_would_round_the_weights_is_refused(tmp_path: Path, name: str) -> None:
    """transformers casts the student for an evaluation, and it stayed in 16 bits."""
    with pytest.raises(ConfigError, match=f"{name} casts the student's weights"):
        make_trainer(tmp_path, MAKE_TEACHER["ema"](), **{name: True})


def test_a_student_with_two_adapters_is_refused(tmp_path: Path) -> None:
    """The folder that it saved held the other one."""
    student = make_student("lora")
    student.add_adapter("second", student.peft_config["default"])
    with pytest.raises(ConfigError, match="has 2 adapters: default, second"):
        make_trainer(tmp_path, MAKE_TEACHER["ema"](), student)
