"""Reads a run's configuration: a recipe's `args`, over them the YAML file, over both the command line.

Convention and names are those of TRL's command line (TrlParser): flat keys, and `--key value` overrides. Loads no data
and no model.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from trl import ModelConfig, TrlParser

from opsd.errors import ConfigError, did_you_mean
from opsd.settings import read_values, read_yaml
from opsd.teachers import Recipe, recipe_of
from opsd.training.config import OPSDConfig, check_renamed
from opsd.training.ranges import check_ranges


@dataclass
class RunArguments:
    """Data, teacher, context, rewards and evaluation of a run."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Training rows: a .jsonl, .json, .parquet or .csv file, a folder, or a hub id."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "Split of the same dataset to evaluate the divergence on, if any."}
    )
    dataset_streaming: bool = field(default=False, metadata={"help": "Stream the dataset (needs max_steps)."})
    columns: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Column names of another system: trl, ms-swift, verl or prime-rl; or in YAML a mapping from opsd's "
            "names to yours, such as {answer: reward_model.ground_truth}."
        },
    )
    teacher: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "A recipe's name or path, a model folder or hub id, or in YAML a mapping such as "
            "{strategy: ema, decay: 0.99}. Unset: the same checkpoint, frozen. See `opsd teachers`."
        },
    )
    context: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "The teacher's context: a template's name or path, or in YAML a mapping such as "
            "{template: worked_solution, truncate: solution, max_prompt_tokens: 2048}. See `opsd templates`."
        },
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions: a grader's name such as last_number, reasoning_gym:DATASET, or module:function "
            "with TRL's signature; several are summed by reward_weights."
        },
    )
    evaluation: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Evaluation before, during and after training: in YAML a mapping such as {test: test.jsonl, "
            "grader: last_number}, or the path of a YAML file with one. docs/evaluation.md has its keys."
        },
    )


@dataclass(frozen=True)
class Run:
    """A run's resolved configuration.

    >>> run = read_run(Path("run.yaml"), ["--learning_rate", "3e-5"])
    >>> run.args.learning_rate
    3e-05

    Args:
        run: data, teacher, context, rewards and evaluation.
        args: training arguments.
        model: TRL's model arguments (name, dtype, LoRA, quantisation).
        recipe: the recipe that `teacher` names, if any.
        has_sweep: whether the file has a `sweep:`, which only `opsd sweep` reads.
    """

    run: RunArguments
    args: OPSDConfig
    model: ModelConfig
    recipe: Recipe | None
    has_sweep: bool = False


SETTINGS = (RunArguments, OPSDConfig, ModelConfig)


class RunParser(TrlParser):
    """TRL's parser; a mistake is an error with a hint instead of two pages of usage."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError instead of printing the usage of three hundred options."""
        raise ConfigError(f"{message}. See `opsd train --help`.")

    @property
    def keys(self) -> set[str]:
        """Every key that a YAML file may hold."""
        return {action.dest for action in self._actions} - {"help"}

    @property
    def lists(self) -> set[str]:
        """Keys whose value is a list."""
        return {action.dest for action in self._actions if action.nargs in ("+", "*")}

    def check(self, names: Iterable[str], where: str) -> None:
        """Refuse a key that nothing reads."""
        names = list(names)
        check_renamed(names, where)
        for name in names:
            if name == "env":
                raise ConfigError(
                    f"{where}: opsd does not read env. Variables set there would come after the libraries that read "
                    "them. Set them where opsd is called: NAME=value opsd train …"
                )
            if name not in self.keys:
                raise ConfigError(
                    f"{where}: there is no setting {name!r}.{did_you_mean(name, self.keys)} It would be ignored, and "
                    "the setting you meant would keep its default. All settings: `opsd train --help-all`."
                )


def make_parser() -> RunParser:
    """Return the parser of `opsd train`."""
    return RunParser(SETTINGS, prog="opsd train", usage=argparse.SUPPRESS)


def read_run(path: Path | None, overrides: Sequence[str] = ()) -> Run:
    """Read a run's configuration.

    Args:
        path: the YAML file, or None where everything is an override.
        overrides: `--key value` arguments.

    Raises:
        ConfigError: an unknown or ill-typed key (nearest name suggested), no model, no dataset.
    """
    return resolve_run({} if path is None else read_yaml(path), str(path or "a YAML file"), overrides)


def resolve_run(config: Mapping[str, Any], where: str, overrides: Sequence[str] = ()) -> Run:
    """Return a run's configuration from the content of its file; see `read_run`.

    Args:
        config: the content; its `sweep` is left to `opsd sweep`.
        where: the file, for errors.
        overrides: `--key value` arguments.
    """
    parser = make_parser()
    config = dict(config)
    has_sweep = config.pop("sweep", None) is not None
    parser.check(config, where)
    given = [token[2:].split("=")[0].replace("-", "_") for token in overrides if token.startswith("--")]
    parser.check([name for name in given if not name.startswith("no_")], "command line")
    recipe = recipe_of(_last_value(overrides, "teacher") or config.get("teacher"))
    if recipe is not None:
        parser.check(recipe.args, "the recipe's args")
        parser.set_defaults_with_config(**_in_their_types(recipe.args))
    # Mappings pass through unchanged: the trainer reads a recipe or a context from one.
    parser.set_defaults_with_config(**_in_their_types(config))
    run, args, model = parser.parse_args_into_dataclasses(args=list(overrides))
    check_ranges(model)
    for name, value in (("model_name_or_path", model.model_name_or_path), ("dataset_name", run.dataset_name)):
        if not value:
            raise ConfigError(f"a run needs {name}. Set it in {where} or by --{name}.")
    if isinstance(run.evaluation, str):
        run.evaluation = read_yaml(Path(run.evaluation))
    return Run(run, args, model, recipe, has_sweep)


def _in_their_types(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a file in the types of their settings; argparse converts texts and keeps the rest as it is."""
    values = dict(config)
    for settings in SETTINGS:
        values = read_values(settings, values)
    return values


def _last_value(overrides: Sequence[str], key: str) -> Any:
    """Return the value of the last `--key value` or `--key=value`, or None."""
    value = None
    for i, token in enumerate(overrides):
        if token == f"--{key}" and i + 1 < len(overrides):
            value = overrides[i + 1]
        elif token.startswith(f"--{key}="):
            value = token.split("=", 1)[1]
    return value
