"""Turns a completion that a row brings into the ids that a student would sample behind its prompt.

Behind messages the chat template writes the assistant's turn, and the token with which it ends a turn ends the
completion. Behind plain text the completion is its own text and the tokenizer's end. Knows tokenizers and chat
templates; nothing of rows, teachers or training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jinja2

from opsd.contexts.markup import own_markup
from opsd.contexts.messages import Prompt, Turns
from opsd.contexts.renderer import THINK, THINK_END, PromptRenderer
from opsd.data.values import REASONING, is_empty, text_of
from opsd.errors import DataError

Completion: TypeAlias = str | dict[str, Any]  # text, or an assistant's turn


def completion_ids(renderer: PromptRenderer, prompt: Prompt, completion: Completion) -> list[int]:
    """Return a completion's ids, up to and including the token that ends it; an end that the text has is not doubled.

    Args:
        renderer: the student's.
        prompt: the student's prompt.
        completion: text, or an assistant's turn with text, which may have reasoning and tool calls.

    Raises:
        DataError: the completion is empty or goes on behind its end, the chat template leaves a part of it out, or it
            does not fit the thinking block that the prompt opens or closes.

    Example::

        completion_ids(renderer, [{"role": "user", "content": "1 + 1?"}], "It is 2.")  # … <end_of_turn> for Gemma
    """
    turn = {"role": "assistant", "content": completion} if isinstance(completion, str) else dict(completion)
    end = end_of_answer(renderer, prompt)
    ends = _texts(renderer, [end, renderer.tokenizer.eos_token_id])
    turn["content"] = _without_end(text_of(turn), ends)
    if isinstance(prompt, str):
        _check_has_text_only(turn)
        return ended_ids(renderer, turn["content"], end)
    _check_thinking(renderer, turn)
    written = _written(renderer, prompt, turn)
    if written is None:
        return ended_ids(renderer, _behind_open_thinking(renderer, turn["content"]), end)
    ids = _ids_of_turn(renderer, prompt, turn, written)
    if end is None or end not in ids:  # turns in plain words: behind the text comes the tokenizer's end
        return ended_ids(renderer, written.rstrip(), end)
    return ids[: len(ids) - ids[::-1].index(end)]


def end_of_answer(renderer: PromptRenderer, prompt: Prompt) -> int | None:
    """Return the token that ends an answer: that of the chat's turns, else the tokenizer's; None where it has none.

    A text prompt is a chat where it ends as this chat template opens or ends a turn; behind others the student samples
    until the tokenizer's end.
    """
    is_chat = not isinstance(prompt, str) or own_markup(prompt, renderer)
    end = renderer.end_of_turn if is_chat else None
    return renderer.tokenizer.eos_token_id if end is None else end


def ended_ids(renderer: PromptRenderer, text: str, end: int | None) -> list[int]:
    """Return the ids of a text as it is, and of the token that ends it."""
    return [*renderer.tokenizer(text=text, add_special_tokens=False)["input_ids"], *([] if end is None else [end])]


def _texts(renderer: PromptRenderer, ids: Sequence[int | None]) -> list[str]:
    return [str(renderer.tokenizer.convert_ids_to_tokens(token)) for token in dict.fromkeys(ids) if token is not None]


def _without_end(text: str, ends: Sequence[str]) -> str:
    """Return a completion's text without the tokens that end it.

    Raises:
        DataError: nothing else is there, or text stands behind one.
    """
    before = text
    while end := next((end for end in ends if before.rstrip().endswith(end)), None):
        before = before.rstrip().removesuffix(end)
    if is_empty(before):
        raise DataError("the completion has no text to train on. Fill the row, or drop it.")
    for end in ends:
        if end in before:
            raise DataError(
                f"the completion goes on behind {end!r}, which ends it: {before!r:.200}. The student never samples "
                "what stands behind the end. Give the completion alone, and earlier turns as messages of `prompt`."
            )
    return before


def _structure(turn: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return what a turn has beside its text: {key: texts that the chat template must write}."""
    parts = {key: [str(turn[key])] for key in REASONING if not is_empty(turn.get(key))}
    calls = [call.get("function", call).get("name", "") for call in turn.get("tool_calls") or ()]
    return {**parts, "tool_calls": calls} if calls else parts


def _check_has_text_only(turn: Mapping[str, Any]) -> None:
    for key in _structure(turn):
        raise DataError(
            f"the completion has {key!r}, which a chat template writes, and this row's prompt is plain text. It would "
            "be left out. Give the prompt as messages, or write all of the completion as text."
        )


def _check_thinking(renderer: PromptRenderer, turn: Mapping[str, Any]) -> None:
    """Refuse a completion that thinks behind a prompt whose thinking block is closed."""
    thinks = THINK_END in turn["content"] or any(key in REASONING for key in _structure(turn))
    if thinks and THINK_END in renderer.opening:
        raise DataError(
            f"the completion has thinking, and the prompt has closed its thinking block: {renderer.opening!r}. The "
            "student would learn to think behind an empty thought.\nSwitch thinking on for the student "
            "(chat_template_kwargs: {enable_thinking: true}), or take the thinking out of the completions."
        )


def _behind_open_thinking(renderer: PromptRenderer, text: str) -> str:
    """Return the text as it stands behind the prompt, where the chat template cannot write it there.

    Raises:
        DataError: the prompt opens a thinking block that the text does not close.
    """
    if renderer.opening.rfind(THINK) <= renderer.opening.rfind(THINK_END):
        return text
    if THINK_END not in text:
        raise DataError(
            f"the prompt opens a thinking block, {renderer.opening!r}, and the completion does not close it: "
            f"{text!r:.80}. All of it would be trained as a thought.\nBegin the completions with thinking and "
            f"{THINK_END} (with {THINK_END} alone for none), or switch thinking off for the student "
            "(chat_template_kwargs: {enable_thinking: false})."
        )
    return text.lstrip().removeprefix(THINK).lstrip("\n")


def _written(renderer: PromptRenderer, prompt: Turns, turn: dict[str, Any]) -> str | None:
    """Return the turn as the chat template writes it behind the prompt; None where it writes a text otherwise.

    Raises:
        DataError: it refuses the turn, or leaves out reasoning or tool calls.
    """
    try:
        before, whole = renderer.text(prompt), renderer.text([*prompt, turn], add_generation_prompt=False)
    except jinja2.TemplateError as error:
        raise DataError(f"the chat template refuses the completion as an assistant's turn: {error}.") from error
    written = whole.removeprefix(before) if whole.startswith(before) else ""
    for key, texts in _structure(turn).items():
        if not all(_plain(text) in _plain(written) for text in texts):
            raise DataError(
                f"the completion has {key!r}, and the chat template does not write it behind the prompt. It would be "
                "left out of training.\nUse a chat template that writes it, write it into `content` as the model does "
                f"({THINK} … {THINK_END}), or drop the key."
            )
    # Some templates cut the thinking out of a turn's text, and some put an empty thought before it.
    own_thoughts = turn["content"].count(THINK_END)
    has_another = 0 < own_thoughts < written.count(THINK_END)
    return None if has_another or _plain(turn["content"]) not in _plain(written) else written


def _ids_of_turn(renderer: PromptRenderer, prompt: Turns, turn: dict[str, Any], written: str) -> list[int]:
    """Return the ids of a turn, as they stand behind the prompt's where the two do not merge."""
    prompt_ids, ids = renderer.ids(prompt), renderer.ids([*prompt, turn], add_generation_prompt=False)
    if ids[: len(prompt_ids)] == prompt_ids:
        return ids[len(prompt_ids) :]
    return renderer.tokenizer(text=written, add_special_tokens=False)["input_ids"]


def _plain(text: str) -> str:
    """Return a text without blank space, which chat templates change at will."""
    return "".join(text.split())
