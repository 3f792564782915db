"""What a row must have: contexts, teachers, losses and graders state their needs, and one function checks them all.

Every consumer of columns states a `Need`; `check_columns` reads names, `RowCheck` looks at each row once for all needs
together, and both report in one form. Imports neither datasets nor transformers, as `values.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from opsd.data.values import at_path, is_empty
from opsd.errors import DataError, did_you_mean

Row: TypeAlias = Mapping[str, Any]
NUMBERED = 5  # rows in a message


@dataclasses.dataclass(frozen=True)
class Need:
    """Columns of which every row must fill at least one.

    Args:
        names: alternatives: columns, rollout fields, or dotted paths into nested columns.
        needed_by: what needs them; the subject of an error.
        reason: what goes wrong without, in a sentence.
        way_out: what a user can do besides adding the column or filling the rows: the end of a sentence after "or",
            in which "{columns}" stands for the dataset's columns; or "".
        find_problem: row -> what is wrong with its value, such as "holds 7", or None; without it, a row must fill one
            of the columns.
        applies: row -> whether the row needs it; without it, every row does.
        may_be_empty: whether the column must be there and rows may leave it empty.

    Example:
        >>> need = Need(("solution", "feedback"), "template 'feedback'", "Without it the teacher knows nothing more.")
        >>> need.is_met_by({"solution": "", "feedback": "One too few."}), need.is_open(["prompt", "solution"])
        (True, False)
        >>> str(need)
        "template 'feedback' needs the column 'solution' or 'feedback'"
        >>> need.problem_of({"solution": " "})
        'is empty'
    """

    names: tuple[str, ...]
    needed_by: str
    reason: str
    way_out: str = ""
    find_problem: Callable[[Row], str | None] | None = None
    applies: Callable[[Row], bool] | None = None
    may_be_empty: bool = False

    def is_open(self, available: Iterable[str]) -> bool:
        """Return whether none of these columns is one of the names."""
        have = set(available)
        return not any(name in have or name.partition(".")[0] in have for name in self.names)

    def is_met_by(self, values: Row) -> bool:
        """Return whether one of the names has a value."""
        return any(not is_empty(at_path(values, name)) for name in self.names)

    def problem_of(self, row: Row) -> str | None:
        """Return what is wrong with a row, in words, or None."""
        return None if self.applies is not None and not self.applies(row) else self.problem_of_value(row)

    def problem_of_value(self, row: Row) -> str | None:
        """Return what is wrong with a row that needs it, in words, or None."""
        if self.find_problem is not None:
            return self.find_problem(row)
        return None if self.may_be_empty or self.is_met_by(row) else "is empty"

    def only_where(self, applies: Callable[[Row], bool]) -> Need:
        """Return the same need of fewer rows."""
        before = self.applies
        both = applies if before is None else lambda row: applies(row) and before(row)
        return dataclasses.replace(self, applies=both)

    def __str__(self) -> str:
        return f"{self.needed_by} needs the column {' or '.join(map(repr, self.names))}"


def check_columns(columns: Iterable[str], needs: Iterable[Need], name: str = "train") -> None:
    """Check that a dataset has the columns of every need.

    Args:
        columns: the dataset's.
        needs: of everything that reads rows.
        name: what an error calls the dataset.

    Raises:
        DataError: a column is missing; names what needs it, the nearest column, and what to do.
    """
    columns = list(columns)
    missing = [need for need in dict.fromkeys(needs) if need.is_open(columns)]
    if missing:
        hints = "".join(dict.fromkeys(did_you_mean(name, columns) for need in missing for name in need.names))
        problem = f"{'; '.join(map(str, missing))}, and the {name} dataset has: {', '.join(columns)}.{hints}"
        raise _error(problem, missing, ["Rename a column"], columns)


class RowCheck:
    """Looks at the rows of one dataset, each once, for all needs together.

    Args:
        needs: of everything that reads rows.
        name: what an error calls the dataset.

    Example:
        >>> check = RowCheck([Need(("hint",), "a template", "It is shown.")], "train")
        >>> check.add({"prompt": "1 + 1?", "hint": ""}, number=0)
        >>> check.finish(["prompt", "hint"])
        Traceback (most recent call last):
        opsd.errors.DataError: a template needs the column 'hint', which is empty in 1 row of the train dataset: 0.
        It is shown.
        Fill these rows, or drop them.
    """

    def __init__(self, needs: Iterable[Need], name: str) -> None:
        self._name = name
        self._rows: dict[Need, dict[int, str]] = {need: {} for need in needs}

    def add(self, row: Row, number: int) -> None:
        """Look at a row."""
        for need, problems in self._rows.items():
            problem = need.problem_of(row)
            if problem is not None:
                problems[number] = problem

    def look_again(self, made: Mapping[str, Sequence[Any]]) -> None:
        """Look again at the rows with a problem, now with values that were made for them.

        Args:
            made: values of new columns, one for each row.
        """
        for need, problems in self._rows.items():
            if not need.is_open(made):
                again = {n: need.problem_of_value({name: values[n] for name, values in made.items()}) for n in problems}
                self._rows[need] = {number: problem for number, problem in again.items() if problem is not None}

    def finish(self, columns: Sequence[str]) -> None:
        """Refuse rows that do not meet a need.

        Args:
            columns: the dataset's.

        Raises:
            DataError: some do not; the message has their numbers, counted from 0.
        """
        unmet = {need: problems for need, problems in self._rows.items() if problems}
        if unmet:
            texts = [f"{need}, which {_list_rows(problems, self._name)}" for need, problems in unmet.items()]
            raise _error(f"{'; '.join(texts)}.", list(unmet), ["Fill these rows", "drop them"], columns)


def check_rows(dataset: Any, needs: Sequence[Need], name: str = "train") -> None:
    """Check columns, then every row once, of a dataset that is prepared.

    Args:
        dataset: map-style.
        needs: of everything that reads rows.
        name: what an error calls the dataset.

    Raises:
        DataError: a column is missing, or rows do not meet a need.
    """
    check_columns(dataset.column_names, needs, name)
    check = RowCheck(needs, name)
    for number, row in enumerate(dataset):
        check.add(row, number)
    check.finish(dataset.column_names)


def _error(problem: str, needs: Sequence[Need], advice: Sequence[str], columns: Sequence[str]) -> DataError:
    """Return the error: the problem, the reasons, and what to do."""
    reasons = " ".join(dict.fromkeys(need.reason for need in needs))
    *first, last = dict.fromkeys([*advice, *(need.way_out for need in needs if need.way_out)])
    ways_out = f"{', '.join(first)}, or {last}" if first else last
    return DataError(f"{problem}\n{reasons}\n{ways_out.replace('{columns}', ','.join(columns))}.")


def _list_rows(problems: Mapping[int, str], name: str) -> str:
    """Return "is empty in 7 rows of the train dataset: 1, 2, 3, 5, 6 and 2 more"."""
    numbers = list(problems)
    first = ", ".join(map(str, numbers[:NUMBERED]))
    more = f" and {len(numbers) - NUMBERED} more" if len(numbers) > NUMBERED else ""
    return (
        f"{problems[numbers[0]]} in {len(numbers)} row{'s' * (len(numbers) > 1)} of the {name} dataset: {first}{more}"
    )
