"""The experiments of benchmarks/learning: their tasks, graders and records, and the tables that follow from those."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.learning import tasks
from benchmarks.learning.__main__ import RESULTS, write
from benchmarks.learning.experiments import EXPERIMENTS, FINE_TUNED, fine_tuning
from benchmarks.learning.graders import json_form, json_reply, sentence
from benchmarks.learning.records import added, record_of, run_of
from opsd.commands.demo_tasks import question
from opsd.commands.sweep_plan import read_sweep
from opsd.evaluation.plan import EvaluationPlan

RECORDS = sorted(path.stem for path in RESULTS.glob("*.json"))
ASK_A_MODEL = {"rule", "two_tasks", "answer_length"}  # for their rows
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

ONE_RATE = {"wordings", "sampled_ahead"}  # experiments whose arms are trained at one learning rate, with every seed


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


def test_a_scratch_pad_adds_one_number_after_the_other_to_the_answer() -> None:
    held_out = tasks.pads(60, seed=1, terms=3)
    rows = tasks.pads(100, seed=0, without=map(question, held_out))
    assert not {question(row) for row in rows} & {question(row) for row in held_out}
    assert {question(row).count("+") + 1 for row in rows} == set(tasks.LENGTHS)
    for row in rows:
        asked = question(row).removeprefix("Add step by step: ").removesuffix(" =")
        *steps, last = row["completion"].removesuffix(".").split(". ")
        assert eval(asked) == int(row["answer"]) and last == f"The answer is {row['answer']}"
        assert len(steps) == asked.count("+") and all(eval(step.replace("=", "==")) for step in steps)


@pytest.mark.parametrize("name", sorted(EXPERIMENTS.keys() - ASK_A_MODEL))
def test_an_experiment_is_a_sweep_with_the_first_seed_at_every_rate(
    name: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("benchmarks.learning.parts.packaged_model", lambda: "some/model")
    monkeypatch.setattr("benchmarks.learning.experiments.packaged_model", lambda: "some/model")
    monkeypatch.setattr("benchmarks.learning.experiments.models_of", lambda *_: "some/model-{seed}")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(EXPERIMENTS[name].prepare(tmp_path, [0, 1, 2])))
    has_rates = name not in ONE_RATE
    plan = read_sweep([str(path), "--seeds-at", "best" if has_rates else "all"])
    later = 2 * len(plan.arms) if has_rates else 0
    assert plan.seeds == [0, 1, 2] and (len(plan.first_runs), plan.later_count) == (3 * len(plan.arms), later)
    for run in plan.first_runs:
        assert Path(run.settings["dataset_name"]).is_file()
    evaluation = EvaluationPlan.parse(plan.first_runs[0].settings["evaluation"])
    assert evaluation is not None and len(evaluation.loaded().test)  # its graders can grade every split


def test_fine_tuning_compares_the_same_sums_with_bare_answers_and_in_sentences(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("benchmarks.learning.parts.packaged_model", lambda: "some/model")
    fine_tuning(tmp_path, [0])
    bare, in_sentences = (
        [json.loads(line) for line in (tmp_path / f"{arm}-0.jsonl").read_text().splitlines()] for arm in FINE_TUNED
    )
    assert [row["prompt"] for row in bare] == [row["prompt"] for row in in_sentences]
    assert all(row["completion"] == f"The answer is {row['answer']}." for row in in_sentences)


@pytest.mark.parametrize("name", RECORDS)
def test_tables_and_figures_follow_from_the_stored_grades(name: str, tmp_path: Path) -> None:
    record = json.loads((RESULTS / f"{name}.json").read_text())
    text = json.dumps(record)
    assert name in EXPERIMENTS and record["asks"] == EXPERIMENTS[name].asks and "/root" not in text
    write(name, record, tmp_path)
    assert (tmp_path / f"{name}.svg").exists() == bool(record["runs"][0]["retention"])
    for suffix in ("json", "md", *(["svg"] if record["runs"][0]["retention"] else [])):
        written = (RESULTS / f"{name}.{suffix}").read_text()
        assert (tmp_path / f"{name}.{suffix}").read_text() == written, suffix
    assert len({run["seed"] for run in record["runs"]}) >= 3


@pytest.mark.parametrize("name", RECORDS)
def test_the_record_of_a_run_is_all_that_its_run_is_made_from(name: str) -> None:
    for record in json.loads((RESULTS / f"{name}.json").read_text())["runs"]:
        again = record_of(run_of(record))
        for graded in (again, record):  # which answers were cut or in form is counted, not stored question by question
            for times in (graded["test"], *graded["retention"].values()):
                for each in times.values():
                    assert each.pop("truncated") >= 0 and each.pop("in_form", 0) >= 0
        assert again == record


@pytest.mark.parametrize("name", [name for name in RECORDS if name not in ONE_RATE])
def test_every_arm_was_trained_at_a_decade_of_learning_rates(name: str) -> None:
    record = json.loads((RESULTS / f"{name}.json").read_text())
    for arm in {run["arm"] for run in record["runs"]}:
        rates = sorted({run["values"]["learning_rate"] for run in record["runs"] if run["arm"] == arm})
        assert rates[-1] >= 9.9 * rates[0]


def test_arms_that_are_trained_later_stand_beside_the_stored_ones_and_in_the_place_of_the_same_runs(
    tmp_path: Path,
) -> None:
    whole = json.loads((RESULTS / "sums.json").read_text())
    first, later = _arms_of(whole, lambda arm: arm != "sft"), _arms_of(whole, lambda arm: arm in {"sft", "lmbda 0"})
    later["runs"] = [run | {"drift": 9.0} for run in later["runs"]]
    both = added(first, later)
    assert _identities(both) == _identities(whole) and both["settings"] == whole["settings"] | {
        "sweep": both["settings"]["sweep"]
    }
    assert both["settings"]["sweep"]["arms"].keys() == whole["settings"]["sweep"]["arms"].keys()
    assert {run["arm"] for run in both["runs"] if run["drift"] == 9.0} == {"sft", "lmbda 0"}
    write("sums", both, tmp_path)
    assert "seconds do not compare: lmbda 0 (seed 0), " in (tmp_path / "sums.md").read_text()


@pytest.mark.parametrize("change", [{"max_steps": 12}, {"hardware": {"cpu": "another"}}])
def test_arms_that_were_trained_with_other_settings_or_on_another_machine_are_not_added(change: dict[str, Any]) -> None:
    stored = json.loads((RESULTS / "sums.json").read_text())
    new = stored | change if "hardware" in change else stored | {"settings": stored["settings"] | change}
    with pytest.raises(SystemExit, match=f"not added: {next(iter(change))} is"):
        added(stored, new)


def _arms_of(record: dict[str, Any], takes: Callable[[str], bool]) -> dict[str, Any]:
    settings = record["settings"]
    arms = {arm: changes for arm, changes in settings["sweep"]["arms"].items() if takes(arm)}
    return record | {
        "runs": [run for run in record["runs"] if takes(run["arm"])],
        "settings": settings | {"sweep": settings["sweep"] | {"arms": arms}},
    }


def _identities(record: dict[str, Any]) -> set[str]:
    return {json.dumps([run["arm"], run["seed"], run["values"]]) for run in record["runs"]}
