"""Graders: is this text a right answer to this row, and what does it answer at all?

One visible table, `load_grader` by name. Knows strings and rows only; where the text came from, and what a share of
right answers is worth, is decided elsewhere. A grader that fails on a row says so by raising: `grade` tells such rows
apart, they are never silently wrong.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from opsd.errors import ConfigError, DataError, OPSDWarning, did_you_mean
from opsd.evaluation.answers import Mathematics, read_choice, right_choice
from opsd.sources import import_object

Row = Mapping[str, Any]

# A sign belongs to the number unless it stands behind an operand, as in "5-3" or "(2+3)-1". Commas count between
# groups of three digits only, so that "1,2,3" is three numbers.
NUMBER = re.compile(r"(?:(?<![\w)])[-+−])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")


@dataclass(frozen=True)
class Grader:
    """What tells right answers from wrong ones; called with a text and its row, it returns the verdict.

    Args:
        name: as the user wrote it; it stands beside every figure, which means nothing without it.
        is_right: returns True or False. Whatever else it returns, and any exception, is a failure and no verdict.
        read: returns what a text answers, the same for texts that answer the same, or None where a text has no answer
            in the form asked for. Votes and format checks need it; None where the grader cannot tell.
    """

    name: str
    is_right: Callable[[str, Row], bool]
    read: Callable[[str], Hashable | None] | None = None

    def __call__(self, text: str, row: Row) -> bool:
        """Return whether the text is a right answer to the row.

        Raises:
            DataError: `is_right` returned something else than True or False.
        """
        verdict = self.is_right(text, row)
        # A reward of 0.3 is truthy; taken as a bool it would pass for a right answer.
        if verdict not in (True, False):
            raise DataError(f"a grader returns True or False, and {self.name!r} returned {verdict!r}")
        return bool(verdict)

    def answer(self, text: str) -> str | None:
        """Return what a text answers, the same word for equal answers; None where it has or shows none."""
        try:
            found = None if self.read is None else self.read(text)
        except Exception:  # a text that cannot even be read has no answer in the form asked for
            return None
        return _as_word(found) if isinstance(found, Decimal) else None if found is None else str(found)

    @classmethod
    def parse(cls, value: Grader | Callable[[str, Row], bool] | str) -> Grader:
        """Return the grader that `value` means: one, a name for `load_grader`, or a function of (text, row).

        Raises:
            ConfigError: it is none of these.
        """
        if isinstance(value, Grader):
            return value
        if isinstance(value, str):
            return load_grader(value)
        if not callable(value):
            raise ConfigError(
                f"a grader is a name or a function of (text, row), and this is a {type(value).__name__}.\n"
                "It is called once per row and returns True or False. Names are: " + ", ".join(_names()) + "."
            )
        name = f"{value.__module__}:{value.__qualname__}" if hasattr(value, "__qualname__") else type(value).__name__
        return cls(name, value)


def exact(name: str, column: str) -> Grader:
    """Make a grader: a text is right if it is the answer, apart from case and the space around it."""
    return Grader(name, lambda text, row: _folded(text) == _folded(_answer(row, column)), _folded)


def last_number(name: str, column: str) -> Grader:
    """Make a grader: the last number in a text must equal the last number in the answer ("1,250.0" equals "1250").

    Decimal notation only: of "1/2" and "1e5" it reads 2 and 5. An answer without a number is a DataError.
    """

    def is_right(text: str, row: Row) -> bool:
        expected = _last_number(_answer(row, column))
        if expected is None:
            raise DataError(
                f"grader {name!r} needs a number in the column {column!r}, and found {row[column]!r}.\n"
                "Without one no text could ever be right. Use 'exact' or 'contains' for answers in words."
            )
        return _last_number(text) == expected

    return Grader(name, is_right, _last_number)


def contains(name: str, column: str) -> Grader:
    """Make a grader: the answer must stand in the text as a whole word, whatever its case.

    "Paris" is in "It's Paris." but not in "Parisian", "5" neither in "1.5" nor in "-5". A text that names several
    answers is right if one of them is: the mildest of the graders, which cannot say what a text answers.
    """

    def is_right(text: str, row: Row) -> bool:
        whole_word = rf"(?<![\w-])(?<!\d[.,]){re.escape(_answer(row, column))}(?!\w|[.,]\d)"
        return re.search(whole_word, text, re.IGNORECASE) is not None

    return Grader(name, is_right)


def regex(name: str, column: str) -> Grader:
    """Make a grader: of the pattern's last match the first group, or all of it, is compared as `exact` does.

    Args:
        name: "regex:PATTERN" in Python's syntax, `(?i)` and the like in front; colons belong to the pattern.
        column: holds the right answer.

    Raises:
        ConfigError: the pattern is not valid.
    """
    try:
        pattern = re.compile(name.partition(":")[2])
    except re.error as error:
        raise ConfigError(
            f"grader {name!r} has a pattern that Python's `re` does not read: {error}.\n"
            "A text's answer is the first group of its last match. Mend the pattern; a literal ( or [ is \\( or \\[."
        ) from error

    def read(text: str) -> str | None:
        matches = list(pattern.finditer(text))
        return _folded((matches[-1][1] if pattern.groups else matches[-1][0]) or "") if matches else None

    return Grader(name, lambda text, row: read(text) == _folded(_answer(row, column)), read)


def choice(name: str, column: str) -> Grader:
    """Make a grader: the letter that a text chooses, see `read_choice`, must be that of the answer.

    The answer is a letter; where the row has a list `choices` also an index from 0, or the text of one.
    """

    def is_right(text: str, row: Row) -> bool:
        _answer(row, column)
        return read_choice(text) == right_choice(row[column], row.get("choices"))

    return Grader(name, is_right, read_choice)


def math(name: str, column: str) -> Grader:
    """Make a grader: the text's formula must equal the answer as mathematics, see `Mathematics`.

    Raises:
        ConfigError: math-verify is not installed.
    """
    mathematics = Mathematics()
    return Grader(name, lambda text, row: mathematics.is_right(text, _answer(row, column)), mathematics.read)


def reasoning_gym(name: str, column: str) -> Grader:
    """Make a grader: a reasoning-gym dataset's own scorer, full marks only; a partial score is wrong.

    Raises:
        ConfigError: reasoning-gym is not installed, or has no such dataset.
    """
    score = reasoning_gym_scorer(name.removeprefix(REASONING_GYM), column)
    return Grader(name, lambda text, row: score(text, row) > 0.999)


# What makes a grader of its name, as the user wrote it, and the column of the right answer.
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
COMPLETED = {  # the names that go on behind a colon, each with an example
    "regex": r"regex:Answer: (\w+)",
    "reasoning_gym": "reasoning_gym:gcd",
}


def load_grader(name: str, column: str = "answer") -> Grader:
    """Return the grader called `name`.

    Args:
        name: a name from GRADERS, two of which go on behind a colon: "regex:PATTERN" and "reasoning_gym:DATASET"; or
            "module:function" for a function of (text, row) that returns True or False, or for a `Grader`.
        column: the row's column that holds the right answer. A "module:function" reads the row itself.

    Raises:
        ConfigError: nothing has that name, it cannot be imported, or what it needs is missing.
    """
    if is_function_name(name):
        return _load_function(name)
    head, _, rest = name.partition(":")
    if head not in GRADERS:
        raise ConfigError(
            f"no grader is called {name!r}.{did_you_mean(name, GRADERS)}\n"
            f"A figure means nothing without its grader. Known: {', '.join(_names())}; "
            "and 'module:function' for one of your own."
        )
    if head in COMPLETED and not rest:
        raise ConfigError(
            f"grader {head!r} is not complete without what stands behind its colon.\n"
            f"Write it as in {COMPLETED[head]!r}: a pattern, or the name of a dataset."
        )
    return GRADERS[head](name, column)


def is_function_name(name: str) -> bool:
    """Return whether a name is a "module:function", and none of GRADERS that goes on behind a colon."""
    head, colon, _ = name.partition(":")
    return bool(colon) and head not in COMPLETED


def _names() -> list[str]:
    return [COMPLETED.get(name, name) for name in GRADERS]


def grade(
    grader: Grader | Callable[[str, Row], bool] | str, texts: Iterable[str], rows: Iterable[Row]
) -> list[bool | None]:
    """Grade each text against its row.

    Args:
        grader: see `Grader.of`.
        texts: one answer per row.
        rows: the rows, in the same order.

    Returns:
        Whether each text is right, or None where the grader failed. A warning counts these and names the first.
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
            "They count as wrong, so the accuracy is a lower bound. Repair these rows or pick another grader.",
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
    if answer is None or not str(answer).strip():
        raise DataError(
            f"the grader needs an answer in the column {column!r}, which is missing or empty; the row has: "
            f"{', '.join(row)}.\nWithout it nothing can be graded. Fill it, or name the column that holds the answer."
        )
    return str(answer).strip()


def _folded(text: str) -> str | None:
    return text.strip().casefold() or None


def _last_number(text: str) -> Decimal | None:
    numbers = NUMBER.findall(text)
    # Decimal and not float: 0.1 is 0.10 exactly, and integers of any length stay apart.
    return Decimal(numbers[-1].replace(",", "").replace("−", "-")) if numbers else None


def reasoning_gym_scorer(dataset: str, column: str = "answer") -> Callable[[str, Row], float]:
    """Return a reasoning-gym dataset's own scorer: (text, row) -> a score between 0 and 1.

    Raises:
        ConfigError: reasoning-gym is not installed, or has no scorer of that name.
    """
    try:
        import reasoning_gym as library
    except ImportError as error:
        raise ConfigError(
            f"grader '{REASONING_GYM}{dataset}' is that dataset's own scorer, and reasoning-gym is not installed.\n"
            "Install it with `pip install reasoning-gym`, or pick one of: " + ", ".join(_names()) + "."
        ) from error
    try:
        score = library.get_score_answer_fn(dataset)
    except (ValueError, AssertionError) as error:
        raise ConfigError(
            f"reasoning-gym gives no scorer for {dataset!r} ({error})."
            f"{did_you_mean(dataset, library.factory.DATASETS)}\n"
            "The grader must be the one the questions were made for. The datasets are in reasoning-gym's GALLERY.md."
        ) from error

    return lambda text, row: float(score(text.strip(), {**row, "answer": row[column]}))


def _load_function(name: str) -> Grader:
    found = import_object(name, "grader", COMPLETED)
    if not callable(found):
        raise ConfigError(
            f"grader {name!r} is a {type(found).__name__}, not a function of (text, row).\n"
            "It is called once per row and returns True or False. Name a function of that module."
        )
    return dataclasses.replace(Grader.parse(found), name=name)


def _as_word(number: Decimal) -> str:
    """Write equal numbers alike: 5, 5.0 and 5.00 are one answer."""
    text = format(number, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text
