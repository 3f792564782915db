"""What rows must have is stated by those who read them, checked in one pass, and reported in one form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows
from datasets import Dataset
from helpers import make_trainer

from opsd import SameCheckpointTeacher
from opsd.data.needs import Need, RowCheck, check_columns
from opsd.data.prepare import prepare_rows
from opsd.errors import DataError

ANSWER = Need(("answer",), "template 'a'", "Nothing is shown.", "pick another: `opsd templates --columns {columns}`")
RATE = Need(("rate",), "a weight", "Rows weigh by it.", find_problem=lambda row: None if row.get("rate") else "is 0")


def problems_of(rows: list[dict[str, Any]], *needs: Need) -> str:
    check = RowCheck(needs, "eval")
    for number, row in enumerate(rows):
        check.add(row, number)
    with pytest.raises(DataError) as error:
        check.finish(list(rows[0]))
    return str(error.value)


def test_empty_values_are_counted_and_the_first_five_rows_numbered() -> None:
    rows = [{"answer": answer} for answer in ["x", None, " \n", [], False, None, "", {}, None, 0]]
    assert problems_of(rows, ANSWER) == (
        "template 'a' needs the column 'answer', which is empty in 7 rows of the eval dataset: 1, 2, 3, 5, 6 and 2 "
        "more.\nNothing is shown.\nFill these rows, drop them, or pick another: `opsd templates --columns answer`."
    )


def test_all_problems_are_reported_at_once() -> None:
    message = problems_of([{"answer": "", "rate": 1}, {"answer": "x", "rate": 0}], ANSWER, RATE)
    assert "'answer', which is empty in 1 row of the eval dataset: 0; a weight needs the column 'rate'" in message
    assert "which is 0 in 1 row of the eval dataset: 1." in message
    assert "\nNothing is shown. Rows weigh by it.\n" in message
    with pytest.raises(DataError) as error:
        check_columns(["prompt", "anwser"], [ANSWER, RATE, ANSWER])
    assert str(error.value).startswith(
        "template 'a' needs the column 'answer'; a weight needs the column 'rate', and the train dataset has: prompt, "
        "anwser. Did you mean 'anwser'?\nNothing is shown. Rows weigh by it.\nRename a column, or pick another"
    )


def test_a_need_of_some_rows_asks_the_others_for_nothing() -> None:
    odd = ANSWER.only_where(lambda row: row["n"] % 2 == 1).only_where(lambda row: row["n"] > 1)
    assert ": 3, 5." in problems_of([{"n": n, "answer": ""} for n in range(6)], odd)


def test_a_column_that_rows_may_leave_empty_must_be_there() -> None:
    need = Need(("answer",), "grader 'exact'", "It is compared.", may_be_empty=True)
    rows = Dataset.from_list([{"prompt": "1?", "answer": None}])
    assert prepare_rows(rows, needs=[need]) is rows
    with pytest.raises(DataError, match="grader 'exact' needs the column 'answer'"):
        prepare_rows(rows.remove_columns("answer"), needs=[need])


def test_made_columns_are_checked_like_others() -> None:
    """A blank hint was taken over from another row as it stood."""
    imitated = Need(("completion",), "a control", "It is trained on.").only_where(lambda row: row["prompt"] != "1?")
    rows = Dataset.from_list([{"prompt": f"{n}?", "hint": " " * n, "solution": " " * (n + 1)} for n in range(2)])
    with pytest.raises(DataError, match="'completion', which is empty in 1 row of the train dataset: 0"):
        prepare_rows(rows, needs=[imitated], imitates=True)
    with pytest.raises(DataError, match="no other row has a 'hint' that differs from row 0's"):
        prepare_rows(rows, reads=["other_hint"])
    need = Need(("other_hint",), "template 'a'", "Nothing is shown.")
    full = Dataset.from_list([{"prompt": f"{n}?", "hint": f"{n}"} for n in range(2)])
    assert prepare_rows(full, reads=["other_hint"], needs=[need])["other_hint"] == ["1", "0"]


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({"lmbda": 0.5}, {}, r"lmbda: 0\.5 needs the column 'completion' or 'completion_ids', and the train dataset"),
        ({"lmbda": 0.5}, {"completion": ""}, "'completion_ids', which is empty in 2 rows of the train dataset: 3, 4"),
        ({"lmbda": 0.5}, {"completion": [{"role": "user", "content": "x"}]}, "cannot be used .*assistant turn.*: 3, 4"),
        ({"reward_funcs": "exact"}, {"answer": ...}, "grader 'exact' needs the column 'answer'"),
        ({"control": "sft"}, {"answer": None, "solution": ...}, "is empty in 2 rows of the train dataset: 3, 4"),
    ],
)
def test_rows_that_a_setting_cannot_use_are_refused_before_a_model_loads(
    tmp_path: Path, settings: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    """A change goes into rows 3 and 4; "..." drops a column."""
    rows = make_rows()
    for column, value in change.items():
        for number, row in enumerate(rows):
            other = [{"role": "assistant", "content": "x"}] if isinstance(value, list) else "x"
            row[column] = value if number in (3, 4) else row.get(column, other)
            if value is ...:
                del row[column]
    teacher = SameCheckpointTeacher()
    if "answer" not in change:
        teacher = SameCheckpointTeacher(context="answer_only")
    with pytest.raises(DataError, match=message):
        make_trainer(tmp_path, teacher, "no/such-model", Dataset.from_list(rows), **settings)
