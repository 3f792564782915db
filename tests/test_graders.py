"""Graders against tables: which texts are right, what a text answers, and what cannot be graded."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from graders_cases import CASES, CITIES, FINAL, GCD, NO_FORM, READ
from hypothesis import given, settings
from hypothesis import strategies as st

from opsd.errors import ConfigError, DataError, OPSDWarning
from opsd.evaluation.graders import COMPLETED, GRADERS, Grader, Row, grade, grade_rows, load_grader
from opsd.training.rewards import load_reward


def flat(table: dict[str, list]) -> list[tuple]:
    return [(name, *case) for name, cases in table.items() for case in cases]


def loaded(name: str, column: str = "answer") -> Grader:
    for head, library in (("math", "math_verify"), ("reasoning_gym", "reasoning_gym")):
        if name.partition(":")[0] == head:
            pytest.importorskip(library)
    return load_grader(name, column)


def test_every_grader_of_the_table_has_cases_and_a_form_or_none() -> None:
    assert {name.partition(":")[0] for name in CASES} == GRADERS.keys()
    assert {name.partition(":")[0] for name in [*READ, *NO_FORM]} == GRADERS.keys()


@pytest.mark.parametrize(("name", "text", "answer", "right"), flat(CASES))
def test_grader_tells_right_from_wrong(name: str, text: str, answer: object, right: bool) -> None:
    assert loaded(name)(text, answer if isinstance(answer, dict) else {"answer": answer}) is right


@pytest.mark.parametrize(("name", "text", "answer", "right"), flat(CASES))
def test_what_is_right_has_the_form(name: str, text: str, answer: object, right: bool) -> None:
    """A vote that leaves out texts without an answer must not leave out right ones."""
    grader = loaded(name)
    if right and grader.read is not None:
        assert grader.read(text) is not None


@pytest.mark.parametrize(("name", "text", "answer"), flat(READ))
def test_grader_reads_what_a_text_answers(name: str, text: str, answer: object) -> None:
    read = loaded(name).read
    assert read is not None
    assert read(text) == answer
    assert hash(read(text)) == hash(answer)


@pytest.mark.parametrize("name", NO_FORM)
def test_grader_that_cannot_tell_the_form_says_so(name: str) -> None:
    assert loaded(name).read is None


@pytest.mark.parametrize("name", [name for name in CASES if name != GCD])
@pytest.mark.parametrize("row", [{"other": "19"}, {"answer": None}, {"answer": "  "}])
def test_grader_refuses_a_row_without_an_answer(name: str, row: Row) -> None:
    with pytest.raises(DataError, match="column 'answer'"):
        loaded(name)("19", row)


@pytest.mark.parametrize(
    ("name", "answer", "choices", "said"),
    [
        ("last_number", "nineteen", None, "needs a number"),
        ("math", "nineteen", None, "needs a number or a formula"),
        ("math", "(((", None, "needs a number or a formula"),
        ("choice", "Paris", None, "'Paris' is no choice of a row without a list"),
        ("choice", 1, None, "1 is no choice of a row without a list"),
        ("choice", 3, CITIES, "3 is no choice of the row's 3 choices"),
        ("choice", -1, CITIES, "-1 is no choice"),
        ("choice", "1", CITIES, "an index from 0"),
        ("choice", "D", CITIES, "'D' is no choice"),
        ("choice", "B", ["B", "A"], "'B' fits several choices"),
        ("choice", "Paris", ["Paris", "paris"], "'Paris' fits several choices"),
        ("choice", 26, list(range(30)), "26 is no choice"),
    ],
)
def test_right_answer_that_is_none_is_refused(name: str, answer: object, choices: object, said: str) -> None:
    """Every text would be wrong, and nobody would know why."""
    with pytest.raises(DataError, match=said):
        loaded(name)("5", {"answer": answer, "choices": choices})


@pytest.mark.parametrize("name", [FINAL, "exact", "choice"])
def test_grader_reads_the_named_column(name: str) -> None:
    assert load_grader(name, column="label")("Answer: B" if name != "exact" else "B", {"answer": "C", "label": "B"})


# ------------------------------------------------------------------------------------------------------- any form of it


@given(st.integers(), st.sampled_from(["{:,}", "{}", "{:,}.0", "It is {:,}.", "3 or 4, so {:,}!", "= {:,}"]))
def test_a_number_is_read_however_it_is_printed(number: int, form: str) -> None:
    assert load_grader("last_number").read(form.format(number)) == Decimal(number)


WORDS = st.lists(st.from_regex(r"[A-Za-z][a-z]{1,7}|[0-9]{1,3}|[IA] [a-z]{4,7}", fullmatch=True), max_size=12)
PUNCTUATION = st.sampled_from([" ", ", ", ". ", "\n", ": ", "; ", " (", ") ", "**", " - "])


@given(WORDS, PUNCTUATION)
def test_no_choice_is_read_where_no_letter_stands_alone(words: list[str], between: str) -> None:
    words = [word for word in words if word != "A because"]
    assert load_grader("choice").read(between.join(words)) is None


@given(
    st.sampled_from("ABCDEFGHIJ"), st.sampled_from(["{}", "({})", "Answer: {}", "The answer is ({}).", r"\boxed{{{}}}"])
)
def test_every_letter_is_read_in_every_form(letter: str, form: str) -> None:
    assert load_grader("choice").read(form.format(letter)) == letter
    assert load_grader("choice").read(form.format(letter.lower())) == letter


@settings(max_examples=25, deadline=None)
@given(st.fractions(max_denominator=500))
def test_a_fraction_is_one_answer_however_it_is_written(fraction: Fraction) -> None:
    math, (above, below) = loaded("math"), fraction.as_integer_ratio()
    forms = [f"{above}/{below}", rf"so \boxed{{\frac{{{above}}}{{{below}}}}}", rf"it is ${2 * above}/{2 * below}$"]
    assert {math.read(form) for form in forms} == {str(fraction)}
    assert all(math(form, {"answer": f"{above}/{below}"}) for form in forms)


# ---------------------------------------------------------------------------------------------------------- mathematics

ENDLESS = r"\boxed{9^{9^{9}}}"


@pytest.mark.slow
def test_mathematics_that_takes_too_long_is_a_failure_and_still_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """math-verify's own timeout is no Exception: it would end the run."""
    math = loaded("math")
    monkeypatch.setattr("opsd.evaluation.answers.SECONDS", 1)
    with pytest.warns(OPSDWarning, match=r"1 of 2 rows, first on row 0 \(DataError: math-verify was stopped after 1 s"):
        assert grade(math, [ENDLESS, "5"], [{"answer": "5"}] * 2) == [None, True]
    assert math.read(ENDLESS) == "9^{9^{9}}"


def test_mathematics_works_outside_of_the_main_thread(caplog: pytest.LogCaptureFixture) -> None:
    """Its alarm does not, and it says so in a log."""
    math, got = loaded("math"), []
    thread = threading.Thread(target=lambda: got.extend([math("0.5", {"answer": "1/2"}), math.read("0.5")]))
    thread.start()
    thread.join()
    assert got == [True, "1/2"]
    assert not caplog.records


def test_mathematics_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match=r"pip install 'opsd-toolkit\[math\]'"):
        load_grader("math")


# ---------------------------------------------------------------------------------------------------------------- names


def always(text: str, row: Row) -> bool:
    return True


OWN = Grader("whatever", always, read=len)


def test_grader_keeps_the_name_that_the_user_wrote() -> None:
    for name in ["exact", FINAL, "choice", "operator:contains", f"{__name__}:OWN"]:
        assert load_grader(name).name == name


def test_grader_is_made_of_a_function_a_name_or_a_grader() -> None:
    assert Grader.parse(OWN) is OWN
    assert Grader.parse("exact").name == "exact"
    assert Grader.parse(always) == Grader(f"{__name__}:always", always)
    assert Grader.parse(lambda text, row: False).name.endswith("<lambda>")
    with pytest.raises(ConfigError, match="got a int"):
        Grader.parse(5)


def test_grader_can_be_any_importable_function_or_grader() -> None:
    assert load_grader("operator:contains")("19", "1") is True
    assert load_grader("operator:contains").read is None
    assert load_grader(f"{__name__}:OWN").read("four") == 4


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("last_numbr", "Did you mean 'last_number'"),
        ("nothing_like_it", r"Known: exact, .*regex:Answer: .*reasoning_gym:gcd"),
        ("no_such_module:f", "no_such_module"),
        ("regx:f", "Did you mean 'regex'"),
        ("math:no_such_function", "no_such_function"),
        (":f", "module ''"),
        ("math:pi", "not a function"),
        ("regex", "not complete.*regex:Answer"),
        ("regex:", "not complete.*regex:Answer"),
        ("regex:a(b", "unterminated subpattern"),
        ("reasoning_gym", "not complete.*reasoning_gym:gcd"),
        ("reasoning_gym:chain_sums", "Did you mean 'chain_sum'"),
        ("reasoning_gym:composite", "no scorer"),
    ],
)
def test_unknown_grader_is_refused_with_the_way_out(name: str, said: str) -> None:
    if name.startswith("reasoning_gym:"):
        pytest.importorskip("reasoning_gym")
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        load_grader(name)


@pytest.mark.parametrize("name", sorted(COMPLETED.values()))
def test_the_examples_of_names_are_graders(name: str) -> None:
    assert loaded(name).name == name


@pytest.mark.parametrize(
    ("name", "text", "columns"),
    [
        (FINAL, "Answer: Paris", {"answer": "Paris"}),
        (r"regex:\d+:\d+", "at 10:30", {"answer": "10:30"}),
        ("choice", "The answer is (B).", {"answer": 1, "choices": CITIES}),
        ("math", r"\boxed{1/2}", {"answer": "0.5"}),
    ],
)
def test_every_grader_is_a_reward_by_its_name(name: str, text: str, columns: dict[str, object]) -> None:
    loaded(name)
    reward = load_reward(name)
    assert reward([text, "no idea"], **{key: [value] * 2 for key, value in columns.items()}) == [1.0, 0.0]
    assert reward.__name__ == name


# -------------------------------------------------------------------------------------------------------------- grading


@pytest.mark.parametrize("bad", [0.5, None, "True"])
@pytest.mark.parametrize("make", [Grader.parse, lambda function: function])
def test_grader_that_returns_no_verdict_leaves_the_row_ungraded(make: Callable, bad: object) -> None:
    def run(how: Callable) -> object:
        answers = iter([True, bad, np.bool_(True), 0.0])
        with pytest.warns(OPSDWarning, match=r"'.*lambda.*' failed on 1 of 4 rows, first on row 1 \(DataError"):
            return how(make(lambda text, row: next(answers)), ["a"] * 4, [{}] * 4)

    assert run(grade) == [True, None, True, False]
    assert run(grade_rows) == ([True, False, True, False], [1])


def test_a_grader_that_is_called_gives_a_verdict_or_an_error() -> None:
    with pytest.raises(DataError, match=r"'x' returned 0\.3"):
        Grader("x", lambda text, row: 0.3)("text", {})


def test_texts_and_rows_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="shorter"):
        grade(always, ["a", "b"], [{}])
