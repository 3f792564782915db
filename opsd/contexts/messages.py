"""Reads a prompt as chat turns, puts a template's blocks into them, and gives conversations in fields their text.

Knows messages; nothing of tokenizers, templates or rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from opsd.data.values import text_of
from opsd.errors import ConfigError, DataError

Prompt: TypeAlias = list[dict[str, Any]] | str
Turns: TypeAlias = list[dict[str, Any]]


def turns_of(prompt: Any) -> Turns:
    """Return a prompt as chat turns, one user turn where it is plain text; the turns are copies.

    Raises:
        DataError: the prompt is neither text nor a list of text messages.

    Example:
        >>> turns_of("What is 12 + 7?")
        [{'role': 'user', 'content': 'What is 12 + 7?'}]
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not all(isinstance(turn, Mapping) and "role" in turn for turn in prompt):
        raise DataError(
            f"a prompt is text, or a list of messages with role and content; this row's is {prompt!r:.80}.\n"
            "The student has nothing to answer without it.\nFill the column 'prompt', or drop the row."
        )
    for turn in prompt:
        text_of(turn)  # raises where a turn holds anything but text
    return [dict(turn) for turn in prompt]


def block_positions(turns: Turns) -> dict[str, int]:
    """Return the position of the turn of each block: the last user turn and, if there is one, the first system turn.

    Raises:
        DataError: there is no user turn.
    """
    users = [position for position, turn in enumerate(turns) if turn["role"] == "user"]
    systems = [position for position, turn in enumerate(turns) if turn["role"] == "system"]
    if not users:
        raise DataError(
            f"a prompt needs a user turn; this row has: {', '.join(turn['role'] for turn in turns) or 'no turns'}.\n"
            "A template changes the last user turn.\nAdd one, or drop the row."
        )
    return {"user": users[-1], "system": systems[0]} if systems else {"user": users[-1]}


def with_blocks(turns: Turns, blocks: Mapping[str, str], examples: Turns = ()) -> Turns:  # type: ignore[assignment]
    """Return the turns with the text of the blocks `user` and `system` in their turns; a system turn may be added.

    Examples stand behind the system turn.

    Example:
        >>> with_blocks([{"role": "user", "content": "Hi"}], {"system": "Be kind.", "user": " "})
        [{'role': 'system', 'content': 'Be kind.'}, {'role': 'user', 'content': 'Hi'}]
    """
    positions = block_positions(turns)
    turns = [dict(turn) for turn in turns]
    for block, position in positions.items():
        turn = turns[position]
        turn["content"] = changed_text(turn.get("content"), text_of(turn), blocks[block])
    if "system" not in positions and blocks["system"].strip():
        turns.insert(0, {"role": "system", "content": blocks["system"].strip()})
    behind_system = 1 if turns[0]["role"] == "system" else 0
    return [*turns[:behind_system], *map(dict, examples), *turns[behind_system:]]


def read_examples(examples: Any) -> Turns:
    """Return the messages of worked examples, as they stand in a prompt.

    Raises:
        ConfigError: they are no user turns with an answer each.

    Example:
        >>> read_examples([{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}])
        [{'role': 'user', 'content': '1 + 1?'}, {'role': 'assistant', 'content': '2'}]
    """
    turns = list(examples) if isinstance(examples, Sequence) and not isinstance(examples, str) else [examples]
    roles = [turn.get("role") if isinstance(turn, Mapping) else None for turn in turns]
    is_text = all(isinstance(turn, Mapping) and str(turn.get("content") or "").strip() for turn in turns)
    if not is_text or len(turns) % 2 or roles != ["user", "assistant"] * (len(turns) // 2):
        raise ConfigError(
            "examples are messages, each a user turn and then the assistant's answer to it, and these are "
            f"{examples!r:.80}. A turn that is missing would be answered by the student's question. Write "
            "[{role: user, content: …}, {role: assistant, content: …}]."
        )
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def changed_text(content: Any, text: str, block: str) -> Any:
    """Return a block's text for a turn's content; the content itself where the block is blank or repeats its text."""
    return content if block.strip() in ("", text.strip()) else block.strip()


class Conversation(list[dict[str, Any]]):
    """Messages in a field: a template may loop over them, or print them all at once as `text`.

    Args:
        turns: the messages.
        text: what the template prints; None where nothing can write them.
        problem: why not, as the beginning of an error.

    Example:
        >>> talk = Conversation([{"role": "user", "content": "Hi"}], "USER: Hi")
        >>> talk[0]["content"], talk.text
        ('Hi', 'USER: Hi')
    """

    def __init__(self, turns: Turns = (), text: str | None = None, problem: str = "") -> None:  # type: ignore[assignment]
        super().__init__(turns)
        self.text = text
        self.problem = problem


def is_conversation(value: Any) -> bool:
    """Return whether a value is a list of messages."""
    return isinstance(value, list) and len(value) > 0 and all(map(_is_message, value))


def with_conversations(value: Any, write: Callable[[Turns], str]) -> Any:
    """Return a value in which every list of messages, also within lists and mappings, is a `Conversation`.

    Args:
        value: a field's value.
        write: returns the text of a conversation, or raises ValueError with the reason why it cannot.
    """
    if is_conversation(value):
        turns = [dict(turn) for turn in value]
        try:
            return Conversation(turns, write(turns))
        except ValueError as error:
            return Conversation(turns, None, str(error))
    if isinstance(value, list):
        return [with_conversations(item, write) for item in value]
    if isinstance(value, Mapping):
        return {key: with_conversations(item, write) for key, item in value.items()}
    return value


def plain_text(turns: Turns) -> str:
    """Return a conversation as text without a chat template: for checks where no tokenizer is known."""
    return "\n\n".join(f"[{turn['role']}]\n{turn.get('content') or ''}" for turn in turns)


def _is_message(turn: Any) -> bool:
    return isinstance(turn, Mapping) and "role" in turn and ("content" in turn or "tool_calls" in turn)
