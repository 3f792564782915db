"""Check 6: privileged text in the student's prompt."""

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

LONG = 12  # characters from which a value is compared in any case and spacing
SENTENCE = 4  # words from which a value is no name, and no choice of a list
EXCESS = 0.5  # share of rows whose prompt has its own value, beyond those that have another row's
SOME = 0.1  # the same, from which it is worth a warning
# Columns with the answer, whether or not a template reads them.
ANSWERS = ("answer", "solution")
find = functools.partial(Finding, "leaks")


def check_leaks(patient: Patient) -> Iterator[Finding]:
    """Look for privileged text in the student's prompts and in the teacher's prefills."""
    contexts = patient.trainer.scorer.contexts
    fields = {name for context in contexts for name in context.columns} | set(ANSWERS)
    present = {name for row in patient.rows for name in row}
    columns = sorted(name for name in fields - {"prompt", "completion"} if name.partition(".")[0] in present)
    findings = [finding for column in columns for finding in _in_prompts(patient, column)]
    findings += _in_prefills(patient)
    yield from findings
    if not findings:
        yield find("pass", f"the student's prompts contain nothing of {listed(columns) or 'the other columns'}.")


def _in_prompts(patient: Patient, column: str) -> Iterator[Finding]:
    values = [at_path(row, column) for row in patient.rows]
    texts = ["" if is_empty(value) else _text(value) for value in values]
    prompts = [" ".join(text_of(turn) for turn in turns_of(row["prompt"])) for row in patient.rows]
    filled = [n for n, text in enumerate(texts) if text]
    if not filled:
        return
    leaked = [n for n in filled if _contains(prompts[n], texts[n])]
    # A rule may be the same in all rows: another row's prompt is a comparison only where the values differ.
    different = [n for n in filled if texts[n] != texts[(n + 1) % len(texts)]]
    others = [n for n in different if _contains(prompts[(n + 1) % len(prompts)], texts[n])]
    excess = len(leaked) / len(filled) - (len(others) / len(different) if different else 0.0)
    long = sum(len(texts[n]) >= LONG and len(texts[n].split()) >= SENTENCE for n in leaked) > len(leaked) / 2
    figures = {"own": len(leaked), "another": len(others), "rows": len(filled)}
    if excess > EXCESS and long:
        yield find(
            "fail",
            f"the student's prompt contains all of {column!r} in {len(leaked)} of {len(filled)} rows, first row "
            f"{patient.numbers[leaked[0]]}: nothing is privileged there.",
            "Remove it from the prompt. What only the teacher should know belongs into a column of its own.",
            figures=figures,
        )
    elif (excess > EXCESS or (long and excess > SOME)) and len(leaked) > 1:
        yield find(
            "warn",
            f"the prompt contains its own {column!r} in {len(leaked)} of {len(filled)} rows, first row "
            f"{patient.numbers[leaked[0]]}, and another row's in {len(others)}: the question gives its answer away.",
            "Ignore this where the prompt lists choices. Otherwise fix the questions.",
            figures=figures,
        )


def _text(value: Any) -> str:
    return as_text(with_conversations(value, plain_text)).strip()


def _contains(text: str, value: str) -> bool:
    """Tell whether a text contains a value: as whole words, or, where it is long, in any case and spacing."""
    if len(value) >= LONG:
        return "".join(value.split()).casefold() in "".join(text.split()).casefold()
    return re.search(rf"(?<![\w.-]){re.escape(value)}(?![\w]|[.,]\d)", text, re.IGNORECASE) is not None


def _in_prefills(patient: Patient) -> Iterator[Finding]:
    """Find privileged text in the assistant's prefill, which the student's rollout would continue."""
    for prompt in patient.teacher_prompts:
        row: Any = patient.rows[prompt.row]
        names = prompt.context.fields | prompt.context.optional_fields if prompt.context else ()
        given = [
            name for name in names if not is_empty(at_path(row, name)) and _text(at_path(row, name)) in prompt.prefill
        ]
        if given and prompt.prefill.strip():
            yield find(
                "warn",
                f"template {prompt.context.name if prompt.context else ''!r} puts {listed(given)} into the assistant's "
                "prefill: for the teacher the answer is already given, and it scores the rollout as what follows it.",
                "Move it into the block user or system; the block assistant is for an opening such as <think>.",
            )
            return
