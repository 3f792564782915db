"""`opsd eval`: on models, adapters, runs, checkpoints and hub ids; what it prints, writes and refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_llama, make_rows, make_tokenizer
from helpers import LORA, move
from peft import LoraConfig, get_peft_model

from opsd.cli import main
from opsd.errors import CheckpointError
from opsd.evaluation import EvaluationResult
from opsd.training.checkpoints import model_folder


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "160")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows(6)))
    return str(path)


def graded(model: str, rows: str, *more: str) -> EvaluationResult:
    output = Path(rows).with_name("result.json")
    options = ["--dataset_name", rows, "--grader", "exact", "--max_new_tokens", "5", "--output", str(output)]
    assert main(["eval", model, *options, *more]) == 0
    return EvaluationResult.load(output)


def save(model: torch.nn.Module, folder: Path) -> str:
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def make_adapter(base: str) -> torch.nn.Module:
    model = make_llama(0)
    model.config._name_or_path = base
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(**LORA))
    adapted.peft_config["default"].base_model_name_or_path = base
    move(adapted, 0.2)
    return adapted


def test_samples_give_their_metrics_with_intervals_and_the_grader(llama_folder: str, rows: str, capsys) -> None:
    result = graded(llama_folder, rows, "--samples", "3", "--temperature", "0.7", "--seed", "5")
    out = capsys.readouterr().out
    assert (result.samples, result.temperature, result.grader, result.n) == (3, 0.7, "exact", 6)
    for metric in ("accuracy", "avg@3", "pass@3", "maj@3", "format", "length", "truncated"):
        assert metric in out
    assert "grader: exact" in out and "3 samples at temperature 0.7" in out and "95 % intervals over 6 questions" in out
    assert result == graded(llama_folder, rows, "--samples", "3", "--temperature", "0.7", "--seed", "5")


def test_only_the_metrics_that_were_asked_for_are_shown(llama_folder: str, rows: str, capsys) -> None:
    graded(llama_folder, rows, "--samples", "2", "--metrics", "pass@2, length")
    out = capsys.readouterr().out
    assert "pass@2" in out and "length" in out and "maj@2" not in out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--metrics", "pass@4", "--samples", "2"], "needs 4 sampled answers per question; --samples is 2"),
        (["--metrics", "acuracy"], "Did you mean 'accuracy'"),
        (["--samples", "-1"], "samples is the number of sampled answers"),
        (["--limit", "-1"], "limit must be a whole number"),
        (["--context", '{"template": "answer_only", "revel": 0.5}'], "Did you mean 'reveal'"),
    ],
)
def test_what_cannot_be_measured_is_refused(llama_folder: str, rows: str, more: list[str], said: str, capsys) -> None:
    assert (
        main(["eval", llama_folder, "--dataset_name", rows, "--grader", "exact", "--max_new_tokens", "2", *more]) == 2
    )
    assert said in capsys.readouterr().err


def test_questions_and_grader_are_needed(llama_folder: str, rows: str, capsys) -> None:
    assert main(["eval", llama_folder, "--dataset_name", rows]) == 2
    assert "needs --grader" in capsys.readouterr().err
    assert main(["eval", llama_folder, "--grader", "exact"]) == 2
    assert "needs --dataset_name" in capsys.readouterr().err


def test_the_harness_is_run_by_its_own_command(llama_folder: str, capsys) -> None:
    assert main(["eval", llama_folder, "--harness", "gsm8k"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "lm_eval --model hf --model_args pretrained=RUN" in said and "pretrained=BASE,peft=RUN" in said


def test_a_context_may_be_a_mapping(llama_folder: str, rows: str) -> None:
    whole = graded(llama_folder, rows, "--context", "worked_solution")
    part = graded(llama_folder, rows, "--context", '{"template": "worked_solution", "reveal": 0.3}')
    assert whole.context == part.context == "worked_solution" and whole.texts != part.texts


def test_an_answer_that_cannot_be_graded_is_said_to_count_as_wrong(llama_folder: str, tmp_path: Path, capsys) -> None:
    broken = [{**row, "answer": None if number == 2 else row["answer"]} for number, row in enumerate(make_rows(4))]
    path = tmp_path / "broken.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in broken))
    with pytest.warns(UserWarning, match="row 2"):
        result = graded(llama_folder, str(path))
    assert result.ungraded == [2]
    assert "1 question(s) have an answer that the grader failed on" in " ".join(capsys.readouterr().out.split())


def test_an_adapter_answers_as_its_merged_model_does(llama_folder: str, rows: str, tmp_path: Path) -> None:
    adapter = make_adapter(llama_folder)
    own = graded(save(adapter, tmp_path / "adapter"), rows)
    merged = graded(save(adapter.merge_and_unload(), tmp_path / "merged"), rows)
    assert own.texts == merged.texts != graded(llama_folder, rows).texts


@pytest.fixture
def stopped(llama_folder: str, rows: str, tmp_path: Path) -> Path:
    """A run with two checkpoints and no model of its own."""
    folder = tmp_path / "run"
    settings = ["--model_name_or_path", llama_folder, "--dataset_name", rows, "--context", "answer_only"]
    small = (
        "--max_steps 2 --save_steps 1 --per_device_train_batch_size 2 --max_completion_length 4 --learning_rate 0.03"
    )
    assert main(["train", *settings, *small.split(), "--output_dir", str(folder), "--use_cpu", "--skip-doctor"]) == 0
    (folder / "model.safetensors").unlink()
    return folder


def test_a_run_without_a_model_stands_for_its_newest_whole_checkpoint(stopped: Path, rows: str) -> None:
    one, two = (graded(str(stopped / f"checkpoint-{step}"), rows) for step in (1, 2))
    assert one.texts != two.texts and graded(str(stopped), rows).texts == two.texts
    (stopped / "checkpoint-2" / "optimizer.pt").unlink()
    assert graded(str(stopped), rows).texts == one.texts
    (stopped / "checkpoint-1" / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        model_folder(str(stopped))


def test_a_run_is_asked_under_the_system_turn_it_was_trained_with(stopped: Path, rows: str) -> None:
    checkpoint = str(stopped / "checkpoint-2")
    plain = graded(checkpoint, rows)
    card = json.loads((stopped / "run_card.json").read_text())
    card["settings"]["student_system_prompt"] = "Answer in one word, and in capitals."
    (stopped / "run_card.json").write_text(json.dumps(card))
    assert graded(checkpoint, rows).texts != plain.texts


@pytest.mark.slow
def test_hub_ids_of_models_and_of_adapters_are_evaluated(llama_folder: str, rows: str, tmp_path: Path) -> None:
    """From a cache as the hub fills it, without a network."""
    adapter = make_adapter("some/model")
    for name, model in (("model", make_llama(0)), ("adapter", adapter)):
        snapshot = tmp_path / "hub" / f"models--some--{name}" / "snapshots" / ("0" * 40)
        save(model, snapshot)
        refs = snapshot.parents[1] / "refs"
        refs.mkdir()
        (refs / "main").write_text("0" * 40)
        # The hub's own mark of a file that a repository has not, which a cache keeps as well.
        missing = snapshot.parents[1] / ".no_exist" / ("0" * 40)
        missing.mkdir(parents=True)
        for file in {"config.json", "adapter_config.json"} - {path.name for path in snapshot.iterdir()}:
            (missing / file).touch()
    texts = {}
    for name in ("model", "adapter"):
        output = tmp_path / f"{name}.json"
        options = ["--dataset_name", rows, "--grader", "exact", "--max_new_tokens", "5", "--output", str(output)]
        environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "opsd", "eval", f"some/{name}", *options]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        texts[name] = EvaluationResult.load(output).texts
    assert texts["model"] == graded(llama_folder, rows).texts
    adapter.peft_config["default"].base_model_name_or_path = llama_folder
    assert texts["adapter"] == graded(save(adapter, tmp_path / "local"), rows).texts != texts["model"]
