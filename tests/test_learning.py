"""The experiments of benchmarks/learning: their tasks, graders and records, and the tables that follow from those."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.learning import tasks
from benchmarks.learning.__main__ import RESULTS, write
from benchmarks.learning.experiments import EXPERIMENTS, fine_tuning
from benchmarks.learning.graders import json_form, json_reply, sentence
from benchmarks.learning.records import record_of, run_of
from opsd.commands.demo_tasks import question
from opsd.commands.sweep_plan import read_sweep

RECORDS = sorted(path.stem for path in RESULTS.glob("*.json"))
REPLIES = {
    '{"answer": "The capital of France is Paris."}': (True, True),
    '{"answer": "Lyon"}': (True, False),
    ' {"answer": "Paris"}\n': (True, True),
    '{"answer": "Paris"} Anything else?': (False, False),
    '{"answer": "Paris", "sure": true}': (False, False),
    '{"reply": "Paris"}': (False, False),
    '{"answer": " "}': (False, False),
    '"Paris"': (False, False),
    "Paris": (False, False),
}
SENTENCES = {
    "The river flows through the city.": True,
    "A river is long": False,
    "Rivers flow through the whole city.": False,
    "river": False,
    '{"answer": "The river flows to the sea."}': True,
}


@pytest.mark.parametrize("text", REPLIES)
def test_a_reply_is_json_with_one_key_and_right_if_the_answer_is_in_it(text: str) -> None:
    assert (json_form(text), json_reply(text, {"answer": "Paris"})) == REPLIES[text]


@pytest.mark.parametrize("text", SENTENCES)
def test_a_sentence_has_five_words_and_the_one_that_was_asked_for(text: str) -> None:
    assert sentence(text, {"answer": "river"}) == SENTENCES[text]


def test_no_question_is_in_two_tasks_or_splits() -> None:
    rows = {
        "general, test": tasks.general("test"),
        "general, selection": tasks.general("selection"),
        "sentences": tasks.sentences(),
        "sums, test": tasks.sums("test", 200),
        "sums, selection": tasks.sums("selection", 150),
        "sums, training": tasks.training_sums(768, seed=0),
        "neutral": tasks.neutral(500, seed=0),
    }
    asked = [question(row) for each in rows.values() for row in each]
    assert len(asked) == len(set(asked)) and {name: len(each) for name, each in rows.items()} == {
        "general, test": 175, "general, selection": 100, "sentences": 102, "sums, test": 200, "sums, selection": 150,
        "sums, training": 768, "neutral": 500,
    }  # fmt: skip


def test_an_experiment_is_a_sweep_with_the_first_seed_at_every_rate(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("benchmarks.learning.experiments.packaged_model", lambda: "some/model")
    settings = fine_tuning(tmp_path, [0, 1, 2])
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(settings))
    plan = read_sweep([str(path), "--seeds-at", "best"])
    assert plan.arms == ["bare", "sentence"] and plan.seeds == [0, 1, 2]
    assert len(plan.first_runs) == 6 and plan.later_count == 4
    bare, in_sentences = (
        [json.loads(line) for line in (tmp_path / f"{arm}-0.jsonl").read_text().splitlines()] for arm in plan.arms
    )
    assert [row["prompt"] for row in bare] == [row["prompt"] for row in in_sentences]
    assert all(row["completion"] == f"The answer is {row['answer']}." for row in in_sentences)


@pytest.mark.parametrize("name", RECORDS)
def test_tables_and_figures_follow_from_the_stored_grades(name: str, tmp_path: Path) -> None:
    record = json.loads((RESULTS / f"{name}.json").read_text())
    text = json.dumps(record)
    assert name in EXPERIMENTS and record["asks"] == EXPERIMENTS[name].asks and "/root" not in text
    write(name, record, tmp_path)
    for suffix in ("json", "md", "svg"):
        written = (RESULTS / f"{name}.{suffix}").read_text()
        assert (tmp_path / f"{name}.{suffix}").read_text() == written, suffix
    assert len({run["seed"] for run in record["runs"]}) >= 3


@pytest.mark.parametrize("name", RECORDS)
def test_the_record_of_a_run_is_all_that_its_run_is_made_from(name: str) -> None:
    for record in json.loads((RESULTS / f"{name}.json").read_text())["runs"]:
        again = record_of(run_of(record))
        for graded in (again, record):  # which answers were cut is counted, and not stored question by question
            for times in (graded["test"], *graded["retention"].values()):
                assert all(each.pop("truncated") >= 0 for each in times.values())
        assert again == record


@pytest.mark.parametrize("name", RECORDS)
def test_every_arm_was_trained_at_a_decade_of_learning_rates(name: str) -> None:
    record = json.loads((RESULTS / f"{name}.json").read_text())
    for arm in {run["arm"] for run in record["runs"]}:
        rates = sorted({run["values"]["learning_rate"] for run in record["runs"] if run["arm"] == arm})
        assert rates[-1] >= 9.9 * rates[0]
