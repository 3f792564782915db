"""Other systems' columns under our names, the student's system turn, and columns that only controls need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows
from datasets import Dataset, IterableDataset
from helpers import make_trainer

from opsd import SameCheckpointTeacher, import_columns
from opsd.data.columns import FORMATS
from opsd.data.prepare import made_columns, prepare_rows
from opsd.data.rows import row_columns
from opsd.errors import ConfigError, DataError

ASKED = [{"role": "user", "content": "What is 1 + 1?"}]
TALK = [{"role": "user", "content": "What is 1 + 0?"}, {"role": "assistant", "content": "It is 1."}]

# a row as each system has it, and what it becomes
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "trl": ({"prompt": ASKED, "privileged_context": "Two."}, {"prompt": ASKED, "privileged_context": "Two."}),
    "ms-swift": (
        {"messages": [*ASKED, {"role": "assistant", "content": "2"}], "teacher_prompt": "What is 1 + 1? (2)"},
        {"prompt": ASKED, "teacher_prompt": "What is 1 + 1? (2)", "completion": "2"},
    ),
    "verl": (
        {
            "data_source": "openai/gsm8k",
            "prompt": ASKED,
            "reward_model": {"style": "rule", "ground_truth": "2"},
            "extra_info": {"split": "train", "index": 0, "answer": "1 + 1 = 2 #### 2"},
        },
        {"prompt": ASKED, "answer": "2", "solution": "1 + 1 = 2 #### 2"},
    ),
    "prime-rl": (
        {
            "question": "What is 1 + 1?",
            "answer": "2",
            "info": json.dumps({"demonstration": "It is 2."}),
            "task": "sums",
        },
        {"prompt": ASKED, "answer": "2", "demonstration": "It is 2."},
    ),
}


@pytest.mark.parametrize("stream", [False, True], ids=["table", "stream"])
@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_each_system_are_read_under_our_names(name: str, stream: bool, tmp_path: Path) -> None:
    theirs, ours = ROWS[name]
    table = Dataset.from_list([theirs])
    if name == "verl":  # as it comes: a parquet file with nested columns
        table.to_parquet(tmp_path / "rows.parquet")
        table = Dataset.from_parquet(str(tmp_path / "rows.parquet"))
    dataset = prepare_rows(import_columns(table.to_iterable_dataset() if stream else table, name))
    row = next(iter(dataset))
    assert {key: row[key] for key in ours} == ours


def test_a_mapping_renames_columns_and_reaches_into_nested_ones() -> None:
    table = Dataset.from_list([{"q": "1 + 1?", "gold": {"text": "2"}, "hint": "count"}])
    row = import_columns(table, {"prompt": "q", "answer": "gold.text"})[0]
    assert row == {"prompt": "1 + 1?", "answer": "2", "gold": {"text": "2"}, "hint": "count"}
    swap = Dataset.from_list([{"a": "x", "b": "y"}])
    for rows in (swap, swap.to_iterable_dataset()):
        assert next(iter(import_columns(rows, {"a": "b", "b": "a"}))) == {"a": "y", "b": "x"}
    assert import_columns(table, None) is table


@pytest.mark.parametrize(
    ("columns", "error", "problem"),
    [
        ("verll", ConfigError, "'verll'. Did you mean 'verl'"),
        ("verl", DataError, "'answer' under 'reward_model.ground_truth'.*They have: prompt, solutions"),
        ({"solution": "solution"}, DataError, "Did you mean 'solutions'"),
    ],
)
def test_columns_that_are_not_there_are_named(columns: Any, error: type[Exception], problem: str) -> None:
    with pytest.raises(error, match=problem):
        import_columns(Dataset.from_list([{"prompt": "a", "solutions": "b"}]), columns)


# ---------------------------------------------------------------- the student's system turn


@pytest.mark.parametrize("stream", [False, True], ids=["table", "stream"])
def test_the_students_system_turn_goes_to_rows_that_have_none(stream: bool) -> None:
    own = [{"role": "system", "content": "Own."}, *ASKED]
    rows: Any = Dataset.from_list([{"prompt": ASKED}, {"prompt": own}])
    prepared = prepare_rows(rows.to_iterable_dataset() if stream else rows, system_prompt="Be kind.")
    assert [row["prompt"] for row in prepared] == [[{"role": "system", "content": "Be kind."}, *ASKED], own]
    only_own = rows.select([1])
    assert prepare_rows(only_own, system_prompt="Be kind.") is only_own


def test_each_side_has_its_own_system_turn(tmp_path: Path) -> None:
    teacher = SameCheckpointTeacher(context={"template": "answer_only", "system": "You know the answer."})
    trainer = make_trainer(tmp_path, teacher, student_system_prompt="You are a student.")
    row = trainer.train_dataset[0]
    decode = trainer.student.tokenizer.decode
    student, told = decode(trainer.student.renderer.ids(row["prompt"])), decode(teacher.prompts.ids(row))
    assert "<|im_start|>system\nYou are a student.<|im_end|>" in student
    assert "<|im_start|>system\nYou know the answer.<|im_end|>" in told and "You are a student" not in told


def test_a_system_turn_for_plain_text_is_refused(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"prompt": "1 + 1 = ", "answer": "2"}] * 4)
    with pytest.raises(DataError, match="plain text, which has none"):
        make_trainer(tmp_path, rows=rows, student_system_prompt="Be kind.")


# ---------------------------------------------------------------- what controls need


def test_wrong_answers_are_near_misses_of_numbers_and_other_rows_answers_of_words() -> None:
    rows = make_rows(30)
    made = prepare_rows(Dataset.from_list(rows), reads=["wrong_answer", "other_solution"])
    assert set(row_columns(made)) == {*rows[0], "wrong_answer", "other_solution"}
    for row in made:
        assert 0 < abs(int(row["wrong_answer"]) - int(row["answer"])) < 10
        assert row["other_solution"] != row["solution"]
        assert row["other_solution"] in {other["solution"] for other in rows}
    words = [{"prompt": f"{i}?", "answer": word} for i, word in enumerate(["Paris", "Rome", "Oslo"])]
    again = prepare_rows(Dataset.from_list(words), reads=["wrong_answer"])
    assert all(
        row["wrong_answer"] != row["answer"] and row["wrong_answer"] in ("Paris", "Rome", "Oslo") for row in again
    )


def test_a_column_of_that_name_wins_and_nothing_is_made_unasked() -> None:
    assert list(made_columns(["wrong_answer", "other_answer", "hint"], ["prompt", "answer"])) == [
        "other_answer",
        "wrong_answer",
    ]
    assert made_columns(["wrong_answer", "other_hint"], ["prompt", "answer", "wrong_answer"]) == {}
    assert made_columns(["answer"], ["prompt", "answer"]) == {}


def test_controls_need_rows_that_differ_and_that_can_be_looked_up() -> None:
    alike = Dataset.from_list([{"prompt": f"{i}?", "answer": "yes"} for i in range(4)])
    with pytest.raises(DataError, match="no other row has a 'answer' that differs"):
        prepare_rows(alike, reads=["other_answer"])
    stream: IterableDataset = Dataset.from_list(make_rows(4)).to_iterable_dataset()
    with pytest.raises(DataError, match="a stream has one row at a time"):
        prepare_rows(stream, reads=["other_answer"])


def test_a_run_can_be_told_other_rows_answers(tmp_path: Path) -> None:
    teacher = SameCheckpointTeacher(context={"template": "answer_only", "fields": {"answer": "other_answer"}})
    trainer = make_trainer(tmp_path, teacher)
    row = trainer.train_dataset[3]
    assert f"The correct answer is {row['other_answer']}." in trainer.student.tokenizer.decode(teacher.prompts.ids(row))
    assert row["other_answer"] != row["answer"]


def test_a_near_miss_needs_no_other_row() -> None:
    for rows in (make_rows(1), [{**row, "answer": "7"} for row in make_rows(4)]):
        made = prepare_rows(Dataset.from_list(rows), reads=["wrong_answer"])
        assert all(row["wrong_answer"] != row["answer"] for row in made)


def test_a_column_that_is_empty_in_the_first_row_is_found() -> None:
    def row(demo: str | None) -> dict[str, Any]:
        return {"question": "1?", "answer": "1", "info": {"demonstration": demo}}

    table = import_columns(Dataset.from_list([row(None), row("It is 1.")]), "prime-rl")
    assert [each["demonstration"] for each in table] == [None, "It is 1."]
