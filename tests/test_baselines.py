"""What was measured before training is taken from another run only if everything it depends on is equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama, make_tokenizer
from datasets import Dataset
from evaluation_runs import DEV, GRADER, KEPT, PLAN, TEST, make, results
from helpers import logged

from opsd import EMATeacher, PrivilegedContext, RoutedTeacher, SameCheckpointTeacher, SiblingTeacher
from opsd.evaluation.summary import read_summary
from opsd.teachers import Teacher
from opsd.training.baselines import Baselines


def shared(folder: Path, **changes: Any) -> dict[str, Any]:
    return {**PLAN, "baselines": str(folder / "baselines"), **changes}


def asks(folder: Path, *, of_teacher: bool, **changes: Any) -> bool:
    """Whether a run measures what the folder has from an earlier one."""
    trainer = make(folder / "run", evaluation=changes.pop("evaluation", None) or shared(folder), **changes)
    asked = []

    def measure() -> dict[str, int]:
        asked.append(1)
        return {"value": 7}

    baselines = Baselines(trainer.files.parts)
    assert baselines.value("x", trainer.files.parts.plan.test, measure, teacher=of_teacher) == {"value": 7}
    return bool(asked)


def moved() -> torch.nn.Module:
    model = make_llama(0)
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-3
    return model


class Own(SameCheckpointTeacher):
    pass


# A change -> whether the student, and whether the teacher's ceiling, is measured anew.
CHANGES: dict[str, tuple[Any, bool, bool]] = {
    "nothing": (dict, False, False),
    "seed, learning rate and steps": (lambda: {"seed": 5, "learning_rate": 1e-3, "max_steps": 9}, False, False),
    "a control": (lambda: {"control": "sft"}, False, True),
    "one weight": (lambda: {"model": moved()}, True, True),
    "context": (lambda: {"teacher": SameCheckpointTeacher(context="answer_only")}, False, True),
    "a setting of the context": (
        lambda: {"teacher": SameCheckpointTeacher(context=PrivilegedContext("worked_solution", max_prompt_tokens=300))},
        False,
        True,
    ),
    "teacher": (lambda: {"teacher": EMATeacher(0.9, context="worked_solution")}, False, True),
    "a teacher class of your own": (lambda: {"teacher": Own(context="worked_solution")}, True, True),
    "questions": (lambda: {"evaluation": {"test": TEST[1:]}}, True, True),
    "an answer": (lambda: {"evaluation": {"test": [*TEST[1:], {**TEST[0], "answer": "1"}]}}, True, True),
    "length": (lambda: {"max_completion_length": 5}, True, True),
    "samples": (lambda: {"evaluation": {"samples": 2}}, True, True),
    "seed of the samples": (lambda: {"evaluation": {"seed": 1}}, True, True),
    "batch size": (lambda: {"evaluation": {"batch_size": 3}}, True, True),
    "precision": (lambda: {"bf16": True}, True, True),
    "system prompt": (lambda: {"student_system_prompt": "Be brief."}, True, True),
    "keywords of the chat template": (lambda: {"chat_template_kwargs": {"enable_thinking": True}}, True, True),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the baselines of a run."""
    folder = tmp_path_factory.mktemp("measured")
    assert asks(folder, of_teacher=False) and asks(folder, of_teacher=True)
    return folder


@pytest.mark.parametrize("name", CHANGES)
def test_a_baseline_is_taken_only_if_all_it_depends_on_is_equal(measured: Path, name: str) -> None:
    """A ceiling of another context, or a student of another precision, beside results that it does not belong to."""
    make_changes, student, teacher = CHANGES[name]
    changes = make_changes()
    if "evaluation" in changes:
        changes["evaluation"] = shared(measured, **changes["evaluation"])
    for of_teacher, is_new in ((False, student), (True, teacher)):
        assert asks(measured, of_teacher=of_teacher, **changes) is is_new


@pytest.mark.parametrize("is_part", [False, True])
def test_a_sibling_is_compared_by_its_weights(tmp_path: Path, is_part: bool) -> None:
    """Its name is the same after it was trained on."""

    def sibling(seed: int) -> Teacher:
        alone = SiblingTeacher(make_llama(seed), tokenizer=make_tokenizer(), context="answer_only")
        return RoutedTeacher("domain", {"even": alone, "odd": SameCheckpointTeacher()}) if is_part else alone

    assert asks(tmp_path, of_teacher=True, teacher=sibling(5))
    assert not asks(tmp_path, of_teacher=True, teacher=sibling(5))
    assert asks(tmp_path, of_teacher=True, teacher=sibling(6))


@pytest.mark.slow
def test_a_run_that_takes_its_baselines_trains_and_reports_as_one_that_measures_them(tmp_path: Path) -> None:
    plan = shared(
        tmp_path, selection=DEV, every=1, samples=1, neutral=KEPT, retention={"kept": {"rows": KEPT, "grader": GRADER}}
    )
    runs = []
    for name in ("first", "second"):
        trainer = make(tmp_path / name, evaluation=plan)
        trainer.train()
        runs.append(trainer)
    first, second = (read_summary(tmp_path / name / "evaluation") for name in ("first", "second"))
    assert first.pop("taken") == []
    assert set(second.pop("taken")) == {
        *("test: student before", "retention kept: student before", "selection at step 0", "neutral", "traces"),
        "test: teacher with its context",
    }
    assert first == second
    assert logged(runs[0], "divergence") == logged(runs[1], "divergence")
    for split in ("test", "retention kept"):
        assert results(tmp_path / "first", split) == results(tmp_path / "second", split)


def test_rows_of_a_dataset_and_its_file_are_the_same_rows(tmp_path: Path) -> None:
    assert asks(tmp_path, of_teacher=False)
    rows = Dataset.from_list(TEST)
    rows.to_json(tmp_path / "test.jsonl")
    assert not asks(tmp_path, of_teacher=False, evaluation=shared(tmp_path, test=str(tmp_path / "test.jsonl")))
