"""Looks at the selection split: what is kept, and the test of each against the best one before."""

from __future__ import annotations

import json

import pytest
from scipy.stats import binomtest

from opsd.evaluation.result import Answer, EvaluationResult
from opsd.training.looks import Looks


def result(grades: list[bool | None]) -> EvaluationResult:
    questions = [f"question {number}" for number in range(len(grades))]
    return EvaluationResult(questions, "exact", [Answer("7", grade, 3, True) for grade in grades], [])


def test_a_look_is_tested_against_the_best_one_before() -> None:
    looks = Looks()
    assert "eval_p_value" not in looks.add(0, result([False] * 50 + [True] * 10))
    looks.add(5, result([False] * 20 + [True] * 40))
    logged = looks.add(10, result([False] * 35 + [True] * 20 + [None] * 5))
    assert logged["eval_p_value"] == pytest.approx(binomtest(15, 15).pvalue)  # 15 lost, none gained
    assert logged["eval_questions"] == 60


def test_a_resumed_run_compares_with_looks_from_before() -> None:
    looks = Looks()
    looks.add(0, result([True] * 30))
    later = Looks(json.loads(json.dumps(looks.entries)))
    assert later.add(5, result([True] * 10 + [False] * 20))["eval_p_value"] == pytest.approx(binomtest(20, 20).pvalue)
    assert [entry["step"] for entry in later.entries] == [0, 5]
    later.add(5, result([True] * 30))  # it broke off, and looks again
    assert [entry["step"] for entry in later.entries] == [0, 5]


def test_looks_of_an_older_run_are_not_compared() -> None:
    looks = Looks([{"step": 0, "accuracy": {"value": 0.5}}])
    assert "eval_p_value" not in looks.add(5, result([True] * 3))
