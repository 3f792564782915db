"""Reads the answer of a text: the letter of a multiple choice, or a formula.

Knows texts and right answers. Which column holds the right answer, and what a grader is, stands in `graders`.
"""

from __future__ import annotations

import functools
import logging
import re
import string
import threading
from collections.abc import Sequence
from typing import Any

from opsd.errors import ConfigError, DataError

# ------------------------------------------------------------------------------------------------------ multiple choice

# Not part of a word, "D.C.", "A's", "C++", "B-", "x_A", and neither letter of "P(A)". "A" and "I" before a word are the
# article and the pronoun, unless the word cannot follow an article.
_CAPITAL = r"[B-HJ-Z]|I(?!\s+\w)|A(?!\s+(?!(?:is|or|and|because)\b)\w)"
_LETTER = re.compile(rf"(?<![\w.'+\\-])(?<!\w\()(?:{_CAPITAL}|[a-z](?=\)))(?![\w'+#(-]|\.\w)")
_ALONE = re.compile(r"[\s*_\"'`()\[\]{}$#.,:!]*([A-Za-z])[\s*_\"'`()\[\]{}$#.,:!]*")
_BOX = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_STATEMENT = re.compile(
    r"""(?<!/)(?<!wrong\ )(?<!incorrect\ )\b(?i:answer(?:\s+(?:choice|option|letter))?)
    [\s*_"']*(?:[:=>]|\bis\b)  # "answer is", "Answer:", "<answer>"
    [\s*_:"'`“(\[{$]*(?:(?i:option)[\s(]*)?
    ([A-Z]|[a-z](?=[)\]}.*_"'`”$]|[ \t]*$))(?![\w'])
    ([*_"'`”)\]}$.]*\s*(?:,|/|\bor\b|\band\b)\W*[A-Z]\b)?  # a second letter: "A or B", "A, B"
    """,
    re.VERBOSE | re.MULTILINE,
)
_DENIAL = re.compile(r"\b(?:not|never|neither|nor|wrong|incorrect)\b|n't\b", re.IGNORECASE)


def read_choice(text: str) -> str | None:
    """Return the letter that a text chooses, as a capital, or None where it chooses none or several.

    The first of these rules that applies decides:

    1. The first or the last line is a letter and nothing else: "B", "(b)", "**B**".
    2. The last \\boxed{…} holds one letter: "\\boxed{\\text{B}}". A box without a letter is no choice.
    3. The last "answer is X", "Answer: X" or "<answer>X". "The answer is A or B" and "Answer: A, B" are none.
    4. One letter stands in the text, however often, and the text denies nothing: "B) Paris", "It has to be C".

    By rule 4 a letter is a capital, or a small one before ")". "A" is an article before most words ("A dog"), "I" a
    pronoun before all. Sentences are not understood: nothing is read in "A is tempting, but B is correct", nor in "I
    pick B because C is wrong"; and behind "answer is" or "Answer:" an "A" is the letter, also in "Answer: A dog". So
    let the prompt ask for one of the forms of rules 1 to 3.

    Example:
        >>> read_choice("A means London. The answer is (b).")
        'B'
    """
    text = text.replace("’", "'")
    lines = text.strip().splitlines() or [""]
    alone = {match[1].upper() for line in (lines[0], lines[-1]) if (match := _ALONE.fullmatch(line))}
    if alone:
        return _only(alone)
    if boxes := _BOX.findall(text):
        content = re.sub(r"\\[a-z]+|[{}$]", " ", boxes[-1])
        match = _ALONE.fullmatch(content)
        return match[1].upper() if match else _only(_letters(content))
    if statements := list(_STATEMENT.finditer(text)):
        letter, second = statements[-1].groups()
        return None if second else letter.upper()
    return None if _DENIAL.search(text) else _only(_letters(text))


def _letters(text: str) -> set[str]:
    return {letter.upper() for letter in _LETTER.findall(text)}


def _only(letters: set[str]) -> str | None:
    return letters.pop() if len(letters) == 1 else None


def right_choice(answer: Any, choices: Any) -> str:
    """Return the letter of a row's right answer.

    Args:
        answer: a letter ("B", "(b)"); in a row with choices also an index from 0 (an int), or the text of a choice.
        choices: the row's list of choices; anything that is not a list counts as none.

    Raises:
        DataError: `answer` is none of these, or fits several choices.
    """
    texts = [str(each).strip().casefold() for each in choices] if isinstance(choices, list | tuple) else []
    if isinstance(answer, int) and not isinstance(answer, bool):
        positions = {answer} & set(range(len(texts)))
    else:
        positions = _positions(str(answer), texts)
    if len(positions) != 1 or max(positions) >= len(string.ascii_uppercase):
        raise DataError(_not_one_choice(answer, texts, len(positions)))
    return string.ascii_uppercase[positions.pop()]


def _positions(answer: str, texts: Sequence[str]) -> set[int]:
    """Return the choices that an answer may mean, by their text or their letter."""
    by_text = {position for position, text in enumerate(texts) if text == answer.strip().casefold()}
    letter = _ALONE.fullmatch(answer)
    position = string.ascii_uppercase.index(letter[1].upper()) if letter else len(texts)
    return by_text | {position} if letter and (position < len(texts) or not texts) else by_text


def _not_one_choice(answer: Any, texts: Sequence[str], count: int) -> str:
    means = "fits several choices" if count > 1 else "is no choice"
    row = f"the row's {len(texts)} choices" if texts else "a row without a list in the column 'choices'"
    return (
        f"grader 'choice' needs a right answer that is one letter, and {answer!r} {means} of {row}.\n"
        "Without one every text would be graded wrong. Write a letter; in a row with a list of choices also an index "
        "from 0 (an int), or the text of a choice."
    )


# ---------------------------------------------------------------------------------------------------------- mathematics

SECONDS = 5  # limit of math-verify for one text or one comparison; its default
_MARKS = ("$", r"\boxed", r"\(", r"\[")
_NAMES = re.compile(r"\\text\s*\{[^}]*\}|\\[A-Za-z]+|\b(?:sqrt|pi|exp|ln|log|sin|cos|tan)\b")
_PROSE = re.compile(r"[A-Za-z]{2,}|[\w)]\s+[A-Za-z]|\n")


class Mathematics:
    """Reads formulas in texts and compares them, with math-verify.

    In a text a formula stands in \\boxed{…}, $…$ or \\(…\\), or is a number; math-verify takes the one that is
    announced or boxed, else the last. A text that is nothing but a formula, as right answers are, needs no marks.

    The time limit, SECONDS, holds in the main thread only: math-verify's alarm does not work in others, where a text
    such as 9^9^9 may take arbitrarily long.

    Raises:
        ConfigError: math-verify is not installed.

    Example:
        >>> Mathematics().is_right("so x = 1/2", "0.5")
        True
    """

    def __init__(self) -> None:
        try:
            import math_verify
            from math_verify.errors import TimeoutException
            from math_verify.utils import timeout
        except ImportError as error:
            raise ConfigError(
                "grader 'math' compares formulas with math-verify, which is not installed.\n"
                "Install it with `pip install 'opsd-toolkit[math]'`. For plain numbers 'last_number' needs nothing."
            ) from error
        self._library, self._timeout, self._too_long = math_verify, timeout, TimeoutException
        # It warns of every text it cannot read, and of threads; both are handled here.
        logging.getLogger("math_verify").setLevel(logging.ERROR)

    def is_right(self, text: str, gold: str) -> bool:
        """Return whether a text's answer equals the right one: "0.5" and "1/2", "x = 3" and "3", "50%" and "50" do.

        Raises:
            DataError: the right answer is not a formula, or the comparison took longer than SECONDS.
        """
        try:
            expected = self._parse(gold.rpartition("####")[2], raise_on_error=True)  # GSM8K's end in "#### 72"
            if not _is_formula(expected):
                raise DataError(
                    f"grader 'math' needs a number or a formula as the right answer, and got {gold!r}.\n"
                    "Without one every text would be graded wrong. Put LaTeX in $…$, or use 'exact' for words."
                )
            # The order matters: "x = 3" is right where 3 is expected, but not the other way round.
            answer = self._parse(text, raise_on_error=True)
            return bool(self._library.verify(expected, answer, timeout_seconds=_limit(), raise_on_error=True))
        except self._too_long as error:  # not an Exception: nothing else would catch it
            raise DataError(
                f"math-verify was stopped after {SECONDS} seconds; the text ends in {text[-80:]!r}"
            ) from error

    def read(self, text: str) -> str | None:
        """Return the formula that a text answers, or None where it has none.

        Equal formulas are mostly written alike: numbers as fractions, sums in one order, "x = 3" as "3". A formula
        that cannot be evaluated within SECONDS is returned as it stands in the text.
        """
        parsed = self._parse(text, raise_on_error=False)
        if not _is_formula(parsed):
            return None
        try:
            return self._timeout(_limit())(_canonical)(parsed[0])
        except (Exception, self._too_long):  # limits of sympy, such as numbers of more than 4,300 digits
            return str(parsed[-1])

    def _parse(self, text: str, raise_on_error: bool) -> list[Any]:
        text = text.replace("−", "-").strip()
        parse = functools.partial(self._library.parse, parsing_timeout=_limit(), raise_on_error=raise_on_error)
        bare = text.rstrip(".")
        if bare and not any(mark in bare for mark in _MARKS) and not _PROSE.search(_NAMES.sub("", bare)):
            parsed = parse(f"${bare}$")
            if _is_formula(parsed):
                return parsed
        return parse(text)


def _is_formula(parsed: list[Any]) -> bool:
    # math-verify returns text that it cannot parse as a string, beside or instead of a sympy expression.
    return bool(parsed) and not isinstance(parsed[0], str)


def _limit() -> int | None:
    return SECONDS if threading.current_thread() is threading.main_thread() else None


def _canonical(formula: Any) -> str:
    import sympy

    if isinstance(formula, sympy.Equality) and (formula.lhs.is_Symbol or formula.lhs.is_number):
        formula = formula.rhs
    return str(sympy.simplify(sympy.nsimplify(formula, rational=True)))
