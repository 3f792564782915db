"""A run is evaluated as its plan declares, before and after training; a plan that cannot work is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama, make_rows, make_tokenizer
from datasets import Dataset, IterableDataset
from evaluation_runs import DEV, GRADER, KEPT, PLAN, TEST, TRAIN, make, results
from helpers import make_args, make_trainer, snapshot
from transformers import TrainerCallback

from opsd import EMATeacher, OPSDTrainer, SameCheckpointTeacher, SiblingTeacher
from opsd.errors import ConfigError, DataError, OPSDWarning
from opsd.evaluation.plan import EvaluationPlan
from opsd.evaluation.run_folder import read_card
from opsd.evaluation.summary import read_summary

# ---- the plan -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"grder": "exact"}, ConfigError, "Did you mean 'grader'"),
        ({"rule": "bst"}, ConfigError, "Did you mean 'best'"),
        ({"rule": "best"}, ConfigError, "there is none"),
        ({"selection": DEV}, ConfigError, "only one of them is given"),
        ({"every": 2}, ConfigError, "only one of them is given"),
        ({"every": 0, "selection": DEV}, ConfigError, "every must be"),
        ({"samples": -1}, ConfigError, "samples must be a whole number of at least 0"),
        ({"grader": "last_numbr"}, ConfigError, "Did you mean 'last_number'"),
        ({"test": []}, DataError, "test dataset is empty"),
        ({"temperature": 0}, ConfigError, "above 0"),
        ({"test": "nowhere.jsonl"}, DataError, "nowhere.jsonl"),
        ({"test": [{"prompt": "only a question"}], "grader": "exact"}, DataError, "'exact' needs the column 'answer'"),
        ({"test": [{"prompt": "?", "answer": ""}], "grader": "exact"}, DataError, "of the split 'test' can be graded"),
        ({"retention": {"kept": KEPT}}, ConfigError, "retention 'kept' must be a mapping"),
        ({"retention": {"kept": {"grader": "exact"}}}, ConfigError, "must be a mapping {rows: FILE"),
    ],
)
def test_a_plan_that_cannot_work_is_refused(tmp_path: Path, change: dict[str, Any], error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        make(tmp_path, evaluation={**PLAN, **change}, model="no/such-model")


@pytest.mark.parametrize("key", ["test", "grader"])
def test_a_plan_needs_questions_and_a_grader(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=f"needs '{key}'"):
        EvaluationPlan.parse({k: v for k, v in PLAN.items() if k != key})


def test_a_plan_is_no_list() -> None:
    with pytest.raises(ConfigError, match="must be a mapping"):
        EvaluationPlan.parse(["test.jsonl"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("evaluation", "train", "said"),
    [
        (PLAN, [*TRAIN, TEST[3]], "1 of the 12 questions of 'test' are also in 'train'"),
        ({**PLAN, "selection": TEST[:3] + DEV, "every": 1}, TRAIN, "3 of the 11 questions of 'selection'.*in 'test'"),
        ({**PLAN, "selection": DEV, "every": 1}, [*TRAIN, *DEV[:2]], "2 of the 8 questions of 'selection'.*in 'train'"),
        ({**PLAN, "retention": {"x": {"rows": TRAIN[:4]}}}, TRAIN, "4 of the 4 questions of 'retention x'.*in 'train'"),
    ],
)
def test_questions_that_leak_are_refused_before_a_model_loads(
    tmp_path: Path, evaluation: Any, train: Any, said: str
) -> None:
    with pytest.raises(DataError, match=said):
        make(tmp_path, evaluation=evaluation, train=train, model="no/such-model")


def test_evaluation_rows_that_are_trained_on_are_refused_without_a_plan_too(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 of the 5 questions of 'eval' are also in 'train'"):
        make_trainer(tmp_path, eval_rows=Dataset.from_list(make_rows(15)[10:]))
    parts = {"fresh": Dataset.from_list(make_rows(14)[12:]), "stale": Dataset.from_list(make_rows(2))}
    with pytest.raises(DataError, match="2 of the 2 questions of 'stale'"):
        make_trainer(tmp_path, eval_rows=parts)


def test_a_stream_that_cannot_be_looked_through_is_said_to_be_unchecked(tmp_path: Path, capsys) -> None:
    rows = IterableDataset.from_generator(lambda: iter(TRAIN))
    trainer = OPSDTrainer(
        make_llama(0),
        SameCheckpointTeacher(context="worked_solution"),
        args=make_args(tmp_path),
        train_dataset=rows,
        processing_class=make_tokenizer(),
        evaluation=PLAN,
    )
    trainer.train()
    assert "not checked: whether test questions are trained on" in capsys.readouterr().out
    assert "a stream" in read_summary(tmp_path / "evaluation")["skipped"][0]


def test_a_question_that_is_asked_twice_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(OPSDWarning, match="repeats 2 of its 14 questions"):
        make(tmp_path, evaluation={**PLAN, "test": [*TEST, *TEST[:2]]})


# ---- what is measured -----------------------------------------------------------------------------------------------


def test_the_student_is_measured_before_and_after_and_the_teacher_with_its_context(tmp_path: Path) -> None:
    trainer = make(tmp_path, evaluation={**PLAN, "samples": 2})
    answer = trainer.evaluator._evaluate_student
    test = trainer.evaluator.plan.splits["test"]
    at_start = answer(test, "")
    trainer.train()
    found = results(tmp_path)
    assert list(found) == ["before", "teacher", "after"]
    assert found["before"].greedy == at_start.greedy and found["before"].samples == 2
    assert found["after"].greedy == answer(test, "").greedy != found["before"].greedy
    assert found["teacher"].texts != found["before"].texts and found["teacher"].context == "worked_solution"
    assert [result.questions for result in found.values()] == [found["before"].questions] * 3


def test_what_the_run_comes_to_stands_in_its_folder_and_on_the_screen(tmp_path: Path, capsys) -> None:
    plan = {**PLAN, "retention": {"kept": {"rows": KEPT}}, "neutral": DEV}
    make(tmp_path, evaluation=plan).train()
    summary, out = read_summary(tmp_path / "evaluation"), capsys.readouterr().out
    before, after = results(tmp_path)["before"], results(tmp_path)["after"]
    assert summary["gain"]["difference"] == pytest.approx(after.accuracy - before.accuracy)
    assert summary["metrics"]["after"]["accuracy"]["value"] == pytest.approx(after.accuracy)
    assert summary["retention"]["kept"]["difference"]["n"] == len(KEPT)
    for said in ("student before", "teacher (ceiling)", "gap closed", "retention", "drift", "checkpoint"):
        assert said in out
    assert f"grader {GRADER}" in out


def test_a_teacher_that_is_another_model_is_measured_without_its_context_too(tmp_path: Path) -> None:
    teacher = SiblingTeacher(make_llama(5), tokenizer=make_tokenizer(), context="answer_only")
    make(tmp_path, teacher).train()
    found = results(tmp_path)
    assert list(found) == ["before", "teacher_without_context", "teacher", "after"]
    assert found["teacher"].texts != found["teacher_without_context"].texts != found["before"].texts


def test_a_teacher_without_context_is_measured_once(tmp_path: Path) -> None:
    make(tmp_path, SiblingTeacher(make_llama(5), tokenizer=make_tokenizer())).train()
    assert list(results(tmp_path)) == ["before", "teacher", "after"]


def test_a_teacher_that_cannot_answer_is_said_to_be_no_ceiling(tmp_path: Path, capsys) -> None:
    make(
        tmp_path, {"strategy": "mixture", "teachers": "same_checkpoint", "weights": [1.0], "contexts": ["answer_only"]}
    ).train()
    assert list(results(tmp_path)) == ["before", "after"]
    assert "no single model that could answer" in capsys.readouterr().out
    assert "no single model" in read_summary(tmp_path / "evaluation")["skipped"][0]


def test_test_rows_without_what_the_teacher_is_shown_have_no_ceiling(tmp_path: Path) -> None:
    bare = [{key: row[key] for key in ("prompt", "answer")} for row in TEST]
    make(tmp_path, evaluation={**PLAN, "test": bare}).train()
    assert list(results(tmp_path)) == ["before", "after"]
    assert "lack columns of the teacher's context" in read_summary(tmp_path / "evaluation")["skipped"][0]


def test_a_control_asks_no_teacher(tmp_path: Path) -> None:
    make(tmp_path, control="wrong-context").train()
    assert list(results(tmp_path)) == ["before", "after"]
    assert read_summary(tmp_path / "evaluation")["traces"] is None


@pytest.mark.slow
def test_samples_are_drawn_by_the_plans_seed(tmp_path: Path) -> None:
    plans = [{**PLAN, "samples": 2, "seed": seed} for seed in (0, 0, 1)]
    for number, plan in enumerate(plans):
        make(tmp_path / str(number), evaluation=plan, max_steps=1).train()
    one, again, other = (results(tmp_path / str(number))["before"] for number in range(3))
    assert one == again and one.sampled != other.sampled


@pytest.mark.slow
def test_measuring_changes_nothing_of_the_training(tmp_path: Path) -> None:
    plan = {**PLAN, "selection": DEV, "every": 1, "samples": 2, "neutral": KEPT}
    weights, logs = [], []
    for name, evaluation in (("with", plan), ("without", None)):
        trainer = OPSDTrainer(
            make_llama(0),
            EMATeacher(0.8, context="worked_solution"),
            args=make_args(tmp_path / name, max_steps=3),
            train_dataset=Dataset.from_list(TRAIN),
            processing_class=make_tokenizer(),
            evaluation=evaluation,
        )
        trainer.train()
        weights.append(snapshot(trainer.model))
        logs.append([e for e in trainer.state.log_history if "divergence" in e])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    for one, other in zip(*logs, strict=True):
        assert {key: one[key] for key in one if not of_machine(key)} == {
            key: other[key] for key in other if not of_machine(key)
        }


def of_machine(key: str) -> bool:
    """Whether a metric is of the machine: no two runs have the same."""
    return key in ("step_time", "memory_gib") or key.startswith("seconds/")


def test_likelihood_of_held_out_traces_is_the_mean_nll_of_both_sides(tmp_path: Path) -> None:
    trainer = make(tmp_path, max_completion_length=64)
    trainer.train()
    found = read_summary(tmp_path / "evaluation")["traces"]
    tokenizer, student = trainer.student.tokenizer, trainer.student.renderer

    def nll(prompts: list[list[int]]) -> list[float]:
        values = []
        for prompt, row in zip(prompts, TEST, strict=True):
            ids = [*tokenizer(row["solution"])["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                logits = trainer.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            values.append(-float(torch.log_softmax(logits, -1)[range(len(ids)), ids].mean()))
        return values

    own = nll([student.ids(row["prompt"]) for row in TEST])
    assert found["student"] == pytest.approx(sum(own) / len(own), rel=1e-4)
    assert found["column"] == "solution" and found["n"] == len(TEST)
    with trainer.teacher.active_weights():
        its = nll([trainer.teacher.prompts.ids(row) for row in TEST])
    assert found["teacher"] == pytest.approx(sum(its) / len(its), rel=1e-4)
    assert found["behind"]["difference"] == pytest.approx(found["student"] - found["teacher"], rel=1e-3)


def test_likelihood_is_known_before_training_too_and_says_what_was_cut(tmp_path: Path) -> None:
    make(tmp_path, learning_rate=5e-2, max_completion_length=4).train()
    found = read_summary(tmp_path / "evaluation")["traces"]
    assert found["before"]["student"] != found["student"]
    assert found["shortened"] == found["n"] == len(TEST)


def test_a_grader_that_breaks_down_after_training_loses_no_weights(tmp_path: Path, monkeypatch) -> None:
    trainer = make(tmp_path)

    class Break(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == state.max_steps:
                monkeypatch.setattr(trainer.evaluator, "plan", None)

    trainer.add_callback(Break())
    with pytest.warns(OPSDWarning, match="could not be evaluated after training"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert "before.json" in {path.name for path in (tmp_path / "evaluation").iterdir()}


def test_the_run_card_says_what_was_declared(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.train()
    declared = read_card(str(tmp_path))["evaluation"]
    assert declared == trainer.evaluator.plan.describe() and "checkpoint: the last step's" in declared
    assert declared in (tmp_path / "run_card.md").read_text()


@pytest.mark.slow
def test_drift_is_nothing_without_training_and_estimates_the_kl_after_it(tmp_path: Path) -> None:
    still = make(tmp_path / "still", evaluation={**PLAN, "neutral": DEV}, control="no-context")
    still.train()
    assert read_summary(tmp_path / "still" / "evaluation")["drift"]["per_token"]["value"] == pytest.approx(0, abs=1e-6)
    trainer = make(tmp_path / "moved", evaluation={**PLAN, "neutral": DEV * 12}, max_steps=4)
    before = make_llama(0).eval()
    trainer.train()
    found = read_summary(tmp_path / "moved" / "evaluation")["drift"]["per_token"]
    stored = json.loads((tmp_path / "moved" / "evaluation" / "neutral.json").read_text())
    exact = []
    for row, ids in zip(DEV * 12, stored["ids"], strict=True):
        prompt = trainer.student.renderer.ids(row["prompt"])
        with torch.no_grad():
            was, now = (
                torch.log_softmax(m(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1], -1)
                for m in (before, trainer.model)
            )
        exact.append(float((was.exp() * (was - now)).sum(-1).mean()))
    assert found["low"] <= sum(exact) / len(exact) <= found["high"]
    assert sum(exact) / len(exact) > 0.01


@pytest.mark.parametrize("traces", [[""] * 12, [None] * 12, ["", "It is one."] * 6])
def test_rows_without_a_trace_are_left_out_of_the_likelihood(tmp_path: Path, traces: list[Any]) -> None:
    rows = [{**row, "completion": trace} for row, trace in zip(TEST, traces, strict=True)]
    make(tmp_path, evaluation={**PLAN, "test": rows}, max_completion_length=64).train()
    found = read_summary(tmp_path / "evaluation")["traces"]
    assert (found["column"], found["n"]) == (("completion", 6) if traces[1] else ("solution", 12))


@pytest.mark.slow
def test_a_trace_of_messages_is_the_assistants_words(tmp_path: Path) -> None:
    likelihoods = []
    for name, of in (("text", lambda text: text), ("turns", lambda text: [{"role": "assistant", "content": text}])):
        rows = [{**row, "completion": of("It is one.")} for row in TEST]
        make(tmp_path / name, evaluation={**PLAN, "test": rows}, max_completion_length=64).train()
        likelihoods.append(read_summary(tmp_path / name / "evaluation")["traces"]["before"]["student"])
    assert likelihoods[0] == likelihoods[1]


@pytest.mark.slow
def test_what_an_earlier_run_left_is_not_read_as_this_ones(tmp_path: Path) -> None:
    make(tmp_path, evaluation={**PLAN, "selection": DEV, "every": 1, "rule": "best"}, max_steps=1).train()
    for path in [*tmp_path.glob("checkpoint-*/*"), *tmp_path.glob("*.safetensors")]:
        path.unlink()
    for path in tmp_path.glob("checkpoint-*"):
        path.rmdir()
    make(tmp_path, control="wrong-context").train()
    assert list(results(tmp_path)) == ["before", "after"] and "gap" not in read_summary(tmp_path / "evaluation")


def test_a_control_needs_nothing_of_evaluation_rows_that_its_teacher_never_sees(tmp_path: Path) -> None:
    make(tmp_path, evaluation={**PLAN, "test": TEST[:1], "neutral": DEV[:1]}, control="wrong-context").train()
    assert results(tmp_path)["after"].n == 1


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_last_evaluation_is_evaluated_on_resume(tmp_path: Path) -> None:
    """Its last checkpoint is of the last step, so a resume trained nothing, and measured nothing either."""
    settings = {"evaluation": {**PLAN, "neutral": KEPT}, "save_strategy": "steps", "save_steps": 1}
    whole = make(tmp_path / "run", **settings)
    whole.train()
    folder = tmp_path / "run" / "evaluation"
    summary, outcome = read_summary(folder), read_card(str(tmp_path / "run"))["outcome"]
    for name in ("after.json", "evaluation.json"):
        (folder / name).unlink()
    make(tmp_path / "run", **settings).train(resume_from_checkpoint=True)
    assert read_summary(folder) == summary
    assert read_card(str(tmp_path / "run"))["outcome"] == outcome
