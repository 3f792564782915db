"""The one place that turns messages or text into prompt ids, for student and teacher alike.

Knows tokenizers and chat templates; nothing of contexts, rows or models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = list[dict[str, Any]] | str


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

    def _apply(self, messages: list[dict[str, Any]], **form: bool) -> Any:
        return self.tokenizer.apply_chat_template(
            messages,
            tools=self.tools or None,  # some templates write a heading for an empty list
            chat_template=self.chat_template,
            add_generation_prompt=True,
            **form,
            **self.chat_template_kwargs,
        )
