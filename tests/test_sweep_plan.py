"""Which runs a run file and a command line make, before any of them is trained."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from opsd.commands.sweep_plan import as_typed, read_sweep
from opsd.errors import ConfigError

BASE: dict[str, Any] = {
    "model_name_or_path": "model",
    "dataset_name": "train-{seed}.jsonl",
    "evaluation": {"test": "test.jsonl", "grader": "exact", "selection": "dev.jsonl", "every": 1},
    "use_cpu": True,
    "bf16": False,
}


def plan(folder: Path, *arguments: str, **changes: Any) -> Any:
    path = folder / "run.yaml"
    path.write_text(
        yaml.safe_dump({name: v for name, v in {**BASE, **changes}.items() if v is not None}, sort_keys=False)
    )
    return read_sweep([str(path), *arguments])


def names(folder: Path, *arguments: str, **changes: Any) -> list[str]:
    return [run.name for run in plan(folder, *arguments, **changes).runs]


def test_several_values_are_swept_seeds_outermost_and_one_value_changes_all(tmp_path: Path) -> None:
    given = ["--learning_rate", "3e-6", "1e-5", "--control", "method", "sft", "--seed", "0", "1", "--max_steps", "7"]
    sweep = plan(tmp_path, *given)
    wanted = ["method-lr3e-6", "method-lr1e-5", "sft-lr3e-6", "sft-lr1e-5"]
    assert [run.name for run in sweep.runs] == [f"{name}-seed{seed}" for seed in (0, 1) for name in wanted]
    first, last = sweep.runs[0], sweep.runs[-1]
    assert "control" not in first.settings and last.settings["control"] == "sft"
    assert (first.settings["learning_rate"], last.settings["learning_rate"]) == (3e-6, 1e-5)
    assert {run.settings["max_steps"] for run in sweep.runs} == {7}
    assert (first.settings["dataset_name"], last.settings["dataset_name"]) == ("train-0.jsonl", "train-1.jsonl")
    assert first.settings["output_dir"] == "runs/sweep/method-lr3e-6-seed0"


def test_the_run_file_holds_lists_and_arms_and_the_command_line_adds_to_them(tmp_path: Path) -> None:
    sweep = {
        "learning_rate": ["1e-5", 2.0e-5],
        "arms": {"method": {}, "low": {"learning_rate": 1.0e-6}, "own": {"beta": [0.0, 0.5], "lmbda": 0.5}},
    }
    two = ["method-lr1e-5-seed42", "method-lr2e-5-seed42", "low-lr1e-6-seed42"]
    own = [f"own-lr{rate}-beta{beta}-seed42" for rate in ("1e-5", "2e-5") for beta in ("0", "0.5")]
    assert names(tmp_path, sweep=sweep) == [*two, *own]
    assert names(tmp_path, "--control", "sft", "--arms", "sft", sweep=sweep) == [
        "sft-lr1e-5-seed42",
        "sft-lr2e-5-seed42",
    ]
    assert names(tmp_path, "--learning_rate", "3e-5", "--arms", "method", sweep=sweep) == ["method-lr3e-5-seed42"]


def test_seeds_at_best_waits_with_the_other_seeds(tmp_path: Path) -> None:
    sweep = plan(tmp_path, "--learning_rate", "1e-6", "1e-5", "--seed", "0", "1", "2", "--seeds-at", "best")
    assert [run.seed for run in sweep.first_runs] == [0, 0]
    later = sweep.later_runs({"method": {"learning_rate": 1e-5}})
    assert [run.name for run in later] == ["method-lr1e-5-seed1", "method-lr1e-5-seed2"]


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        (["--learning_rte", "1e-5", "1e-6"], {}, "Did you mean 'learning_rate'"),
        (["--control", "stf"], {}, "Did you mean 'sft'"),
        (["--beta", "0.5", "2"], {}, "between 0 and 1"),
        (["--arms", "sft"], {}, "arms is 'sft'"),
        (["--keep", "some"], {}, "keep is 'some'"),
        (["--jobs", "0"], {}, "at least 1"),
        (["--seed", "0", "0"], {}, "would share the folder"),
        (["--seed", "0", "--resume_from_checkpoint", "true"], {}, "resumes its runs by itself"),
        ([], {"push_to_hub": True}, "write over each other"),
        ([], {"evaluation": None}, "has no `evaluation:`"),
        ([], {"sweep": {"learning_rate": 1e-5}}, "must be a list"),
        ([], {"sweep": {"arms": ["sft"]}}, "must be a mapping of names"),
        ([], {"sweep": {"arms": {"x": {"lerning_rate": 1e-5}}}}, "Did you mean 'learning_rate'"),
        (["--control", "sft"], {"control": "seq-kd"}, "Each arm sets its own"),
        (["--seeds-at", "best"], {"evaluation": {"test": "t.jsonl", "grader": "exact"}}, "and the evaluation has none"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_its_first_run(
    tmp_path: Path, arguments: list[str], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(tmp_path, *arguments, **changes)


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-6", 3e-6), ("7", 7), ("-0.5", -0.5), ("true", True), ("1e", "1e"), ("{decay: 0.9}", {"decay": 0.9})],
)
def test_values_of_a_command_line_have_the_types_of_a_file(text: str, value: Any) -> None:
    """YAML reads 3e-6 as text, and a text is no learning rate."""
    assert as_typed(text, from_shell=True) == value and type(as_typed(text, from_shell=True)) is type(value)


def test_the_commands_and_the_file_of_the_guide_make_the_runs_that_it_says(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text().split("\n## Sweeps\n")[1]
    (block,) = re.findall(r"```sh\n(.*?)```", guide, flags=re.S)
    commands = [shlex.split(line, comments=True) for line in block.splitlines() if "opsd sweep" in line]
    plans = [plan(tmp_path, *command[3:]) for command in commands]
    assert [len(each.runs) for each in plans] == [27, 27, 18]
    later = plans[2].later_runs({arm: {"learning_rate": 1e-5} for arm in plans[2].arms})
    assert (len(plans[2].first_runs), len(later)) == (6, 4)
    of_file = plan(tmp_path, **yaml.safe_load(re.findall(r"```yaml\n(.*?)```", guide, flags=re.S)[0]))
    assert len(of_file.runs) == 27 and len(of_file.first_runs) == 9
    assert "sft-lr1e-5-seed0" in [run.name for run in of_file.runs] and "runs/sweep/sft-lr1e-5-seed0" in guide
