"""Preparing a run passes over each dataset at most three times; what is counted are rows read from Arrow tables.

Every reader of a map-style dataset (iteration, batches, columns, `map` and single rows) gets its rows from one of
two functions of `datasets`: `table_iter` or `query_table`. Rows are counted there. A look at the first few rows is
no pass: passes are rows read, divided by the rows of the dataset, rounded down.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows
from datasets import Dataset, arrow_dataset
from helpers import make_trainer

from opsd import RoutedTeacher, SameCheckpointTeacher
from opsd.training.run_card import data_digests

TRAIN, EVAL, TEST, SPLIT = 64, 48, 40, 56
PLAN = {"grader": "last_number"}


class RowsRead:
    """Counts rows read from datasets, by the number of rows that a dataset has."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.rows: Counter[int] = Counter()
        table_iter, query_table = arrow_dataset.table_iter, arrow_dataset.query_table

        def counted_iter(table: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
            for part in table_iter(table, *args, **kwargs):
                self.rows[table.num_rows] += part.num_rows
                yield part

        def counted_query(table: Any, key: Any, indices: Any = None) -> Any:
            part = query_table(table, key, indices=indices)
            self.rows[(indices or table).num_rows] += part.num_rows
            return part

        patch.setattr(arrow_dataset, "table_iter", counted_iter)
        patch.setattr(arrow_dataset, "query_table", counted_query)

    def passes(self, size: int) -> int:
        return self.rows[size] // size


@pytest.fixture
def rows_read(monkeypatch: pytest.MonkeyPatch) -> RowsRead:
    return RowsRead(monkeypatch)


def dataset(size: int, start: int = 0, **columns: Callable[[int], Any]) -> Dataset:
    rows = [
        {**row, **{name: value(number) for name, value in columns.items()}}
        for number, row in enumerate(make_rows(start + size)[start:])
    ]
    return Dataset.from_list(rows)


def plain(size: int) -> Dataset:
    return Dataset.from_list([{"prompt": f"{i} + 1 = ", "answer": str(i + 1)} for i in range(size)])


def parts(number: int) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": f"What is {number} + 1?"}]}]


def routed() -> RoutedTeacher:
    schedule = {"levels": ["worked_solution", "answer_only"], "until_step": {"worked_solution": 2}}
    return RoutedTeacher(
        "domain", {"odd": SameCheckpointTeacher(context=schedule), "even": SameCheckpointTeacher(context="answer_only")}
    )


def known() -> SameCheckpointTeacher:
    return SameCheckpointTeacher(context="answer_only")


# What is prepared, how often each dataset is read, and the trainer's arguments. Checking is a pass, rendering the
# training prompts before step 1 is one, and a dataset that changes is read once more.
CASES: dict[str, tuple[dict[int, int], Callable[[], dict[str, Any]]]] = {
    "plain prompts and a template": ({TRAIN: 2}, lambda: {"teacher": known(), "rows": plain(TRAIN)}),
    "messages and the student's system turn": (
        {TRAIN: 3},
        lambda: {
            "teacher": known(),
            "rows": dataset(TRAIN, prompt=parts),
            "student_system_prompt": "Be kind.",
        },
    ),
    "a control with derived columns": (
        {TRAIN: 3},
        lambda: {
            "teacher": known(),
            "rows": dataset(TRAIN, prompt=parts),
            "control": "wrong-context",
            "student_system_prompt": "Be kind.",
        },
    ),
    "derived columns of rows that are a selection": (
        {TRAIN: 3},
        lambda: {
            "teacher": known(),
            "rows": dataset(TRAIN + 9).select(range(TRAIN)[::-1]),
            "control": "wrong-context",
        },
    ),
    "imitation": ({TRAIN: 3}, lambda: {"teacher": known(), "rows": dataset(TRAIN, prompt=parts), "control": "sft"}),
    "a route with a schedule": ({TRAIN: 2}, lambda: {"teacher": routed(), "rows": dataset(TRAIN)}),
    "a pass rate": (
        {TRAIN: 2},
        lambda: {
            "teacher": known(),
            "rows": dataset(TRAIN, rate=lambda number: number % 5 / 4),
            "pass_rate_column": "rate",
        },
    ),
    "half off-policy": (
        {TRAIN: 2},
        lambda: {
            "teacher": known(),
            "rows": dataset(TRAIN, completion=lambda number: f"It is {number}."),
            "lmbda": 0.5,
        },
    ),
    "graders": (
        {TRAIN: 2},
        lambda: {
            "teacher": known(),
            "rows": dataset(TRAIN),
            "reward_funcs": ["last_number", "exact"],
            "num_generations": 2,
        },
    ),
    "everything at once, with an evaluation dataset": (
        {TRAIN: 3, EVAL: 2},
        lambda: {
            "teacher": routed(),
            "rows": dataset(TRAIN, prompt=parts, completion=str, rate=lambda number: 0.5),
            "eval_rows": dataset(EVAL, start=TRAIN, rate=lambda number: 0.5),
            "student_system_prompt": "Be kind.",
            "pass_rate_column": "rate",
            "lmbda": 0.5,
            "reward_funcs": ["last_number"],
            "eval_strategy": "steps",
        },
    ),
    "a plan of evaluation": (
        {TRAIN: 3, TEST: 2, SPLIT: 2},
        lambda: {
            "teacher": known(),
            "rows": dataset(TRAIN, prompt=parts),
            "student_system_prompt": "Be kind.",
            "evaluation": {
                "test": dataset(TEST, start=TRAIN),
                "selection": dataset(SPLIT, start=TRAIN + TEST),
                "every": 2,
                **PLAN,
            },
        },
    ),
}


@pytest.mark.parametrize(("expected", "case"), CASES.values(), ids=CASES)
def test_preparing_passes_over_a_dataset_at_most_three_times(
    tmp_path: Path, rows_read: RowsRead, expected: dict[int, int], case: Callable[[], dict[str, Any]]
) -> None:
    make_trainer(tmp_path, **case())
    passes = {size: rows_read.passes(size) for size in rows_read.rows if size in (TRAIN, EVAL, TEST, SPLIT)}
    assert passes == expected and max(passes.values()) <= 3


@pytest.mark.parametrize("selected", [False, True], ids=["a table", "a selection"])
def test_every_reader_is_counted(rows_read: RowsRead, selected: bool) -> None:
    rows = dataset(TRAIN + 1).select(range(TRAIN)[::-1]) if selected else dataset(TRAIN)
    readers: list[Callable[[], Any]] = [
        lambda: list(rows),
        lambda: list(rows.iter(10)),
        lambda: list(rows["answer"]),
        lambda: rows[:],
        lambda: [rows[number] for number in range(TRAIN)],
        lambda: rows.map(lambda row: {"n": 1}, load_from_cache_file=False),
        lambda: list(rows.select_columns(["answer"])),
        lambda: rows.filter(lambda row: True, load_from_cache_file=False),
    ]
    for count, read in enumerate(readers, 1):
        read()
        assert rows_read.passes(TRAIN) == count


def test_a_run_begins_with_one_pass_for_its_card_and_its_checkpoints(tmp_path: Path, rows_read: RowsRead) -> None:
    plan = {"test": dataset(TEST, start=TRAIN), "selection": dataset(SPLIT, start=TRAIN + TEST), "every": 2, **PLAN}
    trainer = make_trainer(tmp_path, known(), rows=dataset(TRAIN), evaluation=plan)
    rows_read.rows.clear()
    trainer.files.begin(None)
    assert [rows_read.passes(size) for size in (TRAIN, TEST, SPLIT)] == [1, 1, 1]


def test_the_hashes_of_a_run_card_are_made_in_one_pass(rows_read: RowsRead) -> None:
    whole, prompts = data_digests(dataset(TRAIN))
    assert rows_read.passes(TRAIN) == 1
    assert (whole, prompts) == ("ed8fa98b70e21954", "0ae5a8943c09a51d")  # runs of earlier versions hold these
