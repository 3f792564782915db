"""Graders against tables: which texts are right, what a text answers, and what cannot be graded."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsd.errors import ConfigError, DataError, OPSDWarning
from opsd.evaluation.graders import COMPLETED, GRADERS, Grader, Row, grade, grade_rows, load_grader
from opsd.rewards import load_reward

FINAL = r"regex:(?i)answer: *(\w+)"
GCD = "reasoning_gym:gcd"
CITIES = ["London", "Paris", "Rome"]

# The name of a grader: a text, the row's answer (a row, where more than that is read), whether the text is right.
CASES: dict[str, list[tuple[str, object, bool]]] = {
    "exact": [
        (" Nineteen\n", "nineteen", True),
        ("19", 19, True),
        ("nineteen.", "nineteen", False),
        ("", "nineteen", False),
    ],
    "last_number": [
        ("5-3=2", "2", True),
        ("5-3", "3", True),
        ("(2+6)-3", "-3", False),
        ("the result is -3.", "-3", True),
        ("the result is −3", "-3", True),
        ("3", "-3", False),
        ("=-3", -3, True),
        ("about 1,250.0 in all", "1250", True),
        ("12,34", "34", True),
        ("1,2,3", "123", False),
        ("1,2345", "2345", True),
        ("first 7, then 8", "7", False),
        ("0.10", "0.1", True),
        ("9007199254740993", "9007199254740992", False),
        ("no idea", "19", False),
        ("19", "12 + 7 = 19", True),
    ],
    "contains": [
        ("It's Paris.", "paris", True),
        ("Parisian", "Paris", False),
        ("It is 1.5", "5", False),
        ("It is 5.2", "5", False),
        ("It is -5", "5", False),
        ("It is 5.", "5", True),
        ("a+b?", "a+b", True),
        ("aab", "a+b", False),
    ],
    FINAL: [
        ("Answer: Paris", "paris ", True),
        ("answer:PARIS, I think", "Paris", True),
        ("Answer: Rome. No. Answer: Paris", "Paris", True),
        ("Answer: Rome. No. Answer: Paris", "Rome", False),
        ("It is Paris", "Paris", False),
    ],
    r"regex:\d+:\d+": [("from 9:15 to 10:30", "10:30", True), ("from 10:30 to 9:15", "10:30", False)],
    "choice": [
        ("The answer is B", "B", True),
        ("(b)", "(B)", True),
        ("B", "b.", True),
        ("Paris", "B", False),
        ("B", "C", False),
        ("no idea", "B", False),
        ("B", {"answer": 1, "choices": CITIES}, True),
        ("A", {"answer": 0, "choices": CITIES}, True),
        ("A", {"answer": 1, "choices": CITIES}, False),
        ("(B)", {"answer": " paris", "choices": CITIES}, True),
        ("C", {"answer": "c", "choices": CITIES}, True),
        ("A", {"answer": True, "choices": ["True", "False"]}, True),
        ("D", {"answer": "5", "choices": [2, 3, 4, 5]}, True),
        ("A", {"answer": "x", "choices": ["x", "y"]}, True),
        ("D", {"answer": "D", "choices": {"text": CITIES, "label": ["A", "B", "C"]}}, True),
    ],
    "math": [
        ("1/2", "0.5", True),
        (r"so it is $\frac{1}{2}$.", "1/2", True),
        (r"\boxed{\frac12}", r"\frac{1}{2}", True),
        (r"\boxed{1+x}", "x+1", True),
        ("x + 1", "x+1", True),
        ("2x+1", "2", False),
        ("2", "2x+1", False),
        (r"$x(x+1)$", r"x^2 + x", True),
        (r"\boxed{2\sqrt2}", r"\sqrt{8}", True),
        (r"$\sqrt{2}$", "sqrt(2)", True),
        ("x = 3", "3", True),
        ("-3", "3", False),
        ("it is −3", "-3", True),
        ("1,234", "1234", True),
        ("50%", "0.5", True),
        (r"\boxed{\{2, 1\}}", "1, 2", True),
        ("(1, 2)", r"$(1,2)$", True),
        ("(1, 2)", "(2, 1)", False),
        (r"first $3$, then $\boxed{4}$, not 5", "4", True),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", True),
        ("$(1,2)$", "$1<x<2$", True),
        ("$1<x<2$", "$(1,2)$", False),
        ("The total is 24.", "The answer per day is 12.\n#### 24", True),
        ("12", "12 apples", True),
        ("no idea", "19", False),
        (r"\boxed{", "19", False),
    ],
    GCD: [
        (" 12\n", {"answer": "12", "metadata": {}}, True),
        # The scorer itself gives this a part of a point.
        ("The sum is 12", {"answer": "12", "metadata": {}}, False),
    ],
}

# The name of a grader: a text, and what it answers; None for no answer in the form asked for.
READ: dict[str, list[tuple[str, object]]] = {
    "exact": [(" Nineteen\n", "nineteen"), ("  \n", None)],
    "last_number": [("5-3=-1,250.0", Decimal(-1250)), ("0.10", Decimal("0.1")), ("no idea", None)],
    FINAL: [
        ("Answer: Rome. No. Answer: PARIS", "paris"),
        ("Answer: ?", None),
        ("It is Paris", None),
    ],
    r"regex:\d+:\d+": [("from 9:15 to 10:30", "10:30"), ("at 9", None)],
    r"regex:(\d+)|none": [("12", "12"), ("none", None)],
    r"regex:= *(.*)": [("= ", None)],
    "choice": [
        # a letter and nothing else, on the first or the last line
        ("B", "B"),
        ("(B)", "B"),
        (" b\n", "B"),
        ("B.", "B"),
        ("**D**", "D"),
        ("A", "A"),
        ("I", "I"),
        ("B\n\nQuestion: and then?\nAnswer: C", "B"),
        ("A is tempting, and so is B.\n\nC", "C"),
        ("B\nC", None),
        # a box
        (r"\boxed{C}", "C"),
        (r"So it is $\boxed{\text{c}}$, not B.", "C"),
        (r"\boxed{\textbf{(C)}}", "C"),
        (r"\boxed{\text{B) Paris}}", "B"),
        (r"The answer is A. No: \boxed{B}. Or rather \boxed{C}.", "C"),
        (r"\boxed{42}, so B", None),
        (r"\boxed{A, B}", None),
        # a statement
        ("The answer is B", "B"),
        ("The answer is B, A is wrong", "B"),
        ("the answer is b.", "B"),
        ("the answer is a", "A"),
        ("the answer is a matter of taste", None),
        ("The answer is A because A is larger than B", "A"),
        ("The answer is A. No, wait: the answer is B. C is cold.", "B"),
        ("The answer is not A. The answer is B.", "B"),
        ("The answer is A or B", None),
        ("Answer: A, B, and C", None),
        ("Answer: B or maybe C", None),
        ("Answer: (b)", "B"),
        ("ANSWER: C. D is a trap.", "C"),
        ("**Answer:** B, as A is cold", "B"),
        ("Answer: A dog is an animal", None),
        ("The correct answer is **B) Paris**, as A is cold.", "B"),
        ("The correct option is B. A is cold.", "B"),
        ("The answer to question C is D.", "D"),
        ("The answer is therefore option (D), C is out", "D"),
        ("The answer must be: “B”. A and C are out", "B"),
        ("The wrong answer is A. Is it B?", None),
        ("The answer is $B$ and not $A$", "B"),
        ("A? C? <answer>B</answer>\nC is out, so is A.", "B"),
        ('{"answer": "B", "why": "A is cold"}', "B"),
        ("I would pick B because A is wrong", "B"),
        ("I’d go with B, for I don’t trust A", "B"),
        ("I wouldn't pick A", None),
        ("I wouldn’t pick A", None),
        ("The options are:\nA) London\nB) Paris\nIt is hard to tell.", None),
        # what is called right or wrong
        ("A is tempting, but B is correct", "B"),
        ("A is not the answer. C is the answer, although B looks good", "C"),
        ("A is correct. B is correct.", None),
        ("If A is correct, so is B", None),
        ("I don't think that A is right. C?", "C"),
        ("Neither A nor B is correct", None),
        ("A is wrong and B is correct", "B"),
        # labels
        ("B) Paris, since A means London", "B"),
        ("b) Paris", "B"),
        ("B. A big city", "B"),
        ("B. Because A means London", "B"),
        ("B. It is rich in vitamin C. So it is healthy.", "B"),
        ("A) London\nB) Paris\nC) Rome", None),
        ("A) London B) Paris C) Rome", None),
        ("A. London\nB. Paris", None),
        # a single letter
        ("So it has to be C", "C"),
        ("I think it must be (c).", "C"),
        ("I think A dog says C. C, I say.", "C"),
        ("Option A feels right", "A"),
        ("So A is larger", "A"),
        ("A or B", None),
        ("Not B but C", "C"),
        ("A is wrong", None),
        ("It isn't A.", None),
        # no letter at all
        ("A dog", None),
        ("I think so", None),
        ("I'm not sure", None),
        ("Washington, D.C. it is", None),
        ("P(A) and f(x), C++ or a B-movie", None),
        ("", None),
        (" \n", None),
    ],
    "math": [
        ("1/2", "1/2"),
        (r"so $\frac{2}{4}$", "1/2"),
        (".5", "1/2"),
        ("50%", "1/2"),
        ("it is 0.5", "1/2"),
        ("x=3", "3"),
        ("$2 + 1 = 3$", "3"),
        ("$x + y = 3$", "Eq(x + y, 3)"),
        ("$5!$", "120"),
        ("$x^2 + x$", "x*(x + 1)"),
        ("$x(x+1)$", "x*(x + 1)"),
        ("1 + x", "x + 1"),
        (r"$2^{10}$", "1024"),
        (r"$\{2, 1\}$", "{1, 2}"),
        (r"$\begin{pmatrix}1\\2\end{pmatrix}$", "Matrix([[1], [2]])"),
        ("10^5000", "10^5000"),  # more digits than Python writes
        ("Paris", None),
        (r"$\frac{1}{$", None),
        ("", None),
    ],
}
NO_FORM = ["contains", GCD]


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
        ("choice", "1", CITIES, "an int that counts from 0"),
        ("choice", "D", CITIES, "'D' is no choice"),
        ("choice", "B", ["B", "A"], "'B' could be several choices"),
        ("choice", "Paris", ["Paris", "paris"], "'Paris' could be several choices"),
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
    taken = {"because", "since", "was", "with", "from", "which", "must", "would", "should", "could", "might", "seems"}
    words = [word for word in words if word.split()[-1] not in {*taken, "looks"}]
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
    with pytest.raises(ConfigError, match=r"pip install 'opsd\[math\]'"):
        load_grader("math")


# ---------------------------------------------------------------------------------------------------------------- names


def always(text: str, row: Row) -> bool:
    return True


OWN = Grader("whatever", always, read=len)


def test_grader_keeps_the_name_that_the_user_wrote() -> None:
    for name in ["exact", FINAL, "choice", "operator:contains", f"{__name__}:OWN"]:
        assert load_grader(name).name == name


def test_grader_is_made_of_a_function_a_name_or_a_grader() -> None:
    assert Grader.of(OWN) is OWN
    assert Grader.of("exact").name == "exact"
    assert Grader.of(always) == Grader(f"{__name__}:always", always)
    assert Grader.of(lambda text, row: False).name.endswith("<lambda>")
    with pytest.raises(ConfigError, match="this is a int"):
        Grader.of(5)


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
@pytest.mark.parametrize("make", [Grader.of, lambda function: function])
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
