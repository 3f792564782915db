"""Results and splits: what is kept of an evaluation, when two can be paired, when two splits share a question."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import make_llama
from transformers import PreTrainedTokenizerFast

from opsd.errors import CheckpointError, ConfigError, DataError, OPSDWarning
from opsd.evaluation import Answer, EvaluationResult, evaluate, generate
from opsd.evaluation.graders import Grader
from opsd.evaluation.questions import check_disjoint, question_of
from opsd.evaluation.summary import difference, gain_verdict, gap, retention_verdict


def result_of(
    greedy: str, sampled: list[str] = (), questions: list[str] | None = None, **changes: object
) -> EvaluationResult:  # type: ignore[assignment]
    """A result: a letter per question, + right, - wrong, ? ungraded."""
    kinds = {"+": True, "-": False, "?": None}

    def answers(marks: str) -> list[Answer]:
        return [Answer(mark, kinds[mark], 3, mark != "-", mark if mark != "?" else None) for mark in marks]

    names = questions or [f"question {number}" for number in range(len(greedy))]
    return replace(
        EvaluationResult(names, "exact", answers(greedy), [answers(each) for each in sampled], has_form=True), **changes
    )


def asked(*texts: str) -> list[dict[str, object]]:
    return [{"prompt": [{"role": "user", "content": text}]} for text in texts]


def test_metrics_come_from_greedy_and_from_sampled_answers() -> None:
    result = result_of("+-?", ["++", "+-", "--"])
    assert result.values("accuracy").tolist() == [1, 0, 0]
    assert result.values("avg@2").tolist() == [1, 0.5, 0]
    assert result.values("pass@2").tolist() == [1, 1, 0]
    assert result.values("maj@2").tolist() == [1, 0.5, 0]
    assert result.values("format").tolist() == [1, 1, 0]
    assert result.values("truncated").tolist() == [0, 1, 0]
    assert result.values("length").tolist() == [3, 3, 3]
    assert result.usual_metrics == ["accuracy", "avg@2", "pass@2", "maj@2", "format", "length", "truncated"]


def test_ungraded_answers_are_named_and_never_right() -> None:
    result = result_of("+?-", ["+", "+", "?"])
    assert result.ungraded == [1, 2]
    assert result.accuracy == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ("pass@3", "at least 3 samples per question, and there are 2"),
        ("acuracy", "Did you mean 'accuracy'"),
        ("pas@2", "Did you mean 'pass@2'"),
    ],
)
def test_a_metric_that_cannot_be_had_is_refused(metric: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        result_of("+-", ["++", "+-"]).values(metric)


def test_a_metric_of_samples_is_refused_where_none_were_drawn() -> None:
    with pytest.raises(ConfigError, match=r"there are 0\. Draw more: samples=4"):
        result_of("+-").values("avg@4")


def test_a_length_that_is_always_one_is_no_share() -> None:
    """Wilson's interval of "all of them" would be 0.5 to 1 tokens."""
    one = replace(result_of("++++"), greedy=[Answer("a", True, 1, True)] * 4)
    estimate = one.estimate("length")
    assert (estimate.value, estimate.low, estimate.high) == (1.0, None, None)


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    result = result_of("+-?", ["++", "+-", "??"], temperature=0.7, model="m", context="hint", max_new_tokens=9)
    result.save(tmp_path / "deep" / "result.json")
    assert EvaluationResult.load(tmp_path / "deep" / "result.json") == result
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["result.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"greedy": []}', '{"greedy": [{"txt": ""}], "sampled": []}'])
def test_a_file_that_holds_no_result_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(CheckpointError, match="is not an evaluation"):
        EvaluationResult.load(tmp_path / "x.json")


def test_results_are_paired_by_question_whatever_the_order() -> None:
    first = result_of("+--", ["++", "--", "-+"], ["a", "b", "a"])
    other = result_of("-++", ["-+", "+-", "++"], ["b", "a", "a"])
    paired = other.in_order_of(first)
    assert paired.questions == first.questions
    assert paired.correct == [True, False, True]
    assert [answer.text for answer in paired.sampled[0]] == ["+", "-"]


def test_results_on_other_questions_are_refused_with_how_many_they_share() -> None:
    with pytest.raises(DataError, match=r"of 3 and 3 only 2 are in both \(such as 'c'\)"):
        result_of("+++", questions=["a", "b", "d"]).in_order_of(result_of("+++", questions=["a", "b", "c"]))
    with pytest.raises(DataError, match="of 2 and 3 only 2"):
        result_of("+++", questions=["a", "b", "c"]).in_order_of(result_of("++", questions=["a", "b"]))


@pytest.mark.parametrize("change", [{"grader": "math"}, {"max_new_tokens": 7}, {"temperature": 0.2}])
def test_results_of_another_measure_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(DataError, match=next(iter(change))):
        result_of("++", ["+", "+"], **change).in_order_of(result_of("++", ["+", "+"]))


def test_what_was_not_graded_on_either_side_is_in_no_difference() -> None:
    change = difference(result_of("?-+-"), result_of("++-?"))
    assert (change.n, change.difference) == (2, 0.0)


def test_a_vote_is_among_answers_that_are_equal_and_not_written_alike(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["5", "5.0", "7", "7", "5.00"]
    drawn = iter([tokenizer(text)["input_ids"] for text in ["0", *texts]])
    rows = [{**asked("one")[0], "answer": "5"}]
    settings = {"grader": "last_number", "max_new_tokens": 9, "batch_size": 8, "samples": 5}
    result = evaluate(lambda rows, **_: [next(drawn) for _ in rows], rows, tokenizer, **settings)
    assert result.values("maj@5").tolist() == [1.0]


def test_a_reader_that_fails_leaves_an_answer_without_form(tokenizer: PreTrainedTokenizerFast) -> None:
    def read(text: str) -> str:
        raise ValueError("unreadable")

    rows = [{**asked("one")[0], "answer": "5"}]
    settings = {"grader": Grader("odd", lambda text, row: True, read), "max_new_tokens": 2, "batch_size": 8}
    result = evaluate(sampler(tokenizer), rows, tokenizer, **settings)
    assert result.values("format").tolist() == [0.0] and result.correct == [True]


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ("-" * 396 + "----", "-" * 396 + "++++", "+1.0 points (.*): no significant difference on 400 questions; "),
        ("-", "+", "+100.0 points (.*): no significant difference on 1 questions$"),
        ("-" * 40, "+" * 20 + "-" * 20, "+50.0 points (.*): the student improved$"),
        ("+" * 20 + "-" * 20, "-" * 40, "-50.0 points (.*): the student got WORSE$"),
    ],
)
def test_the_verdict_on_a_gain_agrees_with_its_test(before: str, after: str, verdict: str) -> None:
    gain = difference(result_of(before), result_of(after))
    assert re.match(verdict.replace("+", r"\+").replace("(", r"\(").replace(")", r"\)"), gain_verdict(gain))
    assert (gain.p_value < 0.05) == ("no significant" not in gain_verdict(gain))
    assert ("WORSE" in retention_verdict("x", gain)) == ("WORSE" in gain_verdict(gain))


def test_a_student_has_reached_its_teacher_where_the_interval_says_so_and_not_before() -> None:
    few = ("+" * 8 + "-" * 12, "+" * 16 + "-" * 4, "+" * 15 + "-" * 5)
    many = ("+" * 400 + "-" * 600, "+" * 801 + "-" * 199, "+" * 800 + "-" * 200)
    assert "too few questions (20) to say" in gap(*map(result_of, few))["verdict"]
    assert "has reached its teacher" in gap(*map(result_of, many))["verdict"]
    behind = ("+" * 400 + "-" * 600, "+" * 600 + "-" * 400, "+" * 800 + "-" * 200)
    assert "still ahead by +20.0" in gap(*map(result_of, behind))["verdict"]
    same = "+" * 400 + "-" * 600
    assert "no gap to close" in gap(result_of(same), result_of(same), result_of(same))["verdict"]


# ---- questions ------------------------------------------------------------------------------------------------------


def test_a_question_is_the_same_whatever_its_case_its_spacing_and_its_system_turn() -> None:
    plain = question_of({"prompt": "What is  2 + 2?\n"})
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "what IS 2 + 2?"}]
    assert plain == question_of({"prompt": turns}) == "what is 2 + 2"
    assert question_of({"prompt": "What is 2 + 2 ?"}) == question_of({"prompt": "What is 2 ＋ 2？"}) == plain
    assert len({question_of({"prompt": f"3 {sign} 5"}) for sign in "+-*/"}) == 4


def test_shared_questions_are_counted_and_quoted_for_every_two_splits() -> None:
    splits = {"train": ["a", "b", "c"], "test": ["b", "d", "c"], "selection": ["d", "e"]}
    with pytest.raises(DataError) as raised:
        check_disjoint(splits)
    assert "2 of the 3 questions of 'test' are also in 'train' (such as 'b', 'c')" in str(raised.value)
    assert "1 of the 2 questions of 'selection' are also in 'test' (such as 'd')" in str(raised.value)
    check_disjoint({"train": ["a", "a"], "test": ["b", "b"]})


# ---- sampling -------------------------------------------------------------------------------------------------------


def sampler(tokenizer: PreTrainedTokenizerFast):
    model = make_llama()

    def sample(rows, **sampling):
        prompts = [
            tokenizer.apply_chat_template(r["prompt"], add_generation_prompt=True, return_dict=False) for r in rows
        ]
        return generate(model, prompts, tokenizer, **sampling)

    return sample


def test_samples_belong_to_their_question_and_repeat_with_their_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{**row, "answer": "x"} for row in asked("one", "two", "three")]
    settings = {"grader": "exact", "max_new_tokens": 5, "batch_size": 4}
    sample = sampler(tokenizer)
    one, again, other = (evaluate(sample, rows, tokenizer, samples=3, seed=s, **settings) for s in (1, 1, 2))
    assert one == again and one.sampled != other.sampled and one.greedy == other.greedy
    assert (one.samples, one.n) == (3, 3)
    assert one.greedy == evaluate(sample, rows, tokenizer, **settings).greedy
    assert len({answer.text for each in one.sampled for answer in each}) > 3


def test_each_sample_is_graded_against_its_own_row(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = asked("one", "two")
    drawn = iter([[5], [6], [7], [8], [9], [10]])  # greedy 1, greedy 2, then two samples of each

    def sample(rows, **sampling):
        return [next(drawn) for _ in rows]

    graded = []

    def grader(text: str, row: dict[str, object]) -> bool:
        graded.append((tokenizer.decode([5 + len(graded)]) == text, row["prompt"][0]["content"]))
        return True

    evaluate(sample, rows, tokenizer, grader=grader, max_new_tokens=1, batch_size=2, samples=2)
    assert graded == [(True, name) for name in ("one", "two", "one", "one", "two", "two")]


def test_progress_counts_greedy_and_sampled_answers_on(tokenizer: PreTrainedTokenizerFast) -> None:
    done: list[int] = []
    rows = [{**row, "answer": "x"} for row in asked("one", "two", "three")]
    settings = {"grader": "exact", "max_new_tokens": 2, "batch_size": 3, "samples": 2}
    evaluate(sampler(tokenizer), rows, tokenizer, progress=done.append, **settings)
    assert done == [3, 6, 9]


def test_a_grader_that_fails_on_a_sample_is_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    calls = iter([True, True, False, ValueError("boom"), True, True])

    def grader(text: str, row: dict[str, object]) -> bool:
        verdict = next(calls)
        if isinstance(verdict, Exception):
            raise verdict
        return verdict

    with pytest.warns(OPSDWarning, match="boom"):
        result = evaluate(
            sampler(tokenizer), asked("one", "two"), tokenizer, grader=grader, max_new_tokens=2, batch_size=2, samples=2
        )
    assert result.ungraded == [0]
    np.testing.assert_allclose(result.values("avg@2"), [0.0, 1.0])


def test_samples_below_none_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="samples"):
        evaluate(
            sampler(tokenizer), asked("one"), tokenizer, grader="exact", max_new_tokens=2, batch_size=2, samples=-1
        )


def test_json_holds_the_question_and_every_answer(tmp_path: Path) -> None:
    result_of("+-", ["+-", "--"]).save(tmp_path / "r.json")
    stored = json.loads((tmp_path / "r.json").read_text())
    assert stored["questions"] == ["question 0", "question 1"]
    assert stored["greedy"][0]["correct"] is True and len(stored["sampled"][0]) == 2
