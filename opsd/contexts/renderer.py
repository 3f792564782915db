"""The one place that turns messages or text into prompt ids, for student and teacher alike.

Knows tokenizers and chat templates; nothing of contexts, rows or models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jinja2

from opsd.contexts.messages import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
