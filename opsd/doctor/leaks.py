"""Check 5: does the student see what only the teacher should?"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

from opsd.doctor.patient import Patient
from opsd.fields import as_text, is_empty
from opsd.findings import Finding, listed
from opsd.prompts import text_of, turns_of

LONG = 12  # characters from which a text in a prompt is no coincidence
EXCESS = 0.5  # share of rows whose question has its own answer, beyond those that have another row's
# Columns that hold what is sought, whether or not a template reads them.
ANSWERS = ("answer", "solution")
find = functools.partial(Finding, "leaks")


def check_leaks(patient: Patient) -> Iterator[Finding]:
    """Look for privileged text in the student's prompts and in what the teacher's assistant has begun to say."""
    contexts = patient.trainer.training_loss.contexts
    named = {name for context in contexts for name in context.fields | context.optional_fields} | set(ANSWERS)
    columns = sorted(named & set(patient.rows[0]) - {"prompt", "completion"})
    found = [finding for column in columns for finding in _in_questions(patient, column)] + list(_in_prefills(patient))
    yield from found
    if not found:
        yield find("pass", f"nothing of {listed(columns) or 'the other columns'} stands in the student's prompts.")


def _in_questions(patient: Patient, column: str) -> Iterator[Finding]:
    texts = [side.text for side in patient.students]
    values = ["" if is_empty(row.get(column)) else as_text(row[column]).strip() for row in patient.rows]
    copied = [n for n, value in enumerate(values) if len(value) >= LONG and value in texts[n]]
    # A rule or a document may be the same for all rows, and so may a system turn that repeats it.
    if copied:
        yield find(
            "fail",
            f"the student's prompt holds all of {column!r} in {len(copied)} of {len(values)} rows, first row "
            f"{patient.numbers[copied[0]]}: nothing is privileged there.",
            "Take it out of the prompt. What the teacher alone should know stands in a column, and only there.",
        )
        return
    questions = [text_of(turns_of(row["prompt"])[-1]) for row in patient.rows]
    short = [(n, value) for n, value in enumerate(values) if 0 < len(value) < LONG]
    own = [n for n, value in short if _stands_in(value, questions[n])]
    others = [_stands_in(value, questions[(n + 1) % len(questions)]) for n, value in short]
    excess = len(own) / len(short) - sum(others) / len(short) if short else 0.0
    if excess > EXCESS and len(own) > 1:
        yield find(
            "warn",
            f"{column!r} stands in the question in {len(own)} of {len(short)} rows, and another row's in "
            f"{sum(others)}, first row {patient.numbers[own[0]]}: the question gives its answer away.",
            "If these are choices to pick from, this is as it should be. Otherwise mend the questions.",
            figures={"own": len(own), "another": sum(others), "rows": len(short)},
        )


def _stands_in(value: str, text: str) -> bool:
    return re.search(rf"(?<![\w.-]){re.escape(value)}(?![\w]|[.,]\d)", text, re.IGNORECASE) is not None


def _in_prefills(patient: Patient) -> Iterator[Finding]:
    """Find privileged text in the assistant's turn, which the student's rollout would continue."""
    for side in patient.teachers:
        row: Any = patient.rows[side.row]
        names = side.context.fields | side.context.optional_fields if side.context else ()
        told = [name for name in names if not is_empty(row.get(name)) and as_text(row[name]).strip() in side.prefill]
        if told and side.prefill.strip():
            yield find(
                "warn",
                f"template {side.context.name if side.context else ''!r} lets the assistant itself say {listed(told)} "
                "before the rollout begins: the teacher has given the answer already, and grades what comes after it.",
                "Say it in the block user or system; the block assistant is for an opening such as <think>.",
            )
            return
