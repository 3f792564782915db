"""Every setting that is a list takes one element alone as a list of it, and refuses a text that is no element."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import make_tokenizer
from helpers import make_args
from peft import LoraConfig

from opsd import EMATeacher, MixtureTeacher, OPSDConfig
from opsd.commands.run_file import SETTINGS, read_run
from opsd.contexts.lint import lint
from opsd.errors import ConfigError
from opsd.settings import as_list, list_settings
from opsd.training.checks import check_settings
from opsd.training.groups import Groups
from opsd.training.token_selection import TokenSelection

ONE = {str: "data", float: 0.5, int: 3}  # one element of each type
LISTS = [(settings, name, element) for settings in SETTINGS for name, element in list_settings(settings).items()]
OF_A_RUN = list_settings(OPSDConfig)


def test_the_lists_of_a_config_are_those_that_its_annotations_say() -> None:
    annotations = {k: v for cls in OPSDConfig.__mro__ for k, v in vars(cls).get("__annotations__", {}).items()}
    declared = {name for name, hint in annotations.items() if str(hint).startswith("list[")}
    assert OF_A_RUN.keys() == declared >= {"mask_tokens", "reward_weights", "label_names"}


@pytest.mark.parametrize(("name", "element"), OF_A_RUN.items())
def test_one_element_of_a_list_setting_is_a_list_of_it(tmp_path: Path, name: str, element: type) -> None:
    assert getattr(make_args(tmp_path, **{name: ONE[element]}), name) == [ONE[element]]
    several = [ONE[element]] * 2
    assert getattr(make_args(tmp_path, **{name: several}), name) == several


@pytest.mark.parametrize(("name", "element"), OF_A_RUN.items())
@pytest.mark.parametrize("wrong", [b"text", {"a": 1}, True, [None], ["ok", {}]], ids=str)
def test_what_is_no_element_of_a_list_setting_is_refused(tmp_path: Path, name: str, element: type, wrong: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} is a list of .* is none"):
        make_args(tmp_path, **{name: wrong})


@pytest.mark.parametrize(("settings", "name", "element"), LISTS)
def test_a_list_setting_in_yaml_may_be_one_element(tmp_path: Path, settings: type, name: str, element: type) -> None:
    """`mask_tokens: "<|im_end|>"` masked the letters of the token."""
    path = tmp_path / "run.yaml"
    path.write_text(f"model_name_or_path: m\ndataset_name: d\nuse_cpu: true\nbf16: false\n{name}: {ONE[element]}\n")
    run = read_run(path, ["--output_dir", str(tmp_path)])
    value = next(getattr(part, name) for part in (run.run, run.args, run.model) if isinstance(part, settings))
    # TRL writes a list of one target as a text.
    assert value == (ONE[element] if name == "lora_target_modules" else [ONE[element]])


def test_a_token_given_as_text_is_left_out_and_its_letters_are_not(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    selection = TokenSelection.from_config(make_args(tmp_path, mask_tokens="<|im_end|>"), tokenizer, [])
    assert selection.left_out_ids == {tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_an_adapter_keeps_the_module_that_a_text_names(tmp_path: Path) -> None:
    """peft compares name ends with each letter: `modules_to_save="lm_head"` would also train every module on d."""
    args, config = make_args(tmp_path), LoraConfig(target_modules="all-linear", modules_to_save="norm")
    check_settings(args, EMATeacher(0.9), Groups.from_config(args, None), None, None, config, False)
    assert config.modules_to_save == ["norm"] and config.target_modules == "all-linear"


TEXT_IN_PLACE_OF_A_LIST = {
    "weights of a mixture": (lambda: MixtureTeacher([EMATeacher(0.9)], "1"), "weights is a list of numbers"),
    "numbers as texts": (lambda: MixtureTeacher([EMATeacher(0.9)], ["1"]), "weights is a list of numbers"),
    "a run's reward weights": (lambda: OPSDConfig("unused", reward_weights="1"), "reward_weights is a list of numbers"),
}


@pytest.mark.parametrize(("make", "message"), TEXT_IN_PLACE_OF_A_LIST.values(), ids=TEXT_IN_PLACE_OF_A_LIST)
def test_a_text_in_place_of_numbers_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_mixture_takes_one_context_for_one_weight() -> None:
    (context,) = MixtureTeacher(EMATeacher(0.9), 1.0, contexts="hint").prompts.contexts
    assert context.name == "hint"


def test_functions_that_take_names_take_one_name() -> None:
    assert [finding.status for finding in lint("answer_only", columns="answer")] == ["pass", "pass"]
    assert as_list("only", ()) == () and as_list("only", None) is None


def test_trl_settings_that_take_a_text_keep_it(tmp_path: Path) -> None:
    assert make_args(tmp_path, report_to="none").report_to == []
    assert make_args(tmp_path, optim_target_modules="all-linear").optim_target_modules == "all-linear"
