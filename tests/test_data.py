"""Preparing: what a prompt must be, what becomes of chat messages, and which rows errors name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict, Features, IterableDataset, List, Value

from opsd.data.prepare import prepare_rows
from opsd.data.rows import completion_of, row_columns
from opsd.errors import DataError

TOOL_CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def user(content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **keys}


def assistant(content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def as_stream(rows: list[dict[str, Any]]) -> IterableDataset:
    """A stream that declares no columns, with each row just as it is written."""

    def generate(rows: list[str]) -> Iterator[dict[str, Any]]:
        yield from map(json.loads, rows)

    return IterableDataset.from_generator(generate, gen_kwargs={"rows": [json.dumps(row) for row in rows]})


def as_typed_stream(rows: list[dict[str, Any]]) -> IterableDataset:
    return Dataset.from_list(rows).to_iterable_dataset()


KINDS: list[Callable[[list[dict[str, Any]]], Any]] = [Dataset.from_list, as_stream, as_typed_stream]
every_kind = pytest.mark.parametrize("make", KINDS, ids=["map", "stream", "typed_stream"])


@pytest.mark.parametrize("rows", [[{"prompt": "What?", "answer": 3}], [{"prompt": [user("What?", name="bob")]}]])
def test_rows_that_need_no_change_come_back_as_the_same_object(rows: list[dict[str, Any]]) -> None:
    dataset = Dataset.from_list(rows)
    assert prepare_rows(dataset) is dataset


@every_kind
def test_chat_messages_become_a_prompt_and_a_completion(make: Callable[..., Any]) -> None:
    rows = [
        {"messages": [{"role": "system", "content": "Be brief."}, user("2 + 2?"), assistant("4")], "hint": "add"},
        {"messages": [user("2 + 2?"), assistant("4"), user("Sure?")], "hint": "add"},
    ]
    prepared = prepare_rows(make(rows))
    assert list(prepared) == [
        {"hint": "add", "prompt": rows[0]["messages"][:2], "completion": "4"},
        {"hint": "add", "prompt": rows[1]["messages"], "completion": None},
    ]
    assert set(row_columns(prepared)) == {"hint", "prompt", "completion"}
    assert list(prepare_rows(prepared)) == list(prepared)
    assert [completion_of(row) for row in prepared] == ["4", None]


@every_kind
def test_keys_that_arrow_filled_with_none_do_not_reach_the_chat_template(make: Callable[..., Any]) -> None:
    """Templates ask `'tool_calls' in message`; an Arrow table gives every message every key."""
    rows = [
        {"prompt": [user("1 + 2?", name="bob")]},
        {
            "prompt": [
                user("1 + 2?"),
                assistant(None, tool_calls=[TOOL_CALL, {**TOOL_CALL, "id": "7"}]),
                {"role": "tool", "content": "3"},
            ]
        },
    ]
    prepared = list(prepare_rows(make(rows)))
    assert prepared[0] == rows[0]
    assert prepared[1]["prompt"][1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": rows[1]["prompt"][1]["tool_calls"],
    }
    assert prepared[1]["prompt"][2] == {"role": "tool", "content": "3"}


@every_kind
def test_text_parts_are_joined(make: Callable[..., Any]) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 2?"}]
    prepared = prepare_rows(make([{"prompt": [user(parts)], "answer": "4"}]))
    assert list(prepared) == [{"prompt": [user("What is 2 + 2?")], "answer": "4"}]


def test_other_columns_keep_their_features() -> None:
    features = Features({"messages": List({"role": Value("string"), "content": Value("string")}), "n": Value("int8")})
    dataset = Dataset.from_list([{"messages": [user("a"), assistant("b")], "n": 1}], features=features)
    for prepared in (prepare_rows(dataset), prepare_rows(dataset.to_iterable_dataset())):
        assert prepared.features["n"] == Value("int8")
        assert prepared.features["completion"] == Value("string")


BAD_PROMPTS = [
    (None, r"row 1: `prompt` is None"),
    ("  ", r"row 1: `prompt` is empty"),
    ([], r"row 1: `prompt` is empty"),
    ({"text": "x"}, r"row 1: `prompt` is a dict, neither text nor a list of messages"),
    (["x"], r"row 1: message 0 of `prompt` is a str, not a dict"),
    ([{"from": "human", "value": "x"}], r"message 0 of `prompt` has no 'role'; it has: from, value"),
    ([user("x"), {"role": "user"}], r"message 1 of `prompt` has no 'content'"),
    ([user(3)], r"'content' that is a int, neither text nor a list"),
    ([user([{"type": "image"}, {"type": "text", "text": "x"}])], r"part of type 'image': version 1 .* text only"),
    ([user(["x"])], r"part of type 'str'"),
    ([user("x"), assistant("y")], r"already answered by its last assistant turn"),
    ([assistant("y")], r"already answered"),
    ([user(" ")], r"ends with an empty user turn"),
]


@pytest.mark.parametrize(("prompt", "says"), BAD_PROMPTS)
def test_a_row_with_nothing_to_answer_is_refused_by_number(prompt: Any, says: str) -> None:
    """Alike in a stream, where it happens when the row is reached, and in a table, where it happens at once."""
    first = {"prompt": [user("fine")] if isinstance(prompt, list) else "fine"}
    stream = iter(prepare_rows(as_stream([first, {"prompt": prompt}])))
    assert next(stream)["prompt"]
    with pytest.raises(DataError, match=says):
        next(stream)
    dataset = Dataset.from_list([first, {"prompt": prompt}], on_mixed_types="use_json")
    with pytest.raises(DataError, match=says):
        prepare_rows(dataset)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        (None, "`messages` is None"),
        ("text", "`messages` is a str"),
        ([assistant("y")], "assistant turn only: nothing was asked"),
        ([user("x"), assistant("y"), assistant("z")], "already answered"),
        ([user("x"), assistant(None, tool_calls=[TOOL_CALL])], "assistant turn that has no text"),
    ],
)
@every_kind
def test_bad_chat_messages_are_refused(messages: Any, says: str, make: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match=f"row 0: .*{says}"):
        list(prepare_rows(make([{"messages": messages}])))


def test_all_bad_rows_are_counted_and_the_first_five_numbered() -> None:
    rows = [{"prompt": None if number % 3 == 2 else "What?"} for number in range(3001)]
    with pytest.raises(DataError) as caught:
        prepare_rows(Dataset.from_list(rows), name="eval")
    message = str(caught.value)
    assert "the eval dataset has 1000 rows without a usable prompt" in message
    assert [line.split(":")[0].strip() for line in message.splitlines() if "is None" in line] == [
        "row 2", "row 5", "row 8", "row 11", "row 14",
    ]  # fmt: skip
    assert "... and 995 more" in message


def test_text_and_message_prompts_do_not_mix() -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": [user("c")]}]
    for mixed in (as_stream(rows), Dataset.from_list(rows, on_mixed_types="use_json")):
        with pytest.raises(DataError, match="row 2: `prompt` is messages, and in row 0 it is text"):
            list(prepare_rows(mixed))


@every_kind
@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"question": "x", "answer": "y"},
            r"no column 'prompt' .* has: question, answer\. Is it 'question'\? Then data",
        ),
        ({"promt": "x"}, r"rename_column\('promt', 'prompt'\)"),
        ({"foo": "x"}, r"rename_column\('\.\.\.', 'prompt'\)"),
        ({"prompt": "x", "messages": [user("x")]}, "both 'messages' and 'prompt'"),
        ({"completion": "x", "messages": [user("x")]}, "both 'messages' and 'completion'"),
        ({"prompt": "x", "image": "x.png"}, "column 'image': version 1 of opsd is text only"),
        ({"messages": [user("x")], "images": ["x.png"]}, "column 'images'"),
    ],
)
def test_columns_that_cannot_work_are_refused_before_any_row(make: Callable[..., Any], row: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        prepare_rows(make([row]))


def test_an_image_that_comes_late_in_a_stream_is_refused() -> None:
    stream = prepare_rows(as_stream([{"prompt": "x"}, {"prompt": "y", "image": "y.png"}]))
    with pytest.raises(DataError, match="row 1: it has images"):
        list(stream)


def test_what_has_no_rows_or_is_no_dataset_is_refused() -> None:
    with pytest.raises(DataError, match="train dataset is empty"):
        prepare_rows(Dataset.from_list([]))
    with pytest.raises(DataError, match="is empty"):
        prepare_rows(as_stream([{"prompt": "x"}]).take(0))
    with pytest.raises(DataError, match=r"is a DatasetDict.*dataset\['train'\]"):
        prepare_rows(DatasetDict({"train": Dataset.from_list([{"prompt": "x"}])}))  # type: ignore[arg-type]


def test_a_stream_can_be_read_twice_shuffled_and_resumed() -> None:
    rows = [{"messages": [user(str(number)), assistant("a")]} for number in range(6)]
    stream = prepare_rows(as_stream(rows))
    assert list(stream) == list(stream)
    assert sorted(row["prompt"][0]["content"] for row in stream.shuffle(seed=1, buffer_size=3)) == list("012345")
    reader = iter(stream)
    for _ in range(4):
        next(reader)
    state = stream.state_dict()
    stream.load_state_dict(state)
    assert [row["prompt"][0]["content"] for row in stream] == ["4", "5"]


@pytest.mark.parametrize(
    ("row", "completion"),
    [
        ({"completion": "text", "completion_ids": [3, 4]}, [3, 4]),
        ({"completion": "text", "completion_ids": None}, "text"),
        ({"completion": [assistant([{"type": "text", "text": "the "}, {"text": "turn"}], name="a")]}, "the turn"),
        ({"completion": None}, None),
        ({}, None),
    ],
)
def test_ids_win_over_text_and_messages_give_the_text_of_their_turn(row: Any, completion: Any) -> None:
    assert completion_of(row) == completion


@pytest.mark.parametrize("completion", [[], [user("x")], [assistant(None, tool_calls=[TOOL_CALL])], ["x"], 3])
def test_a_completion_without_text_is_refused(completion: Any) -> None:
    with pytest.raises(DataError, match="completion"):
        completion_of({"completion": completion})
