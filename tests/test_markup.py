"""Prompts that are written as a chat already: a context has no place in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows, make_tokenizer
from datasets import Dataset
from gallery_parts import as_chat
from helpers import make_trainer

from opsd import PrivilegedContext, SameCheckpointTeacher
from opsd.contexts.markup import chat_markup
from opsd.contexts.renderer import PromptRenderer
from opsd.errors import DataError

CHATS = {
    "ChatML": as_chat("1 + 1?"),
    "ChatML without a header": as_chat("1 + 1?", header=""),
    "Llama 3": (
        "<|start_header_id|>user<|end_header_id|>\n\n1 + 1?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "Llama 2": "<s>[INST] 1 + 1? [/INST]",
    "Gemma": "<bos><start_of_turn>user\n1 + 1?<end_of_turn>\n<start_of_turn>model\n",
    "Phi": "<|user|>\n1 + 1?<|end|>\n<|assistant|>\n",
    "DeepSeek": "<｜User｜>1 + 1?<｜Assistant｜><think>\n",
    "gpt-oss": "<|start|>user<|message|>1 + 1?<|end|><|start|>assistant",
    "Granite": "<|start_of_role|>user<|end_of_role|>1 + 1?<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
    "Command": "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>1 + 1?<|END_OF_TURN_TOKEN|>",
    "Alpaca": "### Instruction:\n1 + 1?\n\n### Response:\n",
    "plain words": "User: 1 + 1?\n\nAssistant:",
    "Vicuna": "A chat. USER: 1 + 1? ASSISTANT:",
}
TEXTS = (
    "1 + 1 = ",
    "Question: 1 + 1?\nAnswer:",
    "<|im_start|>1 + 1?",  # a first token
    "Write an Assistant: class with __init__.",
    "What does the token <pad> mean?",
    "a[INSTANCE] <b>1</b> |user| x",
    "What does the [INST] marker do in Llama 2 prompts?",
    "Explain <|im_end|> to me.",
    "Which tag closes a system prompt: is it <</SYS>>?",
)
OWN = "{% for m in messages %}{{ '(' + m['role'] + ') ' + m['content'] + '<|pad|>' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ '(me) ' }}{% endif %}"
)
REPLACING = "{% block user %}{{ teacher_prompt }}{% endblock %}"


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
def test_no_text_is_added_to_a_chat(chat: str) -> None:
    """It landed behind the assistant's header, and the doctor called that a pass."""
    assert chat_markup(chat)
    context = PrivilegedContext("answer_only")
    row = {"prompt": chat, "answer": "2"}
    for view in (None, PromptRenderer(make_tokenizer())):
        with pytest.raises(
            DataError, match=r'(?s)already written as a chat.*behind.*"role": "user".*leave the context'
        ):
            context.messages(row, renderer=view)


@pytest.mark.parametrize("text", TEXTS)
def test_plain_text_gets_its_context(text: str) -> None:
    assert chat_markup(text, PromptRenderer(make_tokenizer())) is None
    assert text.strip() in PrivilegedContext("answer_only").messages({"prompt": text, "answer": "2"})[0]


def test_markers_of_a_template_of_ones_own_are_known() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = OWN
    view = PromptRenderer(tokenizer)
    assert chat_markup("(user) 1 + 1?<|pad|>(me) ", view) == "(me)"
    assert chat_markup("(user) 1 + 1?<|pad|>", view) == "<|pad|>"
    assert chat_markup("(me) and 1 + 1?", view) is None


def test_a_turn_that_ends_with_a_header_is_a_chat_and_one_that_asks_about_markers_is_not() -> None:
    context = PrivilegedContext("answer_only")
    for chat in (CHATS["ChatML"], CHATS["Llama 3"], CHATS["Llama 2"]):
        with pytest.raises(DataError, match="already written as a chat"):
            context.messages({"prompt": [{"role": "user", "content": chat}], "answer": "2"})
    for asked in ("What does <|im_start|>assistant do in a chat template?", "Which ends a turn: is it <|im_end|>"):
        assert context.messages({"prompt": [{"role": "user", "content": asked}], "answer": "2"})


def test_a_teacher_prompt_in_place_of_a_chat_is_no_addition() -> None:
    context = PrivilegedContext.from_string(REPLACING)
    own = as_chat("1 + 1? It is 2.")
    assert context.messages({"prompt": as_chat("1 + 1?"), "teacher_prompt": own})[0] == own.strip()


def test_a_run_refuses_such_rows_by_number_and_trains_on_them_without_a_context(tmp_path: Path) -> None:
    rows: Any = [{**row, "prompt": as_chat(row["prompt"][0]["content"])} for row in make_rows(4)]  # type: ignore[index]
    rows[0]["prompt"] = "What is 1 + 1?"
    with pytest.raises(DataError, match="row 1: template 'answer_only' adds text"):
        make_trainer(tmp_path, SameCheckpointTeacher(context="answer_only"), rows=Dataset.from_list(rows))
    trainer = make_trainer(tmp_path, SameCheckpointTeacher(), rows=Dataset.from_list(rows))
    assert trainer.student.renderer.ids(rows[1]["prompt"])
