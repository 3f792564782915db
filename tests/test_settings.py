"""Settings are read in the types and ranges that they have: a mistake is named before a model loads."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from trl import ModelConfig

from opsd import OPSDConfig
from opsd.commands.run_file import SETTINGS, read_run
from opsd.errors import ConfigError
from opsd.settings import parse_yaml, read_values, types_of
from opsd.training.ranges import RANGES

MINIMAL = "model_name_or_path: m\ndataset_name: d\nuse_cpu: true\nbf16: false\n"


def run_of(tmp_path: Path, line: str, *overrides: str) -> Any:
    path = tmp_path / "run.yaml"
    path.write_text(f"{MINIMAL}output_dir: {tmp_path / 'out'}\n{line}\n")
    return read_run(path, overrides)


WRONG_TYPES = {
    "max_steps: [1, 2]": "max_steps takes a whole number, and is [1, 2].",
    "max_steps: 1.5": "max_steps takes a whole number, and is 1.5.",
    "learning_rate: fast": "learning_rate takes a number (in YAML 1.0e-1, with the dot), and is 'fast'.",
    "learning_rate: true": "learning_rate takes a number (in YAML 1.0e-1, with the dot), and is True.",
    "use_peft: 3": "use_peft takes true or false, and is 3.",
    "dataset_train_split: {a: 1}": "dataset_train_split takes a text, and is {'a': 1}.",
    "optim: [sgd]": "optim takes a text, and is ['sgd'].",
    "optim: adamm": "optim is 'adamm', and must be one of",
    "save_strategy: sometimes": "save_strategy is 'sometimes', and must be one of no, steps, epoch, best.",
    "model_init_kwargs: '{a: '": "model_init_kwargs begins as a mapping, and is none:",
    "evaluation: [test.jsonl]": "evaluation takes a text or a mapping, such as {key: value}, and is ['test.jsonl'].",
}


@pytest.mark.parametrize("line", WRONG_TYPES)
def test_a_value_of_another_type_is_refused_with_the_type_that_the_setting_takes(tmp_path: Path, line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        run_of(tmp_path, line)
    assert WRONG_TYPES[line] in str(refused.value)


ACCEPTED = {
    "save_strategy: no": ("save_strategy", "no"),
    "logging_strategy: no": ("logging_strategy", "no"),
    "learning_rate: 3e-5": ("learning_rate", 3e-5),  # a text for YAML
    "max_steps: 1.0e+3": ("max_steps", 1000),
    "resume_from_checkpoint: true": ("resume_from_checkpoint", True),
    "model_init_kwargs: \"{'a': 1}\"": ("model_init_kwargs", {"a": 1}),
    "chat_template_kwargs: '{\"a\": 1}'": ("chat_template_kwargs", {"a": 1}),
}


@pytest.mark.parametrize("line", ACCEPTED)
def test_what_can_only_mean_one_thing_is_read_as_that(tmp_path: Path, line: str) -> None:
    name, value = ACCEPTED[line]
    read = getattr(run_of(tmp_path, line).args, name)
    assert read == value and type(value) in type(read).__mro__


def test_every_setting_takes_its_own_default() -> None:
    for settings in (OPSDConfig, ModelConfig):
        defaults = {each.name: each.default for each in fields(settings) if each.name in types_of(settings)}
        assert len(defaults) > 15
        for name, value in defaults.items():
            if isinstance(value, (bool, int, float, str)):
                read = read_values(settings, {name: value})[name]
                assert read in (value, [value]), name


@pytest.mark.parametrize("name", RANGES)
def test_a_value_out_of_its_range_is_refused_with_the_range(tmp_path: Path, name: str) -> None:
    least, most = RANGES[name]
    number = next(kind for kind in (int, float) if any(kind in types_of(each).get(name, ()) for each in SETTINGS))
    for wrong in (least - 1, *((math.nan,) if number is float else ())):
        with pytest.raises(ConfigError, match=f"{name} must be .*, and is {wrong:g}"):
            run_of(tmp_path, f"{name}: {'.nan' if math.isnan(wrong) else number(wrong)}")
    for edge in (least, most):
        if math.isfinite(edge) and edge == number(edge):
            run_of(tmp_path, f"{name}: {number(edge)}")


def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    """PyYAML keeps the last of two."""
    with pytest.raises(ConfigError, match=r"the key 'max_steps' stands twice(?s:.)*line 7"):
        run_of(tmp_path, "max_steps: 3\nmax_steps: 4")
    with pytest.raises(ConfigError, match="the key 'strategy' stands twice"):
        run_of(tmp_path, "teacher: {strategy: ema, decay: 0.9, strategy: live}")
    with pytest.raises(ConfigError, match="lmbda_schedule begins as a mapping, and is none: the key 0 stands twice"):
        run_of(tmp_path, "", "--lmbda_schedule", "{0: 0.0, 0: 1.0}")


def test_yaml_may_merge_a_mapping_into_others() -> None:
    text = "base: &b {a: 1, b: 2}\nboth: {<<: *b, b: 3}"
    assert parse_yaml(text) == yaml.safe_load(text) == {"base": {"a": 1, "b": 2}, "both": {"a": 1, "b": 3}}


def test_environment_variables_in_a_run_file_are_refused(tmp_path: Path) -> None:
    """They were ignored."""
    with pytest.raises(ConfigError, match=r"opsd does not read env.*NAME=value opsd train"):
        run_of(tmp_path, "env: {HF_HUB_OFFLINE: '1'}")


def test_a_path_that_leads_nowhere_says_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"Relative paths start in the folder .*: looked for {tmp_path}/ev.yaml"):
        run_of(tmp_path, "evaluation: ev.yaml")
