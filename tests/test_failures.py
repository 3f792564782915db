"""The monitors, replayed on the committed logs and traces of runs that were made to fail, and of healthy ones."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.failures.__main__ import RESULTS, STATE, judged, summary, table
from benchmarks.failures.runs import RUNS

RECORD: dict[str, dict[str, Any]] = json.loads((RESULTS / "failures.json").read_text("utf-8"))["runs"]


def test_every_run_has_its_result() -> None:
    assert RECORD.keys() == RUNS.keys()
    assert all((RESULTS / name.replace(" ", "_") / STATE).is_file() for name in RECORD)


@pytest.mark.parametrize("name", RECORD)
def test_the_monitors_say_of_a_run_what_the_record_says(name: str) -> None:
    """Another threshold, or another monitor, writes the record anew: python -m benchmarks.failures --replay."""
    assert judged(name) == RECORD[name]


def test_the_table_is_that_of_the_record() -> None:
    text = (RESULTS / "failures.md").read_text("utf-8")
    assert table(RECORD) in text
    assert summary(RECORD, apart=False) in text and summary(RECORD, apart=True) in text


@pytest.mark.parametrize("name", [name for name, run in RECORD.items() if run["healthy"]])
def test_a_healthy_run_raises_no_act(name: str) -> None:
    assert RECORD[name]["others"] == [] and RECORD[name]["last"] > RECORD[name]["first"] + 0.05
