"""What a user reads who typed something wrong: the rule, the reason and the way out, and no traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_llama, make_rows, make_tokenizer
from datasets import Dataset
from helpers import make_args
from peft import LoraConfig

from opsd import OPSDTrainer
from opsd.cli import main
from opsd.errors import ConfigError, DataError

ROWS = {
    "cells by semicolon": (
        "rows.csv",
        "prompt;answer\n1 + 1?;2\n",
        "seem to be separated by ';', and opsd reads commas",
    ),
    "ShareGPT": (
        "rows.jsonl",
        json.dumps({"conversations": [{"from": "human", "value": "Hi"}], "answer": "2"}),
        "'conversations' (ShareGPT), whose turns are {from, value}, and opsd reads 'messages'",
    ),
    "ids as prompt": ("rows.jsonl", '{"prompt": [5, 6], "answer": "2"}', "reads texts or messages, not token ids"),
    "a key twice": (
        "rows.jsonl",
        '{"prompt": "a", "answer": "1", "answer": "2"}',
        "the key 'answer' stands twice",
    ),
    "another name": (
        "rows.jsonl",
        '{"question": "1 + 1?", "answer": "2"}',
        "a run file columns: {prompt: question}",
    ),
}
LOOKED_IN = "Relative paths start in the folder that opsd is called in: looked for /"
SETTINGS = {
    "a target that is no layer": (
        {"use_peft": True, "lora_target_modules": ["q_projj"]},
        "the model has no such layer",
    ),
    "an adapter of rank 0": ({"use_peft": True, "lora_r": 0}, "lora_r must be 1 or more, and is 0"),
    "noise in the embeddings": ({"neftune_noise_alpha": 5.0}, "would not be the one that sampled"),
    "a hub without connection": ({"model_name_or_path": "someone/nothing"}, "could not be had from the hub"),
    "a path of no file": (
        {"dataset_name": "data/none.jsonl"},
        LOOKED_IN,
    ),
    "a path of no model": ({"model_name_or_path": "models/none/x"}, LOOKED_IN),
    "a path of no template": (
        {"context": "my/none.jinja"},
        LOOKED_IN,
    ),
    "a path of no recipe": ({"teacher": "my/none.yaml"}, LOOKED_IN),
}


@pytest.fixture
def run_yaml(tmp_path: Path, llama_folder: str) -> Path:
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in make_rows(4)))
    settings = {
        "model_name_or_path": llama_folder, "dataset_name": str(tmp_path / "rows.jsonl"), "context": "answer_only",
        "output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 2, "max_completion_length": 3,
        "max_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "run.yaml"


def errors_of(capsys: pytest.CaptureFixture[str], run_yaml: Path, changes: dict[str, Any]) -> str:
    run_yaml.write_text(yaml.safe_dump({**yaml.safe_load(run_yaml.read_text()), **changes}))
    assert main(["train", str(run_yaml), "--skip-doctor"]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("case", ROWS)
def test_rows_of_another_form_are_refused_with_their_form(case: str, run_yaml: Path, capsys: Any) -> None:
    name, content, message = ROWS[case]
    (run_yaml.parent / name).write_text(content)
    assert message in errors_of(capsys, run_yaml, {"dataset_name": str(run_yaml.parent / name)})


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_lead_nowhere_are_refused_without_a_traceback(case: str, run_yaml: Path, capsys: Any) -> None:
    changes, message = SETTINGS[case]
    assert message in errors_of(capsys, run_yaml, changes)


def test_a_target_module_alone_is_found(run_yaml: Path) -> None:
    """TRL writes a list of one as text, which peft reads as a pattern of whole names."""
    run_yaml.write_text(
        yaml.safe_dump({**yaml.safe_load(run_yaml.read_text()), "use_peft": True, "lora_target_modules": ["q_proj"]})
    )
    assert main(["train", str(run_yaml), "--skip-doctor"]) == 0


def test_a_reward_function_that_reads_a_column_which_is_not_there_is_refused_before_step_one(tmp_path: Path) -> None:
    def graded(completions: list[Any], level: list[int], **columns: Any) -> list[float]:
        return [1.0 for _ in completions]

    with pytest.raises(
        DataError, match=r"reward function 'graded' needs the column 'level'(?s:.)*give its parameter level"
    ):
        _trainer(tmp_path, reward_funcs=graded)


def test_a_reward_function_gets_the_columns_that_it_names(tmp_path: Path) -> None:
    """One without **kwargs was called with every column, a TypeError."""
    seen = []

    def graded(completions: list[Any], answer: list[str]) -> list[float]:
        seen.extend(answer)
        return [1.0 for _ in completions]

    _trainer(tmp_path, reward_funcs=graded).train()
    assert set(seen) <= {row["answer"] for row in make_rows()} and seen


@pytest.mark.parametrize("ranks", [{"r": 0}, {"r": 8, "rank_pattern": {"q_proj": 0}}], ids=str)
def test_an_adapter_without_a_rank_is_refused_before_a_model_loads(tmp_path: Path, ranks: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="the rank of an adapter, r, must be 1 or more"):
        _trainer(tmp_path, peft_config=LoraConfig(target_modules="all-linear", **ranks))


def test_a_student_in_float64_trains(tmp_path: Path) -> None:
    """Its logits were rounded to float32 before they were compared with ours, and their head was said to be unknown."""
    trainer = _trainer(tmp_path, model=make_llama().double())
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float64}


def _trainer(folder: Path, model: Any = None, **arguments: Any) -> OPSDTrainer:
    return OPSDTrainer(
        model or make_llama(),
        {"strategy": "same_checkpoint", "context": "answer_only"},
        args=make_args(folder, max_steps=1),
        train_dataset=Dataset.from_list(make_rows()),
        processing_class=make_tokenizer(),
        **arguments,
    )


# ---- a disk that takes nothing more ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "file", "printed"),
    [
        ("doctor {run} --only prompts --json {file}", "report.json", "contain all of their messages"),
        ("eval {model} --dataset_name {rows} --grader exact --max_new_tokens 2 --output {file}", "a.json", "accuracy"),
        ("cp answer_only {folder}", "answer_only.jinja", ""),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_written_costs_nothing_that_was_measured(
    command: str, file: str, printed: str, run_yaml: Path, llama_folder: str, capsys: Any
) -> None:
    full = run_yaml.parent / "full"
    full.mkdir()
    (full / f".{file}").symlink_to("/dev/full")  # where the file is written before it gets its name
    places = {"run": run_yaml, "rows": run_yaml.parent / "rows.jsonl", "folder": full, "file": full / file}
    assert main(command.format(model=llama_folder, **places).split()) == 2
    output = capsys.readouterr()
    assert f"{full / file} could not be written: No space left on device" in output.err and printed in output.out
    assert not list(full.iterdir()), "no part of it is left"
