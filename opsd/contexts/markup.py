"""Finds turns of a chat that are written into a text already: markers of the well-known formats and of one's own.

Knows texts and chat templates; nothing of rows, models or training.
"""

from __future__ import annotations

import re

from opsd.contexts.renderer import THINK, PromptRenderer
from opsd.errors import DataError

ROLES = "system|developer|user|assistant|model|tool"
# Markers that begin or end a turn, by the family that writes them.
MARKERS = {
    "ChatML, Qwen": rf"<\|im_start\|>(?:{ROLES})|<\|im_end\|>",
    "Llama 3 and 4": r"<\|start_header_id\|>|<\|eot_id\|>|<\|header_start\|>|<\|eot\|>",
    "Llama 2, Mistral": r"\[/?INST\]|<</?SYS>>",
    "Gemma": rf"<start_of_turn>(?:{ROLES})|<end_of_turn>",
    "Phi, Zephyr, GLM": rf"<\|(?:{ROLES})\|>",
    "DeepSeek": r"<｜(?:User|Assistant)｜>",
    "gpt-oss": rf"<\|start\|>(?:{ROLES})",
    "Granite": r"<\|start_of_role\|>",
    "Command": r"<\|(?:START|END)_OF_TURN_TOKEN\|>",
}
_MARKER = re.compile("|".join(MARKERS.values()))
_LAST_MARKER = re.compile(rf"(?:{_MARKER.pattern})\w*(?:<\|[a-z_]+\|>)?\s*\Z")
# Headers in plain words count where a text ends with them: the answer would begin there.
_LAST_HEADER = re.compile(r"^(?:#+ ?)?(?:Assistant|Response):\s*\Z", re.MULTILINE)


def chat_markup(prompt: str, renderer: PromptRenderer | None = None) -> str | None:
    r"""Return the first marker of a chat's turns in a text prompt, or None.

    Args:
        prompt: the text.
        renderer: knows the markers of its own chat template; without one those of the table are looked for.

    Example:
        >>> chat_markup("<|im_start|>user\nWhat is 12 + 7?<|im_end|>\n<|im_start|>assistant\n")
        '<|im_start|>user'
        >>> chat_markup("What is 12 + 7?")
    """
    match = _MARKER.search(prompt) or _LAST_HEADER.search(prompt)
    if match or renderer is None:
        return match[0].strip() if match else None
    header = renderer.opening.partition(THINK)[0].strip()
    if header and prompt.rstrip().endswith(header):
        return header
    end = renderer.end_of_turn
    marker = "" if end is None else str(renderer.tokenizer.convert_ids_to_tokens(end))
    return marker if marker and marker in prompt else None


def check_not_a_chat(prompt: str, placed: str, name: str, renderer: PromptRenderer | None, *, is_turn: bool) -> None:
    """Refuse to add text to a prompt that is already written as a chat.

    Args:
        prompt: the text of a prompt, or of the turn that a template changes.
        placed: the same with the template's text.
        name: the template's.
        renderer: the teacher's, or None.
        is_turn: whether it is a turn of messages, which may ask about markers, and must not end with one.

    Raises:
        DataError: the prompt is written as a chat, and the text was put around it.
    """
    if placed.strip() == prompt.strip() or prompt.strip() not in placed:
        return
    last = _LAST_MARKER.search(prompt)
    marker = (last and last[0].strip()) if is_turn else chat_markup(prompt, renderer)
    if marker:
        raise DataError(
            f"template {name!r} adds text to a prompt that is already written as a chat: it has {marker!r}.\nThe text "
            "would stand outside the user's turn: behind the assistant's header, as the beginning of the answer.\n"
            'Give the prompt as messages, which the chat template writes: [{"role": "user", "content": "…"}]; or leave '
            "the context out."
        )
