"""Check 5: the ids of every prompt contain all that its messages contain."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator

from opsd.contexts.messages import turns_of
from opsd.data.values import text_of
from opsd.doctor.patient import Patient, RenderedPrompt
from opsd.findings import Finding, listed
from opsd.models.forward import context_length

MOST_SHORTENED = 0.25  # share of rows from which shortening is the rule and not the exception
_PRINTED = re.compile(r"\[\{['\"](?:role|content)['\"]:")
# Not \frac{{x}}{2}: a name has three letters, and no command stands before it.
_PLACEHOLDER = re.compile(r"(?<![\w}])\{\{\s*[a-z_]\w{2,}\s*\}\}|\{% .*? %\}")
_CUE = re.compile(r"(?:^|\n)[^\n]{0,30}[\w)][:=]\s*\Z|=\s*\Z")  # the end of a text prompt that asks to be continued
find = functools.partial(Finding, "prompts")


def check_prompts(patient: Patient) -> Iterator[Finding]:
    """Look for text that was lost, merged, printed as Python prints it, or never inserted."""
    problems = [
        *_lost(patient),
        *_merged(patient),
        *_default(patient),
        *_printed(patient),
        *_questions(patient),
        *_bare(patient),
        *_ends(patient),
        *_cues(patient),
    ]
    yield from problems
    yield from _shortened(patient)
    if not problems:
        yield find("pass", f"{len(patient.prompts)} prompts contain all of their messages.")
    yield _lengths(patient)


def _lost(patient: Patient) -> Iterator[Finding]:
    """Find prompts whose ids lack a part of their messages, or do not end where an answer begins."""
    cut: dict[str, list[RenderedPrompt]] = {}
    headless: list[RenderedPrompt] = []
    for prompt in patient.prompts:
        text, turns = _plain(prompt.text), turns_of(prompt.messages)
        for turn in turns:
            words = _plain(text_of(turn))
            if not any(form in text for form in _forms(text_of(turn))):
                where = "left" if words[-20:] in text else "right" if words[:20] in text else "whole"
                # Templates rewrite tool output, and drop the reasoning of earlier turns, on purpose.
                matters = turn is turns[-1] or turn["role"] in ("system", "user")
                cut.setdefault(f"{turn['role']} {where} {'fail' if matters else 'warn'}", []).append(prompt)
        ending = _plain(prompt.renderer.opening + prompt.prefill) if not isinstance(prompt.messages, str) else ""
        if ending and not text.endswith(ending):
            headless.append(prompt)
    for key, prompts in cut.items():
        role, where, status = key.split(" ")
        lost = "is missing" if where == "whole" else f"was cut from the {where}"
        yield find(
            "fail" if status == "fail" else "warn",
            f"the {role} turn {lost} in {len(prompts)} prompts, first in row {patient.numbers[prompts[0].row]} of the "
            f"{prompts[0].name}: the model does not read all of the messages.",
            "Look for truncation in the tokenizer, and for a chat template that drops or shortens turns. To shorten on "
            "purpose, name the one field to shorten: truncate and max_prompt_tokens.",
            (f"start and end of the prompt: {prompts[0].text[:80]!r} … {prompts[0].text[-80:]!r}",),
        )
    if headless:
        prompt = headless[0]
        yield find(
            "fail",
            f"{len(headless)} prompts do not end with {prompt.renderer.opening!r}, first row "
            f"{patient.numbers[prompt.row]} of the {prompt.name}: the assistant's header was cut, and the rollout "
            "would continue the user's turn.",
            "Look for truncation in the tokenizer, and for a chat template that ignores add_generation_prompt.",
            (f"it ends with: {prompt.text[-80:]!r}",),
        )


def _forms(text: str) -> list[str]:
    """Return the forms in which a chat template may write a turn: as it is, as JSON, without its reasoning."""
    return [_plain(form) for form in (text, json.dumps(text)[1:-1], text.rpartition("</think>")[2])]


def _merged(patient: Patient) -> Iterator[Finding]:
    """Find chat templates that write the system turn into the user's."""
    for prompt in patient.prompts:
        turns = turns_of(prompt.messages) if not isinstance(prompt.messages, str) else []
        texts = {turn["role"]: text_of(turn) for turn in turns[:2]}
        if "system" not in texts or "user" not in texts or not texts["system"].strip():
            continue
        between = prompt.text.partition(texts["system"].strip())[2].partition(texts["user"].strip()[:40])[0]
        if not between.strip() and texts["user"].strip()[:40] in prompt.text:
            yield find(
                "warn",
                f"the chat template merges the system turn into the user's, first for the {prompt.name}: between the "
                f"two there is only {between!r}.",
                "If the model knows no system turn, put the text into the block user of the template instead.",
            )
            return


def _default(patient: Patient) -> Iterator[Finding]:
    """Find a default system turn of the chat template that the teacher's system turn replaces."""
    for prompt in patient.teacher_prompts:
        student = patient.student_prompts[prompt.row].messages
        if isinstance(student, str) or isinstance(prompt.messages, str) or prompt.messages[0]["role"] != "system":
            continue
        if student[0]["role"] == "system":
            continue
        user, word = [{"role": "user", "content": "?"}], "opsd"
        with_system = prompt.renderer.transcript([{"role": "system", "content": word}, *user]).partition("?")[0]
        default = patient.student.renderer.transcript(user).partition("?")[0]
        if len(default) > len(with_system) - len(word):
            yield find(
                "warn",
                f"the chat template has a default system turn, {default[:100]!r}, and the teacher's system turn "
                "replaces it: student and teacher differ by more than the context you wrote.",
                "Give the student that turn as student_system_prompt; a template can then extend it ({{ system }}).",
            )
            return


def _printed(patient: Patient) -> Iterator[Finding]:
    prompts = [prompt for prompt in patient.prompts if _PRINTED.search(prompt.text)]
    if prompts:
        yield find(
            "fail",
            f"{len(prompts)} prompts show messages as Python prints them ([{{'role': …), first row "
            f"{patient.numbers[prompts[0].row]} of the {prompts[0].name}.",
            "Keep the column a list of messages, which a template writes as turns; do not convert it to text (str(), "
            "string, tojson).",
        )
    literal = [prompt for prompt in patient.prompts if _PLACEHOLDER.search(prompt.text)]
    if literal:
        placeholder = _PLACEHOLDER.search(literal[0].text)
        yield find(
            "warn",
            f"{len(literal)} prompts contain the literal text {placeholder[0] if placeholder else ''!r}, first row "
            f"{patient.numbers[literal[0].row]} of the {literal[0].name}: a placeholder that was never filled in.",
            "Columns are not rendered as templates: fill them in when the dataset is made, or use a template for the "
            "teacher.",
        )


def _questions(patient: Patient) -> Iterator[Finding]:
    """Find teacher prompts without the question."""
    without = []
    for prompt in patient.teacher_prompts:
        question = text_of(turns_of(patient.rows[prompt.row]["prompt"])[-1])
        if prompt.context is not None and _plain(question) not in _plain(prompt.text):
            without.append(prompt)
    if without:
        prompt = without[0]
        template = prompt.context.name if prompt.context else ""
        meant = "teacher_prompt" in (prompt.context.fields if prompt.context else ())
        yield find(
            "pass" if meant else "warn",
            f"template {template!r} leaves out the question in {len(without)} rows, first row "
            f"{patient.numbers[prompt.row]}" + (": the column teacher_prompt replaces it." if meant else "."),
            "" if meant else "Write {{ prompt }} into the block user, or extend a template that has it.",
        )


def _bare(patient: Patient) -> Iterator[Finding]:
    """Find contexts that add nothing to the student's prompt."""
    with_context = [prompt for prompt in patient.teacher_prompts if prompt.context is not None]
    same = [prompt for prompt in with_context if prompt.ids == patient.student_prompts[prompt.row].ids]
    if not same:
        return
    if len(same) == len(with_context):
        saw = f"the teacher's prompt equals the student's in all {len(same)} prompts: the context is always empty"
        teaches_nothing = patient.teacher.starts_as_student
        yield find(
            "fail" if teaches_nothing else "warn",
            f"{saw}, and this teacher starts as the student: the loss is 0." if teaches_nothing else f"{saw}.",
            "Check the template's conditions and the columns it reads: `opsd lint`, `opsd show`.",
        )
    else:
        yield find(
            "warn",
            f"the teacher's prompt equals the student's in {len(same)} of {len(with_context)} prompts, first row "
            f"{patient.numbers[same[0].row]}.",
            "Fill the columns in these rows, drop the rows, or name a fallback in a schedule.",
        )


def _ends(patient: Patient) -> Iterator[Finding]:
    """Find text prompts to which the tokenizer adds its end of text."""
    end = patient.tokenizer.eos_token
    ended = [
        prompt for prompt in patient.prompts
        if isinstance(prompt.messages, str) and prompt.ids[-1:] == [patient.tokenizer.eos_token_id]
        and not prompt.messages.rstrip().endswith(end)
    ]  # fmt: skip
    if ended:
        yield find(
            "fail",
            f"the tokenizer adds {end!r} to {len(ended)} text prompts, first row {patient.numbers[ended[0].row]} of "
            f"the {ended[0].name}: the model reads that its text has ended, and answers as after an end.",
            "Switch it off: tokenizer.add_eos_token = False, or remove it from the tokenizer's post-processor.",
        )


def _cues(patient: Patient) -> Iterator[Finding]:
    """Find text prompts whose cue, such as `Answer:`, no longer ends the teacher's prompt."""
    lost = []
    for prompt in patient.teacher_prompts:
        question = patient.rows[prompt.row]["prompt"]
        end = _CUE.search(question) if isinstance(question, str) else None
        if end and not prompt.text.rstrip().endswith(end[0].strip()):
            lost.append((end[0].strip(), prompt))
    if lost:
        cue, prompt = lost[0]
        yield find(
            "warn",
            f"the student's prompt ends with {cue!r}, and the {prompt.name} ends with {prompt.text[-40:]!r}, in "
            f"{len(lost)} rows: the student's answer follows a cue that the teacher does not end with.",
            "Write the context before the question in your template ({{ answer }} first, {{ prompt }} last), or give "
            "the prompts as messages.",
        )


def _shortened(patient: Patient) -> Iterator[Finding]:
    used = [prompt.context for prompt in patient.teacher_prompts if prompt.context is not None]
    contexts = {id(context): context for context in used}.values()
    rendered = sum(context.counts.rendered for context in contexts)
    cut = sum(context.counts.shortened for context in contexts)
    if cut:
        share, tokens = cut / rendered, sum(context.counts.tokens_cut for context in contexts) / cut
        yield find(
            "warn" if share > MOST_SHORTENED else "pass",
            f"a field was shortened in {share:.0%} of the teacher's prompts, by {tokens:.0f} tokens on average.",
            "Raise max_prompt_tokens, or use less of the field on purpose: reveal, or an outline."
            if share > MOST_SHORTENED
            else "",
            figures={"share": share, "tokens": tokens},
        )


def _lengths(patient: Patient) -> Finding:
    longest = {prompt.name.split(" ")[0]: 0 for prompt in patient.prompts}
    for prompt in patient.prompts:
        name = prompt.name.split(" ")[0]
        longest[name] = max(longest[name], len(prompt.ids))
    limits = {"student": context_length(patient.student.model), "teacher": patient.teacher.max_length}
    room = patient.args.max_completion_length
    if patient.args.use_vllm and getattr(patient.args, "vllm_max_model_length", None):
        limits["student"] = min(limits["student"] or 10**9, patient.args.vllm_max_model_length)
    lengths = [f"{name} {size:,} + {room:,} of {limits[name] or 'any'}" for name, size in longest.items()]
    over = [name for name, size in longest.items() if limits[name] is not None and size + room > limits[name]]
    return find(
        "fail" if over else "pass",
        f"longest prompt and completion, in tokens: {listed(lengths)}" + (": too long." if over else "."),
        "Shorten prompts (truncate, max_prompt_tokens), lower max_completion_length, or drop these rows."
        if over
        else "",
        figures=longest,
    )


def _plain(text: str) -> str:
    """Return a text without blank space, which tokenizers and chat templates change at will."""
    return "".join(text.split())
