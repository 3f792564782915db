"""Rollouts of several turns: a tiny model that has learned to call a tool, through TRL's own tool loop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import make_llama, make_tokenizer
from datasets import Dataset
from helpers import make_args
from trl.chat_template_utils import qwen3_chat_template, qwen3_training_chat_template

from opsd import OPSDTrainer, SameCheckpointTeacher
from opsd.errors import OPSDWarning
from opsd.rollouts import Rollouts
from opsd.training.metrics import find_metric

QUESTION = "What is 3 + 4?"
ROWS = [{"prompt": [{"role": "user", "content": QUESTION}], "answer": "7"}] * 4


def add(a: int, b: int) -> str:
    """Add two numbers.

    Args:
        a: the first.
        b: the second.
    """
    return f"sum={a + b}"


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 3, "b": 4}}}
TALK = [
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "add", "content": "sum=7"},
    {"role": "assistant", "content": "It is 7."},
]


@pytest.fixture(scope="module")
def caller() -> tuple[torch.nn.Module, Any]:
    """A model that knows one conversation by heart, with a tool call in it, and its tokenizer."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = qwen3_chat_template
    # TRL trains with its own form of this template, which keeps every prefix a prefix.
    form = {"tools": [add], "chat_template": qwen3_training_chat_template, "return_dict": True}
    ids = tokenizer.apply_chat_template(TALK, **form)["input_ids"]
    model = make_llama(hidden_size=64, intermediate_size=128, max_position_embeddings=2048, initializer_range=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    start = len(tokenizer.apply_chat_template(TALK[:1], add_generation_prompt=True, **form)["input_ids"])
    inputs = torch.tensor([ids])
    labels = inputs.clone()
    labels[:, :start] = -100
    for _ in range(150):
        loss = model(inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02
    return model, tokenizer


@pytest.fixture(scope="module")
def rollouts(caller, tmp_path_factory: pytest.TempPathFactory) -> tuple[OPSDTrainer, Rollouts]:
    model, tokenizer = caller
    folder = tmp_path_factory.mktemp("tools")
    with pytest.warns(OPSDWarning, match="top_k 1"):  # greedy: the conversation as the model knows it
        args = make_args(folder, max_steps=1, max_completion_length=300, top_k=1, learning_rate=1e-6)
    trainer = OPSDTrainer(
        model,
        SameCheckpointTeacher(context="answer_only"),
        args=args,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
        tools=[add],
    )
    trainer.train()
    assert trainer._buffered_inputs is not None
    return trainer, trainer._buffered_inputs[0]


@pytest.mark.slow
def test_the_model_calls_the_tool_and_goes_on_with_what_it_said(rollouts) -> None:
    trainer, made = rollouts
    text = trainer._tokenizer.decode(made.completion_ids[0])
    assert '"name": "add"' in text and "sum=7" in text and text.endswith("It is 7.<|im_end|>")


def test_tool_output_is_not_scored_and_all_else_is(rollouts) -> None:
    trainer, made = rollouts
    for ids, mask in zip(made.completion_ids, made.loss_mask, strict=True):
        hidden = trainer._tokenizer.decode([token for token, on in zip(ids, mask, strict=True) if not on])
        scored = trainer._tokenizer.decode([token for token, on in zip(ids, mask, strict=True) if on])
        assert "sum=7" in hidden and "sum=7" not in scored
        assert "It is 7." in scored and '"name": "add"' in scored
    signal = trainer.teacher.score(made)
    assert len(signal) == made.num_scorable == sum(map(sum, made.loss_mask))


def test_metrics_of_tools_are_in_the_table(rollouts) -> None:
    trainer, _ = rollouts
    keys = {key for entry in trainer.state.log_history for key in entry}
    assert {"tools/call_frequency", "tools/failure_frequency"} <= keys
    assert [key for key in keys if find_metric(key) is None] == []


def test_the_context_stands_in_the_first_turn(rollouts) -> None:
    trainer, made = rollouts
    decode = trainer._tokenizer.decode
    prompt = decode(made.teacher_prompt_ids[trainer.teacher.prompts][0])
    assert prompt.index(QUESTION) < prompt.rindex("7") and prompt.count("<|im_start|>assistant") == 1
    assert "add" in prompt, "the teacher must know the same tools"
    assert "7" not in decode(made.prompt_ids[0]).split(QUESTION)[1]


def test_the_teacher_attends_to_what_the_tool_said(rollouts) -> None:
    """SDPO's response mask would hide it: other output must change the scores behind it, and none before it."""
    trainer, made = rollouts
    made = made.select([0])
    first = made.loss_mask[0].index(0)
    other = list(made.completion_ids[0])
    other[first + 3] = other[first + 3] + 1
    changed = replace(made, completion_ids=[other])

    def scores(part: Rollouts) -> torch.Tensor:
        return trainer.teacher.score(part).logprobs(torch.tensor(part.scored_ids))

    before, after = scores(made), scores(changed)
    assert torch.allclose(before[:first], after[:first], atol=1e-5)
    assert (before[first:] - after[first:]).abs().max() > 1e-3
