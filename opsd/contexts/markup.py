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
# Markers behind which the assistant's answer begins.
OPENINGS = (
    r"<\|im_start\|>assistant", r"<\|start_header_id\|>assistant<\|end_header_id\|>", r"<\|assistant\|>",
    r"<\|header_start\|>assistant<\|header_end\|>", r"\[/INST\]", r"<start_of_turn>model", r"<｜Assistant｜>",
    r"<\|start\|>assistant", r"<\|start_of_role\|>assistant<\|end_of_role\|>", r"<\|CHATBOT_TOKEN\|>",
)  # fmt: skip
_MARKER = re.compile("|".join(MARKERS.values()))
_FIRST_MARKER = re.compile(rf"\s*(?:<s>|<bos>|<\|begin_of_text\|>|<｜begin▁of▁sentence｜>)?\s*({_MARKER.pattern})")
_LAST_OPENING = re.compile(rf"(?:{'|'.join(OPENINGS)})\s*(?:{THINK})?\s*\Z")
# Headers in plain words count where a text ends with them: the answer would begin there.
_LAST_HEADER = re.compile(r"^(?:#+ ?)?(?:Assistant|Response):\s*\Z|\bASSISTANT:\s*\Z", re.MULTILINE)


def chat_markup(prompt: str, renderer: PromptRenderer | None = None) -> str | None:
    r"""Return a marker of a text prompt that is written as a chat, or None.

    It is one where it begins with a marker of a turn, ends where the assistant's answer begins, or has two different
    markers. A text that mentions one marker is none.

    Args:
        prompt: the text.
        renderer: knows the markers of its own chat template; without one those of the table are looked for.

    Example:
        >>> chat_markup("<|im_start|>user\nWhat is 12 + 7?<|im_end|>\n<|im_start|>assistant\n")
        '<|im_start|>user'
        >>> chat_markup("What does [INST] mean?")
    """
    first = _FIRST_MARKER.match(prompt)
    if first:
        return first[1]
    markers = [match[0] for match in _MARKER.finditer(prompt)]
    if len(set(markers)) > 1:
        return markers[0]
    last = _LAST_OPENING.search(prompt) or _LAST_HEADER.search(prompt)
    return last[0].strip() if last else own_markup(prompt, renderer)


def own_markup(prompt: str, renderer: PromptRenderer | None) -> str | None:
    """Return the header or the end of turn of a renderer's own chat template with which a text prompt ends, or None."""
    if renderer is None:
        return None
    header = renderer.opening.partition(THINK)[0].strip()
    end = renderer.end_of_turn
    markers = [header, "" if end is None else str(renderer.tokenizer.convert_ids_to_tokens(end))]
    return next((marker for marker in markers if marker and prompt.rstrip().endswith(marker)), None)


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
    last = _LAST_OPENING.search(prompt)
    marker = (last and last[0].strip()) if is_turn else chat_markup(prompt, renderer)
    if marker:
        raise DataError(
            f"template {name!r} adds text to a prompt that is already written as a chat: it has {marker!r}.\nThe text "
            "would stand outside the user's turn: behind the assistant's header, as the beginning of the answer.\n"
            'Give the prompt as messages, which the chat template writes: [{"role": "user", "content": "…"}]; or leave '
            "the context out."
        )
