"""Check of the dataset's rows: answers that say nothing or contradict, markup in texts, columns that nothing reads.

Looks at more rows than the checks that run a model: reading costs little.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from opsd.contexts.messages import turns_of
from opsd.data.rows import completion_of
from opsd.data.values import at_path, is_empty, text_of
from opsd.doctor.leaks import ANSWERS
from opsd.doctor.patient import Patient
from opsd.findings import Finding
from opsd.training.off_policy import trains_on_completions

LOOKED_AT = 2000  # rows
FEW = 8  # rows, below which one answer in all of them may be chance
NO_VALUE = {"nan", "none", "null", "n/a", "<na>", "undefined"}  # as other tools write a missing value into text
CUT = 0.1  # share of completions that are cut, from which their ends are hardly taught
find = functools.partial(Finding, "rows")
Numbered = Sequence[tuple[int, Mapping[str, Any]]]


def check_rows(patient: Patient) -> Iterator[Finding]:
    """Look for rows that cannot teach what was meant."""
    rows = list(enumerate(islice(iter(patient.trainer.train_dataset), LOOKED_AT)))
    findings = [
        *_answers(rows),
        *_contradictions(rows),
        *_markup(patient, rows),
        *_tools(patient, rows),
        *_written_messages(rows),
        *_last_turns(rows),
        *_completions(patient, rows),
    ]
    yield from findings
    if not findings:
        yield find(
            "pass",
            f"in {len(rows):,} rows no answer stands for all, none contradict, and no text has the mark of a turn.",
        )


def _answers(rows: Numbered) -> Iterator[Finding]:
    """Find answers that are the same in all rows, and words for a missing value."""
    for column in ANSWERS:
        values = {number: _as_text(row.get(column)) for number, row in rows if not is_empty(row.get(column))}
        if len(values) >= FEW and len(set(values.values())) == 1:
            yield find(
                "warn",
                f"{column} is {next(iter(values.values()))!r:.60} in all {len(values):,} rows: whatever is asked, the "
                "teacher is told the same.",
                "Look for a constant where the column is made. A rule that holds for every row belongs into the "
                "template, or into the context's values.",
            )
        missing = [number for number, value in values.items() if value.strip().lower() in NO_VALUE]
        if missing:
            yield find(
                "warn",
                f"{column} is {values[missing[0]]!r} in {len(missing):,} rows, first row {missing[0]}: a missing value "
                "that was written as text, and is an answer now.",
                "Leave the value out (null), so that such rows are refused or a schedule's next level stands in.",
            )


def _contradictions(rows: Numbered) -> Iterator[Finding]:
    """Find one question with two answers."""
    first: dict[str, tuple[int, str]] = {}
    pairs = []
    for number, row in rows:
        answer = _as_text(row.get("answer"))
        if answer:
            question = json.dumps(row["prompt"], sort_keys=True, default=str)
            before = first.setdefault(question, (number, answer))
            if before[1] != answer:
                pairs.append((before[0], number))
    if pairs:
        a, b = pairs[0]
        yield find(
            "warn",
            f"{len(pairs):,} rows ask what another row asks and have another answer, first rows {a} and {b}.",
            "Keep one of them: the teacher would pull the same prompt to both.",
            (f"row {a}: answer {_answer_of(rows, a)!r}", f"row {b}: answer {_answer_of(rows, b)!r}"),
        )


def _answer_of(rows: Numbered, number: int) -> str:
    """Return the answer of a row as text."""
    return _as_text(rows[number][1].get("answer"))[:60]


def _markup(patient: Patient, rows: Numbered) -> Iterator[Finding]:
    """Find special tokens written into turns, into what a context shows, or into completions."""
    tokens = sorted({str(token) for token in patient.tokenizer.all_special_tokens if len(str(token)) > 1})
    columns = sorted({name for context in patient.trainer.scorer.contexts for name in context.columns} - {"prompt"})
    places: dict[str, list[tuple[int, str]]] = {}
    for number, row in rows:
        texts = {"prompt": "" if isinstance(row["prompt"], str) else "\n".join(map(text_of, turns_of(row["prompt"])))}
        texts |= {name: value for name in [*columns, "completion"] if isinstance(value := at_path(row, name), str)}
        for name, text in texts.items():
            if token := _first_of(tokens, text):
                places.setdefault(name, []).append((number, token))
    for name, found in places.items():
        number, token = found[0]
        yield find(
            "warn",
            f"{name} contains {token!r} in {len(found):,} rows, first row {number}: the tokenizer reads it as a "
            "special token, so the text ends a turn or begins one.",
            f"Remove it from the column: the chat template writes the marks of turns. ({token!r} in a text that is "
            "about it cannot be told from a mark.)",
        )


def _first_of(tokens: Sequence[str], text: str) -> str | None:
    """Return the first of many tokens in a text; most texts have none of the few characters that they begin with."""
    begins = "".join({token[0] for token in tokens})
    places = (match.start() for match in re.finditer(f"[{re.escape(begins)}]", text)) if begins else ()
    return next((token for place in places for token in tokens if text.startswith(token, place)), None)


def _tools(patient: Patient, rows: Numbered) -> Iterator[Finding]:
    """Find descriptions of tools that no prompt gets."""
    filled = [number for number, row in rows if not is_empty(row.get("tools"))]
    if filled and not patient.student.renderer.tools:
        yield find(
            "warn",
            f"{len(filled):,} rows have `tools`, first row {filled[0]}, and no prompt lists them: tools are the run's, "
            "not a row's.",
            "Give them to the trainer, OPSDTrainer(…, tools=[…]), or write their description into the system turn.",
        )


def _written_messages(rows: Numbered) -> Iterator[Finding]:
    """Find prompts that hold messages as JSON text."""
    written = [number for number, row in rows if isinstance(row["prompt"], str) and _is_messages(row["prompt"])]
    if written:
        yield find(
            "warn",
            f"`prompt` is messages written as JSON text in {len(written):,} rows, first row {written[0]}: the student "
            "reads brackets and quotes, and no chat template is applied.",
            "Parse the column: dataset.map(lambda row: {'prompt': json.loads(row['prompt'])}).",
        )


def _is_messages(text: str) -> bool:
    if not text.lstrip().startswith("["):
        return False
    try:
        turns = json.loads(text)
    except ValueError:
        return False
    return bool(turns) and all(isinstance(turn, dict) and "role" in turn and "content" in turn for turn in turns)


def _last_turns(rows: Numbered) -> Iterator[Finding]:
    """Find prompts in which a system turn stands behind the question."""
    last = [number for number, row in rows if turns_of(row["prompt"])[-1]["role"] == "system"]
    if last:
        yield find(
            "warn",
            f"the last turn is a system turn in {len(last):,} rows, first row {last[0]}: chat models are trained "
            "with the user's turn, or a tool's, before their answer.",
            "Put the system turn first, or its text into the user's turn.",
        )


def _completions(patient: Patient, rows: Numbered) -> Iterator[Finding]:
    """Find completions, where the run trains on them, that are cut before their end."""
    if not trains_on_completions(patient.args):
        return
    room = patient.args.max_completion_length
    completions = {number: text for number, row in rows if isinstance(text := completion_of(row), str)}
    tokenize = functools.partial(patient.tokenizer, add_special_tokens=False)
    lengths = {number: len(tokenize(text)["input_ids"]) for number, text in completions.items()}
    cut = [number for number, length in lengths.items() if length > room]
    if len(cut) > CUT * len(completions):
        yield find(
            "warn",
            f"{len(cut):,} of {len(completions):,} completions are longer than max_completion_length ({room}), first "
            f"row {cut[0]} with {lengths[cut[0]]:,} tokens: they are cut, and the student does not learn to end them.",
            f"Raise max_completion_length ({max(lengths.values()):,} for all of them), or leave long rows out.",
            figures={"cut": len(cut), "of": len(completions), "longest": max(lengths.values())},
        )


def _as_text(value: Any) -> str:
    return "" if is_empty(value) else value if isinstance(value, str) else json.dumps(value, default=str)
