"""`opsd score`: any teachers and contexts over rows and rollouts, as page, Parquet and in a terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import make_llama, make_rows, make_tokenizer
from outline import HOSTILE, Outline

from opsd.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_llama(0).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    given = [{**row, **({"completion": "It is 19."} if number == 1 else {})} for number, row in enumerate(make_rows(3))]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return path


def test_teachers_and_contexts_score_rows_and_rollouts(model: Path, rows: Path, tmp_path: Path, capsys: Any) -> None:
    files = [str(tmp_path / "s.html"), str(tmp_path / "s.parquet")]
    command = ["score", str(rows), "--model_name_or_path", str(model), "--context", "answer_only", "none", "--row", "0"]
    command += ["1", "--max_completion_length", "6", "--html", files[0], "-o", files[1], "--terminal"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "row 1 (the row's completion) · teacher · context: answer_only" in out and "teacher: " in out
    table = pq.read_table(files[1]).to_pylist()
    assert [(each["row"], each["teacher"].rpartition(" ")[2]) for each in table] == [
        (0, "answer_only"), (1, "answer_only"), (0, "none"), (1, "none")
    ]  # fmt: skip
    assert table[1]["text"].startswith("It is 19.") and not table[1]["on_policy"] and table[0]["on_policy"]
    assert max(map(abs, table[2]["divergence"])) < 1e-5 < max(table[0]["divergence"])  # without a context it is itself
    assert all(each["student_rank"] >= 1 and len(each["teacher_tokens"]) == 5 for each in table[0]["alternatives"])
    assert Outline(Path(files[0]).read_text("utf-8")).outside == []


def test_a_row_that_is_not_there_is_named(model: Path, rows: Path, capsys: Any) -> None:
    assert main(["score", str(rows), "--model_name_or_path", str(model), "--row", "7"]) == 2
    assert "the dataset has rows 0 to 2" in capsys.readouterr().err


def test_a_control_is_refused_by_score(model: Path, rows: Path, capsys: Any) -> None:
    assert main(["score", str(rows), "--model_name_or_path", str(model), "--control", "sft"]) == 2
    assert "opsd score trains nothing" in capsys.readouterr().err


def test_a_terminal_obeys_no_text_of_a_dataset(model: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"prompt": [{"role": "user", "content": f"What is it? {HOSTILE}"}], "answer": HOSTILE, "completion": HOSTILE}
    path.write_text("".join(json.dumps({**row, "number": number}) + "\n" for number in range(4)))
    given = ["--model_name_or_path", str(model)]
    assert main(["show", "--dataset_name", str(path), *given, "--context", "answer_only"]) == 0
    assert main(["score", str(path), *given, "--context", "answer_only"]) == 0
    rows = ["--dataset_name", str(path), "--output_dir", str(tmp_path / "run"), "--max_completion_length", "4"]
    main(["doctor", *given, *rows, "--context", "answer_only", "--rows", "2", "--verbose"])
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\u202e" not in out and "\\x1b[31m" in out
