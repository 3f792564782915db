"""Worked examples in the teacher's prompt: turns that the student does not see."""

from __future__ import annotations

from typing import Any

import pytest

from opsd import PrivilegedContext
from opsd.contexts.renderer import PromptRenderer
from opsd.errors import ConfigError, DataError
from tests.conftest import make_tokenizer

EXAMPLES = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "Ahoy! It is 2."}]
RULE = {"rule": "Begin with Ahoy!"}
QUESTION = {"role": "user", "content": "2 + 3?"}


def roles_and_texts(context: PrivilegedContext, prompt: Any) -> list[tuple[str, str]]:
    messages, _ = context.messages({"prompt": prompt})
    return [(turn["role"], turn["content"]) for turn in messages]  # type: ignore[index]


def test_examples_stand_behind_the_system_turn_and_before_the_conversation() -> None:
    context = PrivilegedContext("system_rule", values=RULE, examples=EXAMPLES)
    earlier = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    turns = roles_and_texts(context, [*earlier, QUESTION])
    assert [role for role, _ in turns] == ["system", *["user", "assistant"] * 2, "user"]
    assert turns[1:3] == [("user", "1 + 1?"), ("assistant", "Ahoy! It is 2.")]
    assert turns[-1] == ("user", "2 + 3?")


def test_examples_alone_are_a_context() -> None:
    context = PrivilegedContext("base", examples=EXAMPLES)
    assert roles_and_texts(context, [QUESTION]) == [
        ("user", "1 + 1?"), ("assistant", "Ahoy! It is 2."), ("user", "2 + 3?"),
    ]  # fmt: skip
    ids = context.render({"prompt": [QUESTION]}, renderer=PromptRenderer(make_tokenizer()))
    assert "Ahoy! It is 2." in make_tokenizer().decode(ids)


def test_examples_are_part_of_what_a_context_is() -> None:
    """A resumed run must not go on with other examples."""
    one, other = (PrivilegedContext("base", examples=EXAMPLES[:2] * count) for count in (1, 2))
    assert one.description != other.description


@pytest.mark.parametrize(
    "examples",
    [
        EXAMPLES[:1],
        EXAMPLES[::-1],
        ["1 + 1?", "2"],
        [{"role": "user", "content": ""}, EXAMPLES[1]],
        "examples.jsonl",
        3,
    ],
    ids=["no answer", "answer first", "texts", "empty", "a file", "a number"],
)
def test_examples_without_an_answer_each_are_refused(examples: Any) -> None:
    with pytest.raises(ConfigError, match="each a user turn and then the assistant's answer"):
        PrivilegedContext("base", examples=examples)


def test_examples_of_a_text_prompt_are_refused() -> None:
    context = PrivilegedContext("answer_only", examples=EXAMPLES)
    with pytest.raises(DataError, match="plain text, which has no turns"):
        context.messages({"prompt": "2 + 3?", "answer": "5"})
