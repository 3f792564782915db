"""Check 1: student and teacher use the same tokens: vocabularies, special tokens, turns, openings of answers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jinja2
import torch
from jinja2 import meta

from opsd.contexts.completions import end_of_answer
from opsd.contexts.markup import chat_markup
from opsd.contexts.renderer import THINK, PromptRenderer
from opsd.doctor.patient import Patient, RenderedPrompt
from opsd.findings import Finding, listed
from opsd.models.forward import all_hidden, evaluating, language_model
from opsd.models.head import Head
from opsd.teachers.local import LocalTeacher
from opsd.teachers.tokenizers import first_difference

# Padding rows of a head are never trained; above this they would be sampled now and then.
PADDING_MASS = 1e-3
# Names that transformers gives every chat template.
_GIVEN = {
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "raise_exception",
    "strftime_now",
    "namespace",
    "range",
}
find = functools.partial(Finding, "tokenizers")


def check_tokenizers(patient: Patient) -> Iterator[Finding]:
    """Check vocabularies, heads, special tokens, ends of turns, keywords, and how an answer is opened."""
    yield from _vocabularies(patient)
    yield from _heads(patient)
    yield from _begins(patient)
    yield from _ends(patient)
    yield from _keywords(patient)
    yield from _openings(patient)


def _vocabularies(patient: Patient) -> Iterator[Finding]:
    for view in _distinct_renderers(patient):
        difference = first_difference(patient.tokenizer, view.tokenizer)
        if difference:
            yield find(
                "fail", f"the two tokenizers differ: {difference}.", "Use a teacher with the student's tokenizer."
            )
        renderers = (patient.student.renderer, view)
        templates = [renderer.chat_template or renderer.tokenizer.chat_template for renderer in renderers]
        if templates[0] != templates[1]:
            yield find(
                "warn",
                "student and teacher have different chat templates, and each renders its prompts with its own.",
                "Compare the two prompts with `opsd show`; if only the wording of turns differs, give the teacher the "
                "student's: save its tokenizer with the student's chat template.",
            )
    special = ", ".join(f"{name} {getattr(patient.tokenizer, f'{name}_token')!r}" for name in ("bos", "eos", "pad"))
    yield find("pass", f"one vocabulary of {len(patient.tokenizer):,} tokens; {special}.")


def _heads(patient: Patient) -> Iterator[Finding]:
    vocabulary = len(patient.tokenizer)
    heads = {"student": patient.student.model}
    for teacher in patient.teacher.members:
        if isinstance(teacher, LocalTeacher) and teacher.model is not patient.student.model:
            heads["teacher"] = teacher.model
    for name, model in heads.items():
        size = Head.from_model(model).vocab_size
        if size < vocabulary:
            yield find(
                "fail",
                f"the {name}'s head has {size:,} rows and the tokenizer {vocabulary:,} tokens: the last "
                f"{vocabulary - size:,} can be neither sampled nor scored.",
                "Resize the model: model.resize_token_embeddings(len(tokenizer)), then train the new rows.",
            )
        elif size > vocabulary:
            yield _padding(patient, name, model, size - vocabulary)


def _padding(patient: Patient, name: str, model: Any, padding: int) -> Finding:
    """Tell whether a padded head gives its padding any probability."""
    vocabulary, ids = len(patient.tokenizer), patient.student_prompts[0].ids
    ids_BL = torch.tensor([ids], device=next(model.parameters()).device)
    with evaluating(model):
        logits_NV = Head.from_model(model).logits(all_hidden(model, ids_BL))
    mass = logits_NV.float().softmax(-1)[:, vocabulary:].sum(-1).max().item()
    figures = {"padding": padding, "mass": mass}
    saw = f"the {name}'s head is padded by {padding:,} rows beyond the tokenizer, which get a probability of {mass:.1e}"
    if mass > PADDING_MASS:
        return find(
            "warn",
            f"{saw} at one prompt: ids without a token will be sampled.",
            "Give the padding rows of the head a bias of -inf, or resize the model to the tokenizer.",
            figures=figures,
        )
    return find("pass", f"{saw} at most.", figures=figures)


def _begins(patient: Patient) -> Iterator[Finding]:
    begin = patient.tokenizer.bos_token_id
    twice = [prompt for prompt in patient.prompts if begin is not None and prompt.ids[:2] == [begin, begin]]
    if twice:
        yield find(
            "fail",
            f"{len(twice)} prompts begin with {patient.tokenizer.bos_token!r} twice, first that of the "
            f"{twice[0].name}: the tokenizer adds one, and the text has one.",
            "Remove the token from the chat template or the prompts, or load the tokenizer with add_bos_token=False.",
            (_head(twice[0]),),
        )
    if begin is None:
        return
    first = {prompt.name.split(" ")[0]: prompt.ids[0] == begin for prompt in patient.prompts}
    if len(set(first.values())) > 1:
        yield find(
            "warn",
            f"only prompts of student or of teacher begin with {patient.tokenizer.bos_token!r}, not both: {first}.",
            "Render both with one tokenizer configuration.",
        )


def _head(prompt: RenderedPrompt) -> str:
    return f"{prompt.name}: {[prompt.renderer.tokenizer.decode([token]) for token in prompt.ids[:6]]}"


def _ends(patient: Patient) -> Iterator[Finding]:
    stops = set(patient.trainer.eos_token_ids)
    stop_tokens = listed(sorted({patient.tokenizer.decode([token]) for token in stops}))
    first = patient.student_prompts[0].messages
    end = end_of_answer(patient.student.renderer, first)
    if end is not None and end not in stops:
        yield find(
            "warn",
            f"an answer ends with {patient.tokenizer.decode([end])!r} by the chat template, and sampling stops "
            f"at {stop_tokens} only: rollouts would go on with further turns until they are cut.",
            f"Add it: generation_kwargs: {{eos_token_id: {end}}}.",
        )
    elif end is not None:
        yield find("pass", f"an answer ends with {patient.tokenizer.decode([end])!r}, where sampling stops.")
    for teacher in patient.teacher.members:
        if not isinstance(teacher, LocalTeacher) or teacher.model is patient.student.model:
            continue
        config: Any = language_model(teacher.model).generation_config
        ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        ends = {token for token in ids if token is not None}
        if ends and not ends & stops:
            yield find(
                "warn",
                f"the teacher ends its answers with {listed(patient.tokenizer.decode([t]) for t in sorted(ends))} "
                f"and the student with {stop_tokens}: at the end of every answer the teacher expects another token.",
                "Give both models the same end: generation_config.eos_token_id and the chat template must agree; or "
                "leave the end out of the loss: mask_special_tokens: true.",
            )


def _keywords(patient: Patient) -> Iterator[Finding]:
    checked = set()
    for prompt in patient.prompts:
        template = prompt.renderer.chat_template or prompt.renderer.tokenizer.chat_template
        keywords = set(prompt.renderer.chat_template_kwargs)
        if not isinstance(template, str) or not keywords or (prompt.name, *sorted(keywords)) in checked:
            continue
        checked.add((prompt.name, *sorted(keywords)))
        environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do"])
        try:
            known = meta.find_undeclared_variables(environment.parse(template))
        except jinja2.TemplateSyntaxError:  # transformers' own tags
            continue
        ignored = sorted(keywords - known)
        if ignored:
            yield find(
                "warn",
                f"the chat template of the {prompt.name} does not read {listed(ignored)}: the keyword changes nothing.",
                f"Check the spelling. It reads: {listed(sorted(known - _GIVEN)) or 'no keywords'}.",
            )


def _openings(patient: Patient) -> Iterator[Finding]:
    """Compare the text between the last turn and the first token of a rollout."""
    student = patient.student.renderer.opening
    if isinstance(patient.student_prompts[0].messages, str):
        yield from _openings_of_text(patient)
        return
    header = _missing_header(patient)
    if header:
        yield find(
            "fail",
            f"the chat template writes no generation prompt, and opens an assistant's turn with {header!r}: every "
            "rollout would continue the user's turn.",
            "Use a chat template that reads add_generation_prompt, as those of instruction models do.",
        )
        return
    different: dict[str, RenderedPrompt] = {}
    bridged = [
        prompt for prompt in patient.teacher_prompts if prompt.context is not None and prompt.context.bridge_thinking
    ]
    if bridged:
        yield find("pass", f"the prompt of the {bridged[0].name} opens a thinking block that the rollout continues.")
    for prompt in patient.teacher_prompts:
        if prompt not in bridged and prompt.renderer.opening + prompt.prefill != student:
            different.setdefault(prompt.renderer.opening + prompt.prefill, prompt)
    for opening, prompt in different.items():
        thinks = [THINK in text.rpartition("</think>")[2] for text in (student, opening)]
        mode = "thinks" if thinks[1] else "answers at once"
        what = f"one {mode} and the other does not" if thinks[0] != thinks[1] else "they open answers differently"
        yield find(
            "warn",
            f"the student's rollouts begin after {student!r} and the {prompt.name} expects them after {opening!r}: "
            f"{what}. The first tokens will be penalised for not opening the way the teacher expects.",
            "Use the same chat_template_kwargs for both; or bridge_thinking: true, for a student that reasons in plain "
            "text under a teacher that thinks; or leave the first tokens out: skip_first_tokens.",
        )
    if not different and not bridged and student:
        yield find("pass", f"the answer begins after {student!r} for both.")


def _openings_of_text(patient: Patient) -> Iterator[Finding]:
    """Say where answers to text prompts begin; the chat template writes no header there, and the text may have one."""
    renderer = patient.student.renderer
    chats = [prompt for prompt in patient.prompts if chat_markup(prompt.text, renderer)]
    if not chats:
        yield find("pass", "the prompts are plain text: the answer begins where the text ends, without a header.")
        return
    header = renderer.opening or "the assistant's header"
    headless = [prompt for prompt in chats if not renderer.opening or not prompt.text.endswith(renderer.opening)]
    if headless:
        prompt = headless[0]
        yield find(
            "warn",
            f"{len(headless)} text prompts are written as a chat ({chat_markup(prompt.text, renderer)!r}) and do not "
            f"end with {header!r}, first row {patient.numbers[prompt.row]} of the {prompt.name}: the rollout may "
            "continue the user's turn.",
            'Give prompts as messages, which the chat template writes: [{"role": "user", "content": "…"}].',
            (f"it ends with: {prompt.text[-80:]!r}",),
        )
    else:
        yield find("pass", f"the prompts are text that is a chat already, and the answer begins after {header!r}.")


def _missing_header(patient: Patient) -> str:
    """Return the text between a user's turn and the assistant's that is missing from prompts, or ""."""
    renderer, word = patient.student.renderer, "opsd"
    if renderer.opening:
        return ""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": word}]
    try:
        both, user = renderer.transcript(turns).rpartition(word)[0], renderer.transcript(turns[:1])
    except (ValueError, jinja2.TemplateError):
        return ""
    return both.removeprefix(user).strip() if both.startswith(user) else ""


def _distinct_renderers(patient: Patient) -> list[PromptRenderer]:
    """Return the renderers of teachers that have a tokenizer of their own."""
    renderers = {id(leaf.renderer.tokenizer): leaf.renderer for leaf in patient.teacher.prompts.leaves}
    renderers.pop(id(patient.tokenizer), None)
    return list(renderers.values())
