"""What a text answers, where that takes more than a line: the letter of a multiple choice, and mathematics.

Knows texts and right answers as rows write them; which column holds one, and what a grader is, stands in `graders`.
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

# "A" is an article and "I" a pronoun where another word follows, unless the word is one that cannot follow those.
_AFTER_EITHER = r"is|has|does|because|since|and|or|nor"
_AFTER_A = rf"{_AFTER_EITHER}|was|as|but|if|for|with|from|which|must|would|should|can|could|may|might|seems|looks"
_CAPITAL = rf"""(?:
    [B-HJ-Z]
  | (?:(?<=[Oo]ption\ )|(?<=[Cc]hoice\ )|(?<=[Ll]etter\ )|(?<=[Aa]nswer\ ))[AI]
  | A(?![ \t]+(?!(?:{_AFTER_A})\b)\w)
  | I(?![ \t]+(?!(?:{_AFTER_EITHER})\b)\w)
)"""
# Not in a word, "D.C.", "A's", "C++", "B-", "x_A", and neither letter of "P(A)".
_BEFORE, _BEHIND = r"(?<![\w.'+\\-])(?<!\w\()", r"(?![\w'+#(-]|\.\w)"
_MENTION = re.compile(rf"{_BEFORE}(?:{_CAPITAL}|\([a-z]\)){_BEHIND}", re.VERBOSE)
# Behind "the answer is" a small letter counts too, if nothing follows that would make it the article.
_NAMED = re.compile(
    rf"""[\s*_"'`“(\[{{$]*{_BEFORE}({_CAPITAL}|[a-z](?=[)\]}}*_"'`.$]|[ \t]*(?:\n|$))){_BEHIND}[*_"'`”)\]}}$]*""",
    re.VERBOSE,
)
_ANOTHER = re.compile(r"\s*(?:,\s*(?:and|or)\b|,|/|&|\band\b|\bor\b)\s*(?:(?:maybe|option|choice)\s+)?", re.IGNORECASE)
_CLAUSE = re.compile(r"\s+(?:is|was|has|does|can|would|isn|wasn|doesn)\b")
_STATEMENT = re.compile(
    r"""(?:
        (?<!wrong\ )(?<!incorrect\ )(?<!/)\b
        (?: answer(?:\s+(?:choice|option|letter))? | (?:correct|right|best|final|my)\s+(?:choice|option|letter)
          | (?:choice|option|letter)(?=\s*:) )\b
        (?:\s+(?:to|for|of|here)\b[^.:\n]{0,80}?)?
        [\s*_"']*(?: [:：=>] | \b(?:is|are|(?:would|should|must|will)\s+be)\b )[\s*_:]*
      | (?<!not\ )(?<!n't\ )\b(?:pick|choose|chose|select|selected|go\ with|going\ with|opt\ for)\b\s*
    )
    (?:(?:therefore|thus|hence|clearly|probably|likely|definitely)\b,?\s*)?
    (?:(?:the\s+)?(?:answer|option|choice|letter)\b[\s*_:]*)?""",
    re.VERBOSE | re.IGNORECASE,
)
_RIGHT = re.compile(r"[\s*_)\]\"']*\b(?:is|must be|would be)\s+(?:the\s+)?(?:only\s+)?(?:correct|right|best|answer)\b")
_UNSURE = re.compile(r"\b(?:[Ii]f|[Ww]hy|[Ww]hether|[A-Z]\W*\s(?:and|or|nor))(?:\s+(?:option|choice))?\W*$")
_NEGATED = re.compile(
    r"(?:\bnot|n't|\bnever)(?:\s+(?:be|pick|choose|select|say|think))?(?:\s+(?:that|option|choice))?[\s(*_]*$",
    re.IGNORECASE,
)
_CALLED_WRONG = re.compile(r"[\s*_)\]\"']*(?:\bis|\bseems)(?:\s+(?:not|wrong|incorrect|false)\b|n't)")
_ALONE = re.compile(r"[\s*_\"'`()\[\]{}$#.,:!]*([A-Za-z])[\s*_\"'`()\[\]{}$#.,:!]*")
_BOX = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_LABEL = re.compile(r"[\s*_#>-]*\(?([A-Za-z])([).])(?=[\s*_]|$)")


def read_choice(text: str) -> str | None:
    """Return the letter that a text chooses, as a capital, or None where it chooses none or several.

    The first of these rules that applies decides, and if it finds two letters there is no answer:

    1. The first or the last line is a letter and nothing else: "B", "(b)", "**B**".
    2. The last \\boxed{…}: "\\boxed{\\text{B}}". A box that holds no letter is an answer that is no choice.
    3. The last statement: "the answer is B", "Answer: (b)", "I pick B". "The answer is A or B" is no answer.
    4. What the text calls right: "A is tempting, but B is correct".
    5. The text begins with an option's label: "B) Paris". A list of options is no answer.
    6. Of the letters that the text does not deny ("not A", "A is wrong"), only one stands in it, however often.

    Letters are capitals that stand alone, or small ones as "(b)"; rules 1, 2, 3 and 5 also read a small letter without
    brackets. "A" and "I" before another word are the article and the pronoun ("A dog", "I think"), except before a
    word that can follow neither ("A is", "A because") and in "option A". Statements are read in English.
    """
    text = text.replace("’", "'")
    for rule in (_alone, _boxed, _stated, _called_right, _labelled, _letters):
        letters = rule(text)
        if letters is not None:
            return letters.pop() if len(letters) == 1 else None
    return None


def _alone(text: str) -> set[str] | None:
    lines = text.strip().splitlines() or [""]
    found = [_ALONE.fullmatch(line) for line in (lines[0], lines[-1])]
    return {match[1].upper() for match in found if match} or None


def _boxed(text: str) -> set[str] | None:
    boxes = _BOX.findall(text)
    if not boxes:
        return None
    content = re.sub(r"\\[a-z]+|[{}$]", " ", boxes[-1])
    return _alone(content) or _letters(content)


def _stated(text: str) -> set[str] | None:
    for statement in reversed(list(_STATEMENT.finditer(text))):
        letters, named = set(), _NAMED.match(text, statement.end())
        while named:
            letters.add(named[1].upper())
            another = _ANOTHER.match(text, named.end())
            named = _NAMED.match(text, another.end()) if another else None
            if named and _CLAUSE.match(text, named.end()):  # "the answer is B, A is wrong"
                named = None
        if letters:
            return letters
    return None


def _called_right(text: str) -> set[str] | None:
    called = (mention for mention in _MENTION.finditer(text) if _RIGHT.match(text, mention.end()))
    return {
        _letter(each) for each in called if not (_NEGATED.search(_before(each)) or _UNSURE.search(_before(each)))
    } or None


def _labelled(text: str) -> set[str] | None:
    label = _LABEL.match(text)
    if label is None:
        return None
    where = r"(?<![\w'])" if label[2] == ")" else r"^[\s*_#>-]*"  # a full stop also ends sentences
    return {letter.upper() for letter in re.findall(rf"{where}([A-Za-z])\{label[2]}", text, re.MULTILINE)}


def _letters(text: str) -> set[str]:
    return {_letter(mention) for mention in _MENTION.finditer(text) if not _is_denied(mention)}


def _is_denied(mention: re.Match[str]) -> bool:
    return bool(_NEGATED.search(_before(mention)) or _CALLED_WRONG.match(mention.string, mention.end()))


def _before(mention: re.Match[str]) -> str:
    return mention.string[max(0, mention.start() - 40) : mention.start()]


def _letter(mention: re.Match[str]) -> str:
    return mention[0].strip("()").upper()


def right_choice(answer: Any, choices: Any) -> str:
    """Return the letter of a row's right answer.

    Args:
        answer: a letter ("B", "(b)"); with choices also an index that counts from 0 (an int), or the text of one.
        choices: the row's list of choices; anything else means that it has none.

    Raises:
        DataError: it is none of these, or could be two of them.
    """
    texts = [str(each).strip().casefold() for each in choices] if isinstance(choices, list | tuple) else []
    if isinstance(answer, int) and not isinstance(answer, bool):
        found = {answer} & set(range(len(texts)))
    else:
        found = _positions(str(answer), texts)
    if len(found) != 1 or max(found) >= len(string.ascii_uppercase):
        raise DataError(_no_choice(answer, texts, len(found)))
    return string.ascii_uppercase[found.pop()]


def _positions(answer: str, texts: Sequence[str]) -> set[int]:
    found = {position for position, text in enumerate(texts) if text == answer.strip().casefold()}
    letter = _ALONE.fullmatch(answer)
    position = string.ascii_uppercase.index(letter[1].upper()) if letter else len(texts)
    return found | {position} if letter and (position < len(texts) or not texts) else found


def _no_choice(answer: Any, texts: Sequence[str], count: int) -> str:
    means = "could be several choices" if count > 1 else "is no choice"
    beside = f"the row's {len(texts)} choices" if texts else "a row without a list in the column 'choices'"
    return (
        f"grader 'choice' needs a right answer that is one letter, and {answer!r} {means} of {beside}.\n"
        "Without one no text could ever be right. Write a letter; with a list of choices an int that counts from 0, "
        "or the text of one, will do as well."
    )


# ---------------------------------------------------------------------------------------------------------- mathematics

SECONDS = 5  # that math-verify takes for one text or one comparison at most; its own default
_MARKS = ("$", r"\boxed", r"\(", r"\[")
_NAMES = re.compile(r"\\text\s*\{[^}]*\}|\\[A-Za-z]+|\b(?:sqrt|pi|exp|ln|log|sin|cos|tan)\b")
_PROSE = re.compile(r"[A-Za-z]{2,}|[\w)]\s+[A-Za-z]|\n")


class Mathematics:
    """math-verify: reads formulas in texts and tells whether two are equal.

    In a text, a formula stands in \\boxed{…}, $…$ or \\(…\\), or is a number; math-verify takes the answer that is
    announced or boxed, else the last. What is a formula and nothing else, as right answers are, needs no marks.

    It is stopped after SECONDS in the main thread. Its alarm works in no other, where a text such as 9^9^9 takes as
    long as it takes.

    Raises:
        ConfigError: math-verify is not installed.
    """

    def __init__(self) -> None:
        try:
            import math_verify
            from math_verify.errors import TimeoutException
            from math_verify.utils import timeout
        except ImportError as error:
            raise ConfigError(
                "grader 'math' compares formulas with math-verify, which is not installed.\n"
                "Install it with `pip install 'opsd[math]'`. For numbers alone, 'last_number' needs nothing."
            ) from error
        self._library, self._timeout, self._too_long = math_verify, timeout, TimeoutException
        # It warns of every text it gives up on, and of threads; both are dealt with here.
        logging.getLogger("math_verify").setLevel(logging.ERROR)

    def is_right(self, text: str, gold: str) -> bool:
        """Return whether a text's answer equals the right one, as do "0.5" and "1/2", "x = 3" and "3", "50%" and "50".

        Raises:
            DataError: the right answer is no formula, or the comparison took too long.
        """
        try:
            expected = self._parse(gold.rpartition("####")[2], raise_on_error=True)  # GSM8K's end in "#### 72"
            if not _is_formula(expected):
                raise DataError(
                    f"grader 'math' needs a number or a formula as the right answer, and found {gold!r}.\n"
                    "Without one no text could ever be right. Put LaTeX in $…$, or use 'exact' for answers in words."
                )
            # The order matters: a text may answer "x = 3" to 3, and only the right answer says what counts.
            found = self._parse(text, raise_on_error=True)
            return bool(self._library.verify(expected, found, timeout_seconds=_limit(), raise_on_error=True))
        except self._too_long as error:  # no Exception, so nobody else would catch it
            raise DataError(
                f"math-verify was stopped after {SECONDS} seconds; the text ends in {text[-80:]!r}"
            ) from error

    def read(self, text: str) -> str | None:
        """Return the formula that a text answers, or None where it has none.

        Two that are equal are mostly written the same: numbers as fractions, sums in one order, "x = 3" as "3". What
        cannot be evaluated in SECONDS stays as the text has it.
        """
        found = self._parse(text, raise_on_error=False)
        if not _is_formula(found):
            return None
        try:
            return self._timeout(_limit())(_canonical)(found[0])
        except (Exception, self._too_long):  # sympy's own limits, such as numbers of more than 4,300 digits
            return str(found[-1])

    def _parse(self, text: str, raise_on_error: bool) -> list[Any]:
        text = text.replace("−", "-").strip()
        parse = functools.partial(self._library.parse, parsing_timeout=_limit(), raise_on_error=raise_on_error)
        bare = text.rstrip(".")
        if bare and not any(mark in bare for mark in _MARKS) and not _PROSE.search(_NAMES.sub("", bare)):
            found = parse(f"${bare}$")
            if _is_formula(found):
                return found
        return parse(text)


def _is_formula(found: list[Any]) -> bool:
    # What math-verify cannot parse it returns as a string, beside or instead of sympy's expression.
    return bool(found) and not isinstance(found[0], str)


def _limit() -> int | None:
    return SECONDS if threading.current_thread() is threading.main_thread() else None


def _canonical(formula: Any) -> str:
    import sympy

    if isinstance(formula, sympy.Equality) and (formula.lhs.is_Symbol or formula.lhs.is_number):
        formula = formula.rhs
    return str(sympy.simplify(sympy.nsimplify(formula, rational=True)))
