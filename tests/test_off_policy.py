"""Completions that rows bring: their ids are what the student would sample behind its prompt, up to its end."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import trl
from conftest import CHATML, make_llama, make_rows, make_tokenizer
from datasets import Dataset
from gallery_parts import OTHER_END
from helpers import make_args, make_trainer
from jinja2 import UndefinedError
from tokenizers import AddedToken

from opsd import OPSDTrainer, SameCheckpointTeacher
from opsd.contexts.completions import completion_ids, end_of_answer
from opsd.contexts.renderer import PromptRenderer
from opsd.data.prepare import prepare_rows
from opsd.data.rows import completion_of
from opsd.errors import DataError

ASKED = [{"role": "user", "content": "1 + 1?"}]
TRIMMING = OTHER_END.replace("message['content'] +", "message['content'] | trim +")  # Gemma's way
# Qwen3's way: thinking is written before the last answer, and an empty thought where it is switched off.
HYBRID = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% set text = m['content'] %}"
    "{% if m['role'] == 'assistant' and loop.last %}{% set thought = m['reasoning_content'] | default('', true) %}"
    "{% if '</think>' in text %}{% set thought = text.split('</think>')[0].split('<think>')[-1] %}"
    "{% set text = text.split('</think>')[-1] %}{% endif %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + text.lstrip('\n') }}{% else %}{{ text }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# DeepSeek-R1's way: the prompt opens a thought, and thoughts are cut out of earlier answers.
OPENING = CHATML.replace("message['content'] +", "message['content'].split('</think>')[-1] +").replace(
    "{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}"
)
PHI = CHATML.replace("{% endif %}{% endif %}", "{% endif %}{% else %}{{ '<|pad|>' }}{% endif %}")
TEXT_TURNS = (
    "{% for m in messages %}{{ m['role'].title() + ': ' + m['content'] + '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
OFF = {"enable_thinking": False}
WEIGHED = {"role": "assistant", "content": "It is 2.", "reasoning_content": "One more."}


def renderer(chat_template: str | None = CHATML, **keywords: Any) -> PromptRenderer:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = chat_template
    return PromptRenderer(tokenizer, None, keywords)


WRITTEN: dict[str, tuple[PromptRenderer, Any, Any, str]] = {
    "a chat": (renderer(), ASKED, "It is 2.", "It is 2.<|im_end|>"),
    "a turn that ends with another token than a text": (renderer(OTHER_END), ASKED, "It is 2.", "It is 2.<|pad|>"),
    "a template that trims": (renderer(TRIMMING), ASKED, " It is 2. \n", "It is 2.<|pad|>"),
    "plain text of a model with such a template": (renderer(OTHER_END), "1 + 1 =", " 2", " 2<|im_end|>"),
    "plain text of a base model": (renderer(None), "1 + 1 =", " 2", " 2<|im_end|>"),
    "text that is a chat already": (
        renderer(OTHER_END),
        "<|im_start|>user\n1 + 1?<|pad|>\n<|im_start|>assistant\n",
        "It is 2.",
        "It is 2.<|pad|>",
    ),
    "a text that has its end": (renderer(None), "1 + 1 =", " 2<|im_end|>", " 2<|im_end|>"),
    "a text that has its end twice": (renderer(None), "1 + 1 =", " 2<|im_end|><|im_end|>\n", " 2<|im_end|>"),
    "a turn that has its end": (renderer(OTHER_END), ASKED, "It is 2.<|pad|>\n", "It is 2.<|pad|>"),
    "a turn that has the tokenizer's end": (renderer(OTHER_END), ASKED, "It is 2.<|im_end|>", "It is 2.<|pad|>"),
    "an end of text behind the last turn": (renderer(PHI), ASKED, "It is 2.", "It is 2.<|im_end|>"),
    "turns in plain words": (renderer(TEXT_TURNS), ASKED, "It is 2.", " It is 2.<|im_end|>"),
    "reasoning": (renderer(HYBRID), ASKED, WEIGHED, "<think>\nOne more.\n</think>\n\nIt is 2.<|im_end|>"),
    "thinking within the text": (
        renderer(HYBRID),
        ASKED,
        "<think>One more.</think>It is 2.",
        "<think>\nOne more.\n</think>\n\nIt is 2.<|im_end|>",
    ),
    "an answer without thinking": (renderer(HYBRID, **OFF), ASKED, "It is 2.", "It is 2.<|im_end|>"),
    "a thought that the prompt has opened": (
        renderer(OPENING),
        ASKED,
        "<think>\nOne more.\n</think>\n\nIt is 2.",
        "One more.\n</think>\n\nIt is 2.<|im_end|>",
    ),
    "a thought that a template without thinking keeps": (
        renderer(),
        ASKED,
        "<think>One more.</think>It is 2.",
        "<think>One more.</think>It is 2.<|im_end|>",
    ),
}


@pytest.mark.parametrize(("view", "prompt", "completion", "text"), WRITTEN.values(), ids=WRITTEN)
def test_a_completion_is_what_the_student_would_sample(
    view: PromptRenderer, prompt: Any, completion: Any, text: str
) -> None:
    """It ended with the tokenizer's eos behind every template, twice where the text had one, and lost its reasoning."""
    assert view.tokenizer.decode(completion_ids(view, prompt, completion)) == text


REFUSED: dict[str, tuple[PromptRenderer, Any, Any, str]] = {
    "thinking behind an empty thought": (
        renderer(HYBRID, **OFF),
        ASKED,
        "<think>One more.</think>It is 2.",
        "prompt has closed its thinking block.*enable_thinking: true",
    ),
    "reasoning behind an empty thought": (renderer(HYBRID, **OFF), ASKED, WEIGHED, "has closed its thinking block"),
    "an answer within a thought": (renderer(OPENING), ASKED, "It is 2.", "does not close it.*enable_thinking: false"),
    "reasoning that the template leaves out": (renderer(), ASKED, WEIGHED, "does not write it behind the prompt"),
    "reasoning behind plain text": (renderer(), "1 + 1 =", WEIGHED, "this row's prompt is plain text"),
    "a tool call that the template leaves out": (
        renderer(),
        ASKED,
        {"role": "assistant", "content": "Hm.", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]},
        "'tool_calls', and the chat template does not write it",
    ),
    "further turns": (renderer(), ASKED, "2<|im_end|>\n<|im_start|>user\nSure?", "goes on behind '<|im_end|>'"),
    "an end alone": (renderer(), ASKED, "<|im_end|>", "no text to train on"),
}


@pytest.mark.parametrize(("view", "prompt", "completion", "says"), REFUSED.values(), ids=REFUSED)
def test_a_completion_that_does_not_fit_its_prompt_is_refused(
    view: PromptRenderer, prompt: Any, completion: Any, says: str
) -> None:
    with pytest.raises(DataError, match=f"(?s){says}"):
        completion_ids(view, prompt, completion)


SHIPPED = {
    path.stem: path.read_text("utf-8")
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
}
SPECIAL = sorted(
    {token for text in SHIPPED.values() for token in re.findall(r"<[|｜]?[a-z_A-Z▁｜]{2,40}[|｜]?>", text)}
)
NO_TOKENS = {"<think>", "</think>", "<tool_call>", "<tools>"}


@pytest.fixture(scope="module", params=[True, False], ids=["special", "not special"])
def shipped_tokenizer(request: Any) -> Any:
    """The markers are added tokens only, as in the tokenizers of Gemma 3 and Phi: `all_special_ids` lacks them."""
    tokenizer = make_tokenizer()
    markers = [AddedToken(text, special=request.param, normalized=False) for text in SPECIAL if text not in NO_TOKENS]
    tokenizer.add_tokens(markers)
    return tokenizer


@pytest.mark.parametrize("name", SHIPPED)
def test_behind_every_template_that_trl_ships_an_answer_has_one_end_and_no_thought_but_its_own(
    name: str, shipped_tokenizer: Any
) -> None:
    """Qwen3's and later templates put an empty thought before thinking that stands in the text."""
    tokenizer, thoughts = shipped_tokenizer, "<think>\nOne more.\n</think>\n\n"
    for keywords in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
        view = PromptRenderer(tokenizer, SHIPPED[name], keywords)
        for completion in ("It is 2.", f"{thoughts}It is 2.", WEIGHED):
            try:
                prompt_ids, ids = view.ids(ASKED), completion_ids(view, ASKED, completion)
            except DataError:
                continue
            except UndefinedError:  # a template for images
                assert "llava" in name
                continue
            end = end_of_answer(view, ASKED)
            assert ids.count(end) == 1 and ids[-1] == end
            assert tokenizer.decode(ids[:-1]).rstrip().endswith("It is 2.")
            if completion != "It is 2.":
                text = tokenizer.decode(prompt_ids + ids)
                assert text.count("</think>") == text.count("<think>") <= 1 and "One more." in text


@pytest.mark.parametrize("prompt", ["User: 1 + 1?\nAssistant:", "What does [INST] mean?", "1 + 1 ="])
def test_behind_text_an_answer_ends_where_sampling_stops(prompt: str) -> None:
    """Base models' tokenizers have a chat template whose end of turn is not where a rollout of text ends."""
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|pad|>"
    view = PromptRenderer(tokenizer)
    assert view.end_of_turn != tokenizer.eos_token_id
    assert completion_ids(view, prompt, "It is 2.")[-1] == tokenizer.eos_token_id


TURNS = [{"role": "assistant", "content": "2"}, {"role": "user", "content": "Sure?"}]


def test_several_turns_are_no_completion() -> None:
    """The last one was trained on, straight behind the first question."""
    with pytest.raises(DataError, match=r"has 3 turns.*to the end of `prompt`, or .* `messages`"):
        completion_of({"prompt": ASKED, "completion": [*TURNS, {"role": "assistant", "content": "Yes."}]})
    (row,) = prepare_rows(Dataset.from_list([{"messages": [*ASKED, *TURNS, WEIGHED | {"content": "Yes."}]}]))
    assert row["prompt"] == [*ASKED, *TURNS]
    assert completion_of(row) == WEIGHED | {"content": "Yes."}


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_reasoning_of_a_chat_reaches_the_completion(kind: str) -> None:
    chats = [{"messages": [*ASKED, WEIGHED]}, {"messages": [*ASKED, {"role": "assistant", "content": "2"}]}]
    dataset = Dataset.from_list(chats)
    prepared = list(prepare_rows(dataset if kind == "map" else dataset.to_iterable_dataset()))
    assert [completion_of(row) for row in prepared] == [WEIGHED, "2"]
    if kind != "map":
        late = prepare_rows(Dataset.from_list(chats[::-1]).to_iterable_dataset())
        with pytest.raises(DataError, match="row 1: its answer has 'reasoning_content', and the stream's first row"):
            list(late)


def trainer_on(folder: Path, chat_template: str, rows: list[dict[str, Any]], **settings: Any) -> OPSDTrainer:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = chat_template
    return OPSDTrainer(
        make_llama(),
        SameCheckpointTeacher(context="answer_only"),
        args=make_args(folder, max_completion_length=64, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("settings", [{"lmbda": 0.5}, {"control": "sft"}], ids=["off-policy", "sft"])
def test_runs_train_on_the_end_of_the_turn(tmp_path: Path, settings: dict[str, Any]) -> None:
    """A Gemma-like student was taught to end with the tokenizer's eos, and unlearned to stop."""
    rows = [{**row, "completion": f"It is {row['answer']}."} for row in make_rows(4)]
    trainer = trainer_on(tmp_path, OTHER_END, rows, **settings)
    rollouts = trainer._generate_and_score_completions([trainer.train_dataset[number] for number in range(4)])
    texts = [make_tokenizer().decode(ids) for ids in rollouts.completion_ids[2:]]  # with lmbda the first are sampled
    assert texts == [f"It is {row['answer']}.<|pad|>" for row in make_rows(4)[2:]]
    shown = rollouts.prompt_ids[3] + rollouts.completion_ids[3]
    turns = [*rows[3]["prompt"], {"role": "assistant", "content": rows[3]["completion"]}]
    whole = trainer.student.tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    assert whole[: len(shown)] == shown, "prompt and completion are the chat as the template writes it"


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("completion_ids", [5, 400], r"row 3: the completion has the id 400, and the model embeds 0 to 399"),
        ("completion_ids", [-1, 5], r"row 3: the completion has the id -1"),
        ("completion", "<think>Hm.</think>2", r"row 3: .*has closed its thinking block"),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_named_before_step_1(
    tmp_path: Path, column: str, value: Any, says: str
) -> None:
    """An id outside the vocabulary was an IndexError in the middle of a run."""
    usual: Any = [5, 2] if column == "completion_ids" else "2"
    rows = [{**row, column: value if number == 3 else usual} for number, row in enumerate(make_rows(4))]
    with pytest.raises(DataError, match=f"(?s){says}"):
        trainer_on(tmp_path, HYBRID, rows, lmbda=0.5, chat_template_kwargs=OFF)


def test_completion_ids_that_are_no_ids_are_refused() -> None:
    for ids in ([5, None], [5.0], "5 6", {"a": 5}):
        with pytest.raises(DataError, match="must be a list of token ids"):
            completion_of({"prompt": "?", "completion_ids": ids})


def test_traces_that_do_not_fit_the_prompt_are_not_measured_and_the_run_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = [{**row, "prompt": [{"role": "user", "content": f"Q{n}?"}]} for n, row in enumerate(make_rows(2))]
    settings = {"chat_template_kwargs": {"enable_thinking": True}, "max_steps": 1}
    plan = {"test": test, "grader": "last_number", "max_new_tokens": 4}
    trainer = make_trainer(tmp_path, SameCheckpointTeacher(context="answer_only"), evaluation=plan, **settings)
    assert trainer.evaluator is not None and trainer.evaluator._traces() is None
    assert "not measured: the likelihood of the test rows' 'solution': the prompt opens a thinking block" in (
        capsys.readouterr().out
    )
