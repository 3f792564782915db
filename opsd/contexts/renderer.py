"""The one place that turns messages or text into prompt ids, for student and teacher alike.

Knows tokenizers and chat templates; nothing of contexts, rows or models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jinja2

from opsd.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = list[dict[str, Any]] | str
THINK = "<think>"  # as Qwen, DeepSeek and most others open what is thought before the answer


@dataclasses.dataclass(frozen=True)
class PromptRenderer:
    """Renders one side's prompts with its own keywords.

    Without a prefill the ids are those of TRL's `DistillationTrainer._tokenize_prompts`.
    """

    tokenizer: PreTrainedTokenizerBase
    # None: the tokenizer's own
    chat_template: str | None = None
    # what the chat template understands, such as enable_thinking
    chat_template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tools: list[Any] | None = None

    def ids(self, prompt: Prompt, prefill: str = "") -> list[int]:
        """Return the ids of a prompt, up to where the assistant begins to speak (after the prefill, if any)."""
        if isinstance(prompt, str):
            return self.tokenizer(text=prompt + prefill)["input_ids"]
        if not prefill:
            return self._apply(prompt, tokenize=True, return_dict=True)["input_ids"]
        text = self._apply(prompt, tokenize=False) + prefill
        # The chat template has written the special tokens already.
        return self.tokenizer(text=text, add_special_tokens=False)["input_ids"]

    def transcript(self, messages: list[dict[str, Any]]) -> str:
        """Return messages as the chat template writes them inside a prompt: no tools, no first token, no opening."""
        plain = dataclasses.replace(self, tools=None)
        text = plain._apply(messages, tokenize=False, add_generation_prompt=False)
        return text.removeprefix(plain._first_token)

    @property
    def _first_token(self) -> str:
        """The text that a chat begins with before its first turn, if it is one token that turns do not begin with."""
        begin = self.tokenizer.bos_token or ""
        talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        try:
            text = self._apply(talk, tokenize=False, add_generation_prompt=False)
        except jinja2.TemplateError:
            return ""
        return begin if begin and text.startswith(begin) and text.count(begin) == 1 else ""

    @property
    def opening(self) -> str:
        """What the chat template writes where the assistant is to speak, behind a user turn; "" without a template."""
        turns = [{"role": "user", "content": "?"}]
        try:
            begun, ended = (
                self._apply(turns, tokenize=False, add_generation_prompt=begins) for begins in (True, False)
            )
        except (ValueError, jinja2.TemplateError):  # no chat template, or one that wants other turns
            return ""
        if not begun.startswith(ended):  # some write an end of text where nothing is to be generated (Phi-3)
            ended = ended.removesuffix(self.tokenizer.eos_token or "")
        return begun.removeprefix(ended) if begun.startswith(ended) else ""

    def _apply(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True, **form: bool) -> Any:
        return self.tokenizer.apply_chat_template(
            messages,
            tools=self.tools or None,  # some templates write a heading for an empty list
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            **form,
            **self.chat_template_kwargs,
        )


def turns_of(prompt: Any) -> list[dict[str, Any]]:
    """Return a row's prompt as turns of text; the turns are copies, which the caller may change.

    Raises:
        DataError: it is no prompt.
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not all(isinstance(turn, Mapping) and "role" in turn for turn in prompt):
        raise DataError(
            f"a prompt is text, or a list of messages with role and content; this row's is {prompt!r:.80}.\n"
            "Without it there is nothing to answer. Fill the column 'prompt', or drop the row."
        )
    turns = [dict(turn) for turn in prompt]
    for turn in turns:
        text_of(turn)
    return turns


def text_of(turn: Mapping[str, Any]) -> str:
    """Return a turn's text.

    Raises:
        DataError: it holds something else.
    """
    content = turn.get("content")
    if content is None:  # an assistant turn that only calls a tool
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        return "".join(part["text"] for part in content)
    raise DataError(
        f"a message's content is text, or a list of text parts; this one is {content!r:.80}.\n"
        "opsd trains on text only so far. Drop rows with images, audio or video."
    )


def positions_of(turns: list[dict[str, Any]]) -> dict[str, int]:
    """Return where the last user turn stands and, if there is one, the first system turn.

    Raises:
        DataError: nobody asks anything.
    """
    users = [index for index, turn in enumerate(turns) if turn["role"] == "user"]
    systems = [index for index, turn in enumerate(turns) if turn["role"] == "system"]
    if not users:
        raise DataError(
            f"a prompt needs a user turn; this row has: {', '.join(turn['role'] for turn in turns) or 'no turns'}.\n"
            "A template speaks in the last user turn. Add one, or drop the row."
        )
    return {"user": users[-1], "system": systems[0]} if systems else {"user": users[-1]}


def retold(content: Any, own: str, told: str) -> Any:
    """Return what a block says in place of a turn's content, untouched where it says nothing new."""
    return content if told.strip() in ("", own.strip()) else told.strip()
