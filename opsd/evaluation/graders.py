"""Graders: is this text a right answer to this row? One function per idea, one visible table, `load_grader` by name.

Knows strings and rows only; where the text came from, and what a share of right answers is worth, is decided elsewhere.
A grader that fails on a row says so by raising: `grade_rows` counts such rows apart, they are never silently wrong.
"""

from __future__ import annotations

import functools
import importlib
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from typing import Any

from opsd.errors import ConfigError, DataError, OPSDWarning, did_you_mean

Row = Mapping[str, Any]
Grader = Callable[[str, Row], bool]

REASONING_GYM = "reasoning_gym:"
# A sign belongs to the number unless it stands behind an operand, as in "5-3" or "(2+3)-1". Commas count between
# groups of three digits only, so that "1,2,3" is three numbers.
NUMBER = re.compile(r"(?:(?<![\w)])[-+−])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")


def exact(text: str, row: Row, column: str = "answer") -> bool:
    """Return whether the text is the answer, apart from case and the space around it."""
    return text.strip().casefold() == _answer(row, column).casefold()


def last_number(text: str, row: Row, column: str = "answer") -> bool:
    """Return whether the last number in the text equals the last number in the answer ("1,250.0" equals "1250").

    Decimal notation only: of "1/2" and "1e5" it reads 2 and 5.

    Raises:
        DataError: there is no number in the row's own answer.
    """
    expected = _last_number(_answer(row, column))
    if expected is None:
        raise DataError(
            f"grader 'last_number' needs a number in the column {column!r}, and found {row[column]!r}.\n"
            "Without one no text could ever be right. Use 'exact' or 'contains' for answers in words."
        )
    return _last_number(text) == expected


def contains(text: str, row: Row, column: str = "answer") -> bool:
    """Return whether the answer stands in the text as a whole word, whatever its case.

    "Paris" is in "It's Paris." but not in "Parisian", "5" neither in "1.5" nor in "-5". A text that names several
    answers is right if one of them is: the mildest of the graders.
    """
    whole_word = rf"(?<![\w-])(?<!\d[.,]){re.escape(_answer(row, column))}(?!\w|[.,]\d)"
    return re.search(whole_word, text, re.IGNORECASE) is not None


GRADERS: dict[str, Callable[..., bool]] = {
    "exact": exact,
    "last_number": last_number,
    "contains": contains,
}


def load_grader(name: str, column: str = "answer") -> Grader:
    """Return the grader called `name`.

    Args:
        name: a name from GRADERS; "reasoning_gym:DATASET" for that dataset's own scorer (full marks only, a partial
            score is wrong); or "module:function" for a function of (text, row) that returns True or False.
        column: the row's column that holds the right answer. A "module:function" reads the row itself.

    Raises:
        ConfigError: nothing has that name, or it cannot be imported.
    """
    if name in GRADERS:
        return functools.partial(GRADERS[name], column=column)
    if name.startswith(REASONING_GYM):
        return _load_reasoning_gym(name.removeprefix(REASONING_GYM), column)
    if ":" in name:
        return _load_function(name)
    raise ConfigError(
        f"no grader is called {name!r}.{did_you_mean(name, GRADERS)}\n"
        f"A figure means nothing without its grader. Known: {', '.join(GRADERS)}; also "
        f"'{REASONING_GYM}DATASET', and 'module:function' for one of your own."
    )


def grade_rows(grader: Grader, texts: Iterable[str], rows: Iterable[Row]) -> tuple[list[bool], list[int]]:
    """Grade each text against its row.

    Args:
        grader: returns True or False; whatever else it returns, and any exception, makes the row ungraded.
        texts: one answer per row.
        rows: the rows, in the same order.

    Returns:
        Whether each row is right, and the indices of the ungraded rows, which are False in the first list. A warning
        names the first of them.
    """
    correct: list[bool] = []
    failures: dict[int, str] = {}
    for index, (text, row) in enumerate(zip(texts, rows, strict=True)):
        try:
            correct.append(_verdict(grader, text, row))
        except Exception as error:
            correct.append(False)
            failures[index] = f"{type(error).__name__}: {error}"
    if failures:
        first = next(iter(failures))
        warnings.warn(
            f"the grader failed on {len(failures)} of {len(correct)} rows, first on row {first} ({failures[first]}).\n"
            "They count as wrong, so the accuracy is a lower bound. Repair these rows or pick another grader.",
            OPSDWarning,
            stacklevel=2,
        )
    return correct, list(failures)


def _verdict(grader: Grader, text: str, row: Row) -> bool:
    verdict = grader(text, row)
    # A reward of 0.3 is truthy; taken as a bool it would pass for a right answer.
    if verdict not in (True, False):
        raise DataError(f"a grader returns True or False, this one returned {verdict!r}")
    return bool(verdict)


def _answer(row: Row, column: str) -> str:
    answer = row.get(column)
    if answer is None or not str(answer).strip():
        raise DataError(
            f"the grader needs an answer in the column {column!r}, which is missing or empty; the row has: "
            f"{', '.join(row)}.\nWithout it nothing can be graded. Fill it, or name the column that holds the answer."
        )
    return str(answer).strip()


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
        import reasoning_gym
    except ImportError as error:
        raise ConfigError(
            f"grader '{REASONING_GYM}{dataset}' is that dataset's own scorer, and reasoning-gym is not installed.\n"
            "Install it with `pip install reasoning-gym`, or pick one of: " + ", ".join(GRADERS) + "."
        ) from error
    try:
        score = reasoning_gym.get_score_answer_fn(dataset)
    except (ValueError, AssertionError) as error:
        raise ConfigError(
            f"reasoning-gym gives no scorer for {dataset!r} ({error})."
            f"{did_you_mean(dataset, reasoning_gym.factory.DATASETS)}\n"
            "The grader must be the one the questions were made for. The datasets are in reasoning-gym's GALLERY.md."
        ) from error

    return lambda text, row: float(score(text.strip(), {**row, "answer": row[column]}))


def _load_reasoning_gym(dataset: str, column: str) -> Grader:
    score = reasoning_gym_scorer(dataset, column)
    return lambda text, row: score(text, row) > 0.999


def imported(name: str, what: str) -> Any:
    """Return what "module:attribute" names.

    Args:
        name: the two names.
        what: what it is to be, for the message.

    Raises:
        ConfigError: it cannot be imported.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{what} {name!r} means the function {attribute!r} of the module {module!r}, which fails: {error}.\n"
            "Check both names; a module in the current folder is found with `PYTHONPATH=. opsd …`."
        ) from error


def _load_function(name: str) -> Grader:
    found = imported(name, "grader")
    if not callable(found):
        raise ConfigError(
            f"grader {name!r} is a {type(found).__name__}, not a function of (text, row).\n"
            "It is called once per row and returns True or False. Name a function of that module."
        )
    return found
