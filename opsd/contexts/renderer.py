"""Turns messages or text into prompt ids, for student and teacher alike.

Knows tokenizers and chat templates; nothing of contexts, rows or models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jinja2

from opsd.contexts.messages import Prompt
from opsd.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINK, THINK_END = "<think>", "</think>"  # around the thinking of Qwen, DeepSeek and most other models


@dataclasses.dataclass(frozen=True)
class PromptRenderer:
    """Renders prompts with one tokenizer, chat template and set of keywords.

    Without a prefill the ids are those of TRL's `DistillationTrainer._tokenize_prompts`.

    Args:
        tokenizer: the tokenizer.
        chat_template: a Jinja chat template; None takes the tokenizer's.
        chat_template_kwargs: keywords for the chat template, such as enable_thinking.
        tools: functions that the chat template describes to the model.

    Example::

        renderer = PromptRenderer(tokenizer, chat_template_kwargs={"enable_thinking": True})
        prompt_ids = renderer.ids([{"role": "user", "content": "What is 12 + 7?"}])
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tools: list[Any] | None = None

    def ids(self, prompt: Prompt, prefill: str = "", *, add_generation_prompt: bool = True) -> list[int]:
        """Return the ids of a prompt up to the assistant's turn, and of the prefill that begins this turn.

        Args:
            prompt: text or messages.
            prefill: text behind the assistant's header.
            add_generation_prompt: whether messages are followed by the assistant's header.

        Raises:
            ConfigError: messages, and no chat template that could write them.
        """
        if isinstance(prompt, str):
            return self.tokenizer(text=prompt + prefill)["input_ids"]
        if self.chat_template is None and self.tokenizer.chat_template is None:
            raise ConfigError(
                "prompts are messages, and the tokenizer has no chat template to write them, as those of base models. "
                "Give prompts as text, as the model has seen questions; or set tokenizer.chat_template."
            )
        form = {"add_generation_prompt": add_generation_prompt}
        if not prefill:
            return self._apply(prompt, tokenize=True, return_dict=True, **form)["input_ids"]
        text = self._apply(prompt, tokenize=False, **form) + prefill
        # The chat template has already written the special tokens.
        return self.tokenizer(text=text, add_special_tokens=False)["input_ids"]

    def text(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """Return messages as the chat template writes them, with the assistant's header unless it is left out."""
        return self._apply(messages, tokenize=False, add_generation_prompt=add_generation_prompt)

    def transcript(self, messages: list[dict[str, Any]]) -> str:
        """Return messages as text by the chat template, without tools, first token and the assistant's header.

        Raises:
            ValueError: there is no chat template, or it refuses these messages.
        """
        if self.chat_template is None and self.tokenizer.chat_template is None:
            raise ValueError("this field holds messages, and the tokenizer has no chat template to write them")
        plain = dataclasses.replace(self, tools=None)
        try:
            text = plain._apply(messages, tokenize=False, add_generation_prompt=False)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses these messages ({error})") from error
        return text.removeprefix(plain._first_token)

    @property
    def _first_token(self) -> str:
        """The text of the token that begins a chat, where no turn begins with it; else ""."""
        begin = self.tokenizer.bos_token or ""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        try:
            text = self._apply(turns, tokenize=False, add_generation_prompt=False)
        except jinja2.TemplateError:
            return ""
        return begin if begin and text.startswith(begin) and text.count(begin) == 1 else ""

    def open_thinking(self, prefill: str) -> str:
        """Return a prefill behind an open thinking block, which is written where none is open.

        Raises:
            ConfigError: the chat template has already closed a thinking block.
        """
        header = self.opening + prefill
        if header.rfind(THINK) > header.rfind(THINK_END):
            return prefill
        if THINK_END in header:
            raise ConfigError(
                f"bridge_thinking opens the teacher's thinking block, and its chat template has closed one: {header!r}."
                "\nSwitch thinking on for the teacher: chat_template_kwargs={'enable_thinking': True}."
            )
        return f"{THINK}\n{prefill}"

    @cached_property
    def opening(self) -> str:
        """The assistant's header as the chat template writes it behind a user turn; "" without a chat template."""
        turns = [{"role": "user", "content": "?"}]
        try:
            open_text, closed_text = (
                self._apply(turns, tokenize=False, add_generation_prompt=is_open) for is_open in (True, False)
            )
        except (ValueError, jinja2.TemplateError):  # no chat template, or one that wants other turns
            return ""
        if not open_text.startswith(closed_text):  # some write an end of text where nothing follows (Phi-3)
            closed_text = closed_text.removesuffix(self.tokenizer.eos_token or "")
        return open_text.removeprefix(closed_text) if open_text.startswith(closed_text) else ""

    @cached_property
    def end_of_turn(self) -> int | None:
        """The token that the chat template writes after an assistant's text; None where it ends a turn in plain words.

        Any added token counts: not all tokenizers list the ends of turns among their special tokens (Gemma, Phi).
        """
        word = "opsd"
        try:
            tail = self.transcript([{"role": "user", "content": "?"}, {"role": "assistant", "content": word}])
        except (ValueError, TypeError, jinja2.TemplateError):
            return None
        ids = self.tokenizer(text=tail.rpartition(word)[2], add_special_tokens=False)["input_ids"]
        added = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        return next((token for token in ids if token in added), None)

    def _apply(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True, **form: bool) -> Any:
        return self.tokenizer.apply_chat_template(
            messages,
            tools=self.tools or None,  # some templates write a heading for an empty list
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            **form,
            **self.chat_template_kwargs,
        )
