"""Check 5: does the student see what only the teacher should?"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

from opsd.contexts.filters import as_text
from opsd.contexts.messages import plain_text, turns_of, with_conversations
from opsd.data.values import at_path, is_empty, text_of
from opsd.doctor.patient import Patient
from opsd.findings import Finding, listed

LONG = 12  # characters from which a text in a prompt is more than a word
SENTENCE = 4  # words from which it is no choice to pick from and no name
EXCESS = 0.5  # share of rows whose prompt has its own value, beyond those that have another row's
SOME = 0.1  # the same, from which it is worth a look
# Columns that hold what is sought, whether or not a template reads them.
ANSWERS = ("answer", "solution")
find = functools.partial(Finding, "leaks")


def check_leaks(patient: Patient) -> Iterator[Finding]:
    """Look for privileged text in the student's prompts and in what the teacher's assistant has begun to say."""
    contexts = patient.trainer.scorer.contexts
    named = {name for context in contexts for name in context.fields | context.optional_fields} | set(ANSWERS)
    have = {name for row in patient.rows for name in row}
    columns = sorted(name for name in named - {"prompt", "completion"} if name.partition(".")[0] in have)
    found = [finding for column in columns for finding in _in_questions(patient, column)] + list(_in_prefills(patient))
    yield from found
    if not found:
        yield find("pass", f"nothing of {listed(columns) or 'the other columns'} stands in the student's prompts.")


def _in_questions(patient: Patient, column: str) -> Iterator[Finding]:
    values = [at_path(row, column) for row in patient.rows]
    texts = ["" if is_empty(value) else _text(value) for value in values]
    said = [" ".join(text_of(turn) for turn in turns_of(row["prompt"])) for row in patient.rows]
    filled = [n for n, text in enumerate(texts) if text]
    if not filled:
        return
    own = [n for n in filled if _stands_in(texts[n], said[n])]
    # A rule may be the same in all rows; what another row has is compared only where it differs.
    different = [n for n in filled if texts[n] != texts[(n + 1) % len(texts)]]
    others = [n for n in different if _stands_in(texts[n], said[(n + 1) % len(said)])]
    excess = len(own) / len(filled) - (len(others) / len(different) if different else 0.0)
    long = sum(len(texts[n]) >= LONG and len(texts[n].split()) >= SENTENCE for n in own) > len(own) / 2
    figures = {"own": len(own), "another": len(others), "rows": len(filled)}
    if excess > EXCESS and long:
        yield find(
            "fail",
            f"the student's prompt holds all of {column!r} in {len(own)} of {len(filled)} rows, first row "
            f"{patient.numbers[own[0]]}: nothing is privileged there.",
            "Take it out of the prompt. What the teacher alone should know stands in a column, and only there.",
            figures=figures,
        )
    elif (excess > EXCESS or (long and excess > SOME)) and len(own) > 1:
        yield find(
            "warn",
            f"{column!r} stands in the prompt in {len(own)} of {len(filled)} rows, and another row's in "
            f"{len(others)}, first row {patient.numbers[own[0]]}: the question gives its answer away.",
            "If these are choices to pick from, this is as it should be. Otherwise mend the questions.",
            figures=figures,
        )


def _text(value: Any) -> str:
    return as_text(with_conversations(value, plain_text)).strip()


def _stands_in(value: str, text: str) -> bool:
    """Tell whether a value is said in a text: as whole words, or, where it is long, in any case and spacing."""
    if len(value) >= LONG:
        return "".join(value.split()).casefold() in "".join(text.split()).casefold()
    return re.search(rf"(?<![\w.-]){re.escape(value)}(?![\w]|[.,]\d)", text, re.IGNORECASE) is not None


def _in_prefills(patient: Patient) -> Iterator[Finding]:
    """Find privileged text in the assistant's turn, which the student's rollout would continue."""
    for side in patient.teachers:
        row: Any = patient.rows[side.row]
        names = side.context.fields | side.context.optional_fields if side.context else ()
        told = [
            name for name in names if not is_empty(at_path(row, name)) and _text(at_path(row, name)) in side.prefill
        ]
        if told and side.prefill.strip():
            yield find(
                "warn",
                f"template {side.context.name if side.context else ''!r} lets the assistant itself say {listed(told)} "
                "before the rollout begins: the teacher has given the answer already, and grades what comes after it.",
                "Say it in the block user or system; the block assistant is for an opening such as <think>.",
            )
            return
