"""Check 4: is everything that a prompt should say still in it, once it is ids?"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator

from opsd.contexts.messages import turns_of
from opsd.data.values import text_of
from opsd.doctor.patient import Patient, Side
from opsd.findings import Finding, listed
from opsd.models.forward import context_length

MOST_SHORTENED = 0.25  # share of rows from which shortening is the rule and not the exception
_PRINTED = re.compile(r"\[\{['\"](?:role|content)['\"]:")
# Not \frac{{x}}{2}: a name has three letters, and no command stands before it.
_PLACEHOLDER = re.compile(r"(?<![\w}])\{\{\s*[a-z_]\w{2,}\s*\}\}|\{% .*? %\}")
find = functools.partial(Finding, "prompts")


def check_prompts(patient: Patient) -> Iterator[Finding]:
    """Look for what was lost, merged, printed as Python prints it, or never added."""
    problems = [
        *_lost(patient),
        *_merged(patient),
        *_default(patient),
        *_printed(patient),
        *_questions(patient),
        *_bare(patient),
    ]
    yield from problems
    yield from _shortened(patient)
    if not problems:
        yield find("pass", f"{len(patient.sides)} prompts say everything that their messages say.")
    yield _lengths(patient)


def _lost(patient: Patient) -> Iterator[Finding]:
    """Find prompts whose ids no longer say what their messages say, or do not end where an answer begins."""
    cut: dict[str, list[Side]] = {}
    headless: list[Side] = []
    for side in patient.sides:
        text, turns = _plain(side.text), turns_of(side.prompt)
        for turn in turns:
            words = _plain(text_of(turn))
            if not any(form in text for form in _forms(text_of(turn))):
                where = "left" if words[-20:] in text else "right" if words[:20] in text else "whole"
                # Templates rewrite tool output and shorten what was thought in earlier turns on purpose.
                matters = turn is turns[-1] or turn["role"] in ("system", "user")
                cut.setdefault(f"{turn['role']} {where} {'fail' if matters else 'warn'}", []).append(side)
        ending = _plain(side.renderer.opening + side.prefill) if not isinstance(side.prompt, str) else ""
        if ending and not text.endswith(ending):
            headless.append(side)
    for key, sides in cut.items():
        role, where, status = key.split(" ")
        lost = "is missing" if where == "whole" else f"was cut from the {where}"
        yield find(
            "fail" if status == "fail" else "warn",
            f"the {role} turn {lost} in {len(sides)} prompts, first in row {patient.numbers[sides[0].row]} of the "
            f"{sides[0].name}: what the messages say is not what the model reads.",
            "Look for truncation in the tokenizer, and for a chat template that drops or shortens turns. To shorten on "
            "purpose, name the one field that may be: truncate and max_prompt_tokens.",
            (f"ends of what it reads: {sides[0].text[:80]!r} … {sides[0].text[-80:]!r}",),
        )
    if headless:
        side = headless[0]
        yield find(
            "fail",
            f"{len(headless)} prompts do not end with {side.renderer.opening!r}, first row "
            f"{patient.numbers[side.row]} of the {side.name}: the assistant's header was cut, and the rollout would "
            "continue the user's turn.",
            "Look for truncation in the tokenizer, and for a chat template that ignores add_generation_prompt.",
            (f"it ends with: {side.text[-80:]!r}",),
        )


def _forms(text: str) -> list[str]:
    """Return the forms in which a chat template may write a turn: as it is, as JSON, without what was thought."""
    return [_plain(form) for form in (text, json.dumps(text)[1:-1], text.rpartition("</think>")[2])]


def _merged(patient: Patient) -> Iterator[Finding]:
    """Find chat templates that have no system turn of their own."""
    for side in patient.sides:
        turns = turns_of(side.prompt) if not isinstance(side.prompt, str) else []
        texts = {turn["role"]: text_of(turn) for turn in turns[:2]}
        if "system" not in texts or "user" not in texts or not texts["system"].strip():
            continue
        between = side.text.partition(texts["system"].strip())[2].partition(texts["user"].strip()[:40])[0]
        if not between.strip() and texts["user"].strip()[:40] in side.text:
            yield find(
                "warn",
                f"the chat template merges the system turn into the user's, first for the {side.name}: between the two "
                f"stands only {between!r}.",
                "If the model has learned no system turn, say it in the block user of the template instead.",
            )
            return


def _default(patient: Patient) -> Iterator[Finding]:
    """Find a system turn that the chat template writes by itself, and that a teacher's own takes the place of."""
    for side in patient.teachers:
        own = patient.students[side.row].prompt
        if isinstance(own, str) or isinstance(side.prompt, str) or side.prompt[0]["role"] != "system":
            continue
        if own[0]["role"] == "system":
            continue
        asked, word = [{"role": "user", "content": "?"}], "opsd"
        with_system = side.renderer.transcript([{"role": "system", "content": word}, *asked]).partition("?")[0]
        usual = patient.student.renderer.transcript(asked).partition("?")[0]
        if len(usual) > len(with_system) - len(word):
            yield find(
                "warn",
                f"the chat template writes a system turn where a prompt has none, {usual[:100]!r}, and the teacher's "
                "own takes its place: the two sides differ by more than what you wrote.",
                "Give the student that turn by student_system_prompt, so that a template can add to it ({{ system }}).",
            )
            return


def _printed(patient: Patient) -> Iterator[Finding]:
    sides = [side for side in patient.sides if _PRINTED.search(side.text)]
    if sides:
        yield find(
            "fail",
            f"{len(sides)} prompts show messages as Python prints them ([{{'role': …), first row "
            f"{patient.numbers[sides[0].row]} of the {sides[0].name}.",
            "Keep the column a list of messages, which a template writes as turns; do not turn it into text with "
            "str(), string or tojson.",
        )
    literal = [side for side in patient.sides if _PLACEHOLDER.search(side.text)]
    if literal:
        found = _PLACEHOLDER.search(literal[0].text)
        yield find(
            "warn",
            f"{len(literal)} prompts show {found[0] if found else ''!r} to the letter, first row "
            f"{patient.numbers[literal[0].row]} of the {literal[0].name}: a placeholder that nobody filled in.",
            "Columns are data and no templates: fill them in when the dataset is made, or use a template for the "
            "teacher.",
        )


def _questions(patient: Patient) -> Iterator[Finding]:
    """Find teachers that do not see the question."""
    without = []
    for side in patient.teachers:
        question = text_of(turns_of(patient.rows[side.row]["prompt"])[-1])
        if side.context is not None and _plain(question) not in _plain(side.text):
            without.append(side)
    if without:
        side = without[0]
        template = side.context.name if side.context else ""
        kept = "teacher_prompt" in (side.context.fields if side.context else ())
        yield find(
            "pass" if kept else "warn",
            f"template {template!r} does not show the question in {len(without)} rows, first row "
            f"{patient.numbers[side.row]}" + (": a prompt of the teacher's own takes its place." if kept else "."),
            "" if kept else "Write {{ prompt }} into the block user, or extend a template that has it.",
        )


def _bare(patient: Patient) -> Iterator[Finding]:
    shown = [side for side in patient.teachers if side.context is not None]
    same = [s for s in shown if s.ids == patient.students[s.row].ids]
    if not shown:
        yield from ()
    elif len(same) == len(shown):
        empty = f"the teacher sees just what the student sees in all {len(same)} prompts: its context is always empty"
        own = patient.teacher.starts_as_student
        yield find(
            "fail" if own else "warn",
            f"{empty}, and a teacher that begins as the student teaches nothing then." if own else f"{empty}.",
            "Look at the template's conditions and at the columns that it asks for: `opsd lint`, `opsd show`.",
        )
    elif same:
        yield find(
            "warn",
            f"the teacher sees just what the student sees in {len(same)} of {len(shown)} prompts, first row "
            f"{patient.numbers[same[0].row]}.",
            "Fill the columns in these rows, drop them, or name a fallback in a schedule.",
        )


def _shortened(patient: Patient) -> Iterator[Finding]:
    contexts = {id(side.context): side.context for side in patient.teachers if side.context is not None}.values()
    rendered = sum(context.counts.rendered for context in contexts)
    cut = sum(context.counts.shortened for context in contexts)
    if cut:
        share, tokens = cut / rendered, sum(context.counts.tokens_cut for context in contexts) / cut
        yield find(
            "warn" if share > MOST_SHORTENED else "pass",
            f"a field was shortened in {share:.0%} of the teacher's prompts, by {tokens:.0f} tokens on average.",
            "Raise max_prompt_tokens, or show less on purpose: reveal, or an outline."
            if share > MOST_SHORTENED
            else "",
            figures={"share": share, "tokens": tokens},
        )


def _lengths(patient: Patient) -> Finding:
    longest = {side.name.split(" ")[0]: 0 for side in patient.sides}
    for side in patient.sides:
        name = side.name.split(" ")[0]
        longest[name] = max(longest[name], len(side.ids))
    limits = {"student": context_length(patient.student.model), "teacher": patient.teacher.max_length}
    room = patient.args.max_completion_length
    if patient.args.use_vllm and getattr(patient.args, "vllm_max_model_length", None):
        limits["student"] = min(limits["student"] or 10**9, patient.args.vllm_max_model_length)
    told = [f"{name} {size:,} + {room:,} of {limits[name] or 'any'}" for name, size in longest.items()]
    over = [name for name, size in longest.items() if limits[name] is not None and size + room > limits[name]]
    return find(
        "fail" if over else "pass",
        f"longest prompt and completion, in tokens: {listed(told)}" + (": too long." if over else "."),
        "Shorten prompts (truncate, max_prompt_tokens), lower max_completion_length, or drop these rows."
        if over
        else "",
        figures=longest,
    )


def _plain(text: str) -> str:
    """Return a text without blank space, which tokenizers and chat templates change at will."""
    return "".join(text.split())
