"""Graders: whether a text is a right answer to a row, and what it answers.

One table, `GRADERS`; `load_grader` finds one by name. Knows texts and rows only. A grader that cannot grade a row
raises: `grade` reports such rows, which are never silently wrong.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from opsd.data.needs import Need
from opsd.data.values import is_empty, without_nan
from opsd.errors import ConfigError, DataError, OPSDWarning, did_you_mean
from opsd.evaluation.answers import Mathematics, read_choice, right_choice
from opsd.sources import import_object

Row = Mapping[str, Any]

# A sign belongs to the number unless it stands behind an operand, as in "5-3" or "(2+3)-1". Commas count between
# groups of three digits only, so that "1,2,3" is three numbers.
NUMBER = re.compile(r"(?:(?<![\w)])[-+−])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")


@dataclass(frozen=True)
class Grader:
    """Tells right answers from wrong ones: called with a text and its row, it returns True or False.

    Args:
        name: as the user wrote it; printed beside every figure.
        is_right: returns True or False for a text and its row. Any other value, and any exception, is a failure of the
            grader, not a grade.
        read: returns the answer that a text gives, equal for texts that give the same answer; None where a text has no
            answer in the form asked for. `maj@k` and `format` need it. None if the grader cannot read answers.
        needs: the columns that it reads.

    Example:
        >>> load_grader("last_number")("12 + 7 is 19.", {"answer": "19"})
        True
        >>> Grader("short", lambda text, row: len(text) < 20)("A short text", {})
        True
    """

    name: str
    is_right: Callable[[str, Row], bool]
    read: Callable[[str], Hashable | None] | None = None
    needs: tuple[Need, ...] = ()

    def __call__(self, text: str, row: Row) -> bool:
        """Return whether the text is a right answer to the row.

        Raises:
            DataError: `is_right` returned something else than True or False.
        """
        verdict = self.is_right(text, row)
        # A reward of 0.3 is truthy: as a bool it would count as a right answer.
        if verdict not in (True, False):
            raise DataError(f"a grader must return True or False, and {self.name!r} returned {verdict!r}")
        return bool(verdict)

    def answer(self, text: str) -> str | None:
        """Return the answer that a text gives, as text, equal for equal answers; None where it has none."""
        try:
            answer = None if self.read is None else self.read(text)
        except Exception:  # a text that cannot be read has no answer in the form asked for
            return None
        return _as_text(answer) if isinstance(answer, Decimal) else None if answer is None else str(answer)

    @classmethod
    def parse(cls, value: Grader | Callable[[str, Row], bool] | str) -> Grader:
        """Return a grader from a grader, a name for `load_grader`, or a function of (text, row).

        Raises:
            ConfigError: `value` is none of these.
        """
        if isinstance(value, Grader):
            return value
        if isinstance(value, str):
            return load_grader(value)
        if not callable(value):
            raise ConfigError(
                f"a grader is a name or a function of (text, row), and got a {type(value).__name__}.\n"
                "It is called once per row and returns True or False. Names: " + ", ".join(_names()) + "."
            )
        name = f"{value.__module__}:{value.__qualname__}" if hasattr(value, "__qualname__") else type(value).__name__
        return cls(name, value)


def exact(name: str, column: str) -> Grader:
    """Make a grader: a text is right if it equals the answer, ignoring case and surrounding space."""
    return Grader(name, lambda text, row: _folded(text) == _folded(_answer(row, column)), _folded)


def last_number(name: str, column: str) -> Grader:
    """Make a grader: the last number in a text must equal the last number in the answer ("1,250.0" equals "1250").

    Decimal notation only: it reads 2 in "1/2" and 5 in "1e5". A right answer without a number is a DataError.
    """

    def is_right(text: str, row: Row) -> bool:
        expected = _last_number(_answer(row, column))
        if expected is None:
            raise DataError(
                f"grader {name!r} needs a number in the column {column!r}, and got {row[column]!r}.\n"
                "Without one every text would be graded wrong. Use 'exact' or 'contains' for answers in words."
            )
        return _last_number(text) == expected

    return Grader(name, is_right, _last_number)


def contains(name: str, column: str) -> Grader:
    """Make a grader: the answer must stand in the text as a whole word, ignoring case.

    "Paris" is in "It's Paris." but not in "Parisian"; "5" is neither in "1.5" nor in "-5". A text that names several
    answers is right if one of them is. This grader is the most lenient, and cannot read what a text answers.
    """

    def is_right(text: str, row: Row) -> bool:
        whole_word = rf"(?<![\w-])(?<!\d[.,]){re.escape(_answer(row, column))}(?!\w|[.,]\d)"
        return re.search(whole_word, text, re.IGNORECASE) is not None

    return Grader(name, is_right)


def regex(name: str, column: str) -> Grader:
    """Make a grader: the first group of the pattern's last match, or the whole match, is compared as `exact` does.

    Args:
        name: "regex:PATTERN" in Python's syntax, with flags such as `(?i)` in front; colons belong to the pattern.
        column: holds the right answer.

    Raises:
        ConfigError: the pattern is invalid.
    """
    try:
        pattern = re.compile(name.partition(":")[2])
    except re.error as error:
        raise ConfigError(
            f"grader {name!r} has a pattern that Python's `re` cannot read: {error}.\n"
            "A text's answer is the first group of its last match. Fix the pattern; a literal ( or [ is \\( or \\[."
        ) from error

    def read(text: str) -> str | None:
        matches = list(pattern.finditer(text))
        return _folded((matches[-1][1] if pattern.groups else matches[-1][0]) or "") if matches else None

    return Grader(name, lambda text, row: read(text) == _folded(_answer(row, column)), read)


def choice(name: str, column: str) -> Grader:
    """Make a grader: the letter that a text chooses (see `read_choice`) must be the right one.

    The right answer is a letter; in a row with a list `choices` also an index from 0, or the text of a choice.
    """

    def is_right(text: str, row: Row) -> bool:
        _answer(row, column)
        return read_choice(text) == right_choice(row[column], row.get("choices"))

    return Grader(name, is_right, read_choice)


def math(name: str, column: str) -> Grader:
    """Make a grader: the text's formula must be mathematically equal to the answer, see `Mathematics`.

    Raises:
        ConfigError: math-verify is not installed.
    """
    mathematics = Mathematics()
    return Grader(name, lambda text, row: mathematics.is_right(text, _answer(row, column)), mathematics.read)


def reasoning_gym(name: str, column: str) -> Grader:
    """Make a grader from a reasoning-gym dataset's scorer: a full score is right, a partial score is wrong.

    Raises:
        ConfigError: reasoning-gym is not installed, or has no such dataset.
    """
    score = reasoning_gym_scorer(name.removeprefix(REASONING_GYM), column)
    return Grader(name, lambda text, row: score(text, row) > 0.999)


# Name -> function that makes a grader from the name as the user wrote it and the column of the right answer.
GRADERS: dict[str, Callable[[str, str], Grader]] = {
    "exact": exact,
    "last_number": last_number,
    "contains": contains,
    "regex": regex,
    "choice": choice,
    "math": math,
    "reasoning_gym": reasoning_gym,
}
REASONING_GYM = "reasoning_gym:"
COMPLETED = {  # names that are followed by a colon and an argument, each with an example
    "regex": r"regex:Answer: (\w+)",
    "reasoning_gym": "reasoning_gym:gcd",
}


def load_grader(name: str, column: str = "answer") -> Grader:
    """Return the grader called `name`.

    Args:
        name: a name of GRADERS, two of which take an argument: "regex:PATTERN" and "reasoning_gym:DATASET"; or
            "module:function" for a function of (text, row) that returns True or False, or for a `Grader`.
        column: the row's column that holds the right answer. A "module:function" reads the row itself.

    Raises:
        ConfigError: the name is unknown, it cannot be imported, or a package it needs is missing.
    """
    if is_function_name(name):
        return _load_function(name)
    head, _, rest = name.partition(":")
    if head not in GRADERS:
        raise ConfigError(
            f"no grader is called {name!r}.{did_you_mean(name, GRADERS)}\n"
            f"Known: {', '.join(_names())}; and 'module:function' for a function of your own."
        )
    if head in COMPLETED and not rest:
        raise ConfigError(
            f"grader {head!r} is not complete: it needs an argument after a colon, a pattern or the name of a "
            f"dataset.\nWrite it as in {COMPLETED[head]!r}."
        )
    return dataclasses.replace(GRADERS[head](name, column), needs=(answer_need(name, column),))


def answer_need(name: str, column: str) -> Need:
    """Return the need of a column with right answers; rows that leave it empty are reported when they are graded."""
    return Need(
        (column,),
        f"grader {name!r}",
        "Without a right answer no text can be graded.",
        "name another one (answer_column), or give a function of your own",
        may_be_empty=True,
    )


def is_function_name(name: str) -> bool:
    """Return whether a name is a "module:function", and not one of GRADERS with its argument."""
    head, colon, _ = name.partition(":")
    return bool(colon) and head not in COMPLETED


def _names() -> list[str]:
    return [COMPLETED.get(name, name) for name in GRADERS]


def grade(
    grader: Grader | Callable[[str, Row], bool] | str, texts: Iterable[str], rows: Iterable[Row]
) -> list[bool | None]:
    """Grade each text against its row.

    Args:
        grader: see `Grader.parse`.
        texts: one answer per row.
        rows: the rows, in the same order.

    Returns:
        Whether each text is right, or None where the grader failed. A warning counts the failures and names the first.
    """
    grader = Grader.parse(grader)
    verdicts: list[bool | None] = []
    failures: dict[int, str] = {}
    for index, (text, row) in enumerate(zip(texts, rows, strict=True)):
        try:
            verdicts.append(grader(text, row))
        except Exception as error:
            verdicts.append(None)
            failures[index] = f"{type(error).__name__}: {error}"
    if failures:
        first = next(iter(failures))
        warnings.warn(
            f"the grader {grader.name!r} failed on {len(failures)} of {len(verdicts)} rows, first on row {first} "
            f"({failures[first]}).\n"
            "These answers count as wrong, so the accuracy is a lower bound. Fix these rows or choose another grader.",
            OPSDWarning,
            stacklevel=2,
        )
    return verdicts


def grade_rows(
    grader: Grader | Callable[[str, Row], bool] | str, texts: Iterable[str], rows: Iterable[Row]
) -> tuple[list[bool], list[int]]:
    """Return whether each text is right, False where the grader failed, and the indices where it did; see `grade`."""
    verdicts = grade(grader, texts, rows)
    return [verdict is True for verdict in verdicts], [i for i, verdict in enumerate(verdicts) if verdict is None]


def _answer(row: Row, column: str) -> str:
    answer = row.get(column)
    if is_empty(answer):
        raise DataError(
            f"the grader needs an answer in the column {column!r}, which is missing or empty; the row has: "
            f"{', '.join(row)}.\nFill it, or set answer_column to the column that holds the answer."
        )
    return str(answer).strip()


def _folded(text: str) -> str | None:
    return text.strip().casefold() or None


def _last_number(text: str) -> Decimal | None:
    numbers = NUMBER.findall(text)
    # Decimal, not float: 0.1 equals 0.10 exactly, and integers of any length stay distinct.
    return Decimal(numbers[-1].replace(",", "").replace("−", "-")) if numbers else None


def reasoning_gym_scorer(dataset: str, column: str = "answer") -> Callable[[str, Row], float]:
    """Return the scorer of a reasoning-gym dataset: (text, row) -> a score between 0 and 1.

    Raises:
        ConfigError: reasoning-gym is not installed, or has no scorer of that name.
    """
    try:
        import reasoning_gym as library
    except ImportError as error:
        raise ConfigError(
            f"grader '{REASONING_GYM}{dataset}' needs reasoning-gym, which is not installed.\n"
            "Install it with `pip install reasoning-gym`, or choose one of: " + ", ".join(_names()) + "."
        ) from error
    try:
        score = library.get_score_answer_fn(dataset)
    except (ValueError, AssertionError) as error:
        raise ConfigError(
            f"reasoning-gym has no scorer for {dataset!r} ({error})."
            f"{did_you_mean(dataset, library.factory.DATASETS)}\n"
            "Name the dataset that the questions come from; reasoning-gym's GALLERY.md lists all."
        ) from error

    # An answer may be None: some of its datasets have scorers that read the question's metadata alone.
    return lambda text, row: float(score(text.strip(), without_nan({**row, "answer": row[column]})))


def _load_function(name: str) -> Grader:
    function = import_object(name, "grader", COMPLETED)
    if not callable(function):
        raise ConfigError(
            f"grader {name!r} is a {type(function).__name__}, not a function of (text, row).\n"
            "It is called once per row and returns True or False. Name a function of that module."
        )
    return dataclasses.replace(Grader.parse(function), name=name)


def _as_text(number: Decimal) -> str:
    """Write equal numbers alike: 5, 5.0 and 5.00 are one answer."""
    text = format(number, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text
