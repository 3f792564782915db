"""Rows whose prompts leave no room for a completion: an error, or dropped on request and counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import make_llama, make_rows, make_tokenizer
from datasets import Dataset
from helpers import make_trainer

from opsd import PrivilegedContext, SameCheckpointTeacher, SiblingTeacher
from opsd.errors import DataError

LONG = 9  # the row that does not fit


def rows(column: str) -> Dataset:
    """Twelve rows, of which one has a long question or a long answer, behind the rows that are always checked."""
    made = make_rows(12)
    words = " ".join(["nineteen"] * 300)
    if column == "prompt":
        made[LONG]["prompt"] = [{"role": "user", "content": words}]
    else:
        made[LONG]["answer"] = words
    return Dataset.from_list(made)


def short_model() -> Any:
    model = make_llama()
    model.config.max_position_embeddings = 200
    return model


def trainer(folder: Path, column: str, **settings: Any) -> Any:
    teacher = SameCheckpointTeacher(context="answer_only")
    return make_trainer(folder, teacher, short_model(), rows=rows(column), max_steps=3, **settings)


@pytest.mark.parametrize("column", ["prompt", "answer"])
def test_long_rows_are_dropped_on_request_counted_and_noted(tmp_path: Path, column: str, capsys: Any) -> None:
    """The student's prompt is too long, or only the teacher's with its context."""
    kept = trainer(tmp_path / "dropped", column, drop_long_rows=True)
    assert "dropped     1 of 12 rows" in capsys.readouterr().out
    questions = [row["prompt"] for row in rows(column)]
    assert [row["prompt"] for row in kept.train_dataset] == [q for n, q in enumerate(questions) if n != LONG]
    kept.train()
    assert (kept.run_card["rows"], kept.run_card["rows_dropped"]) == (11, 1)


@pytest.mark.parametrize("column", ["prompt", "answer"])
def test_without_the_request_a_long_row_is_an_error(tmp_path: Path, column: str) -> None:
    with pytest.raises(DataError, match="more than the 200 tokens of the model's context"):
        trainer(tmp_path, column).train()


@pytest.mark.parametrize("truncate", [None, "hint"])
def test_rows_over_the_limit_of_their_context_are_dropped_too(tmp_path: Path, truncate: str | None) -> None:
    """Nothing of a row may be cut, or what may be cut is not enough."""
    made = Dataset.from_list([{**row, "hint": "think twice"} for row in rows("answer")])
    source = '{% extends "base.jinja" %}{% block user %}{{ prompt }} {{ hint }} {{ answer }}{% endblock %}'
    context = PrivilegedContext.from_string(source, max_prompt_tokens=150, truncate=truncate)
    with pytest.raises(DataError, match=f"(?s)row {LONG}: .*drop_long_rows"):
        make_trainer(tmp_path / "error", SameCheckpointTeacher(context=context), rows=made)
    kept = make_trainer(tmp_path, SameCheckpointTeacher(context=context), rows=made, drop_long_rows=True)
    assert len(kept.train_dataset) == 11


def test_a_teacher_without_a_context_may_be_shorter_than_the_student(tmp_path: Path) -> None:
    sibling = SiblingTeacher(short_model(), tokenizer=make_tokenizer())
    with pytest.raises(DataError, match=f"row {LONG}: the teacher's prompt"):
        make_trainer(tmp_path / "error", sibling, rows=rows("prompt"))
    assert len(make_trainer(tmp_path, sibling, rows=rows("prompt"), drop_long_rows=True).train_dataset) == 11


def test_nothing_is_dropped_where_all_fit(tmp_path: Path, capsys: Any) -> None:
    kept = make_trainer(tmp_path, SameCheckpointTeacher(context="answer_only"), drop_long_rows=True)
    assert "dropped     0 of 12 rows" in capsys.readouterr().out and len(kept.train_dataset) == 12


def test_dropping_every_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"drops all 12 rows.*lower max_completion_length, or shorten"):
        trainer(tmp_path, "prompt", drop_long_rows=True, max_completion_length=199)


def test_rows_of_a_stream_cannot_be_dropped_and_counted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="these rows are a stream"):
        make_trainer(
            tmp_path,
            SameCheckpointTeacher(context="answer_only"),
            rows=Dataset.from_list(make_rows(12)).to_iterable_dataset(),
            drop_long_rows=True,
        )
