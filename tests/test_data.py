"""Rows: what files, folders and hub ids give, what a prompt must be, and what the errors name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict, Features, IterableDataset, List, Value

import opsd.data_files
from opsd.data import completion_of, load_rows, prepare_rows, row_columns
from opsd.errors import DataError

TOOL_CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would ask the hub fails the test."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("load_dataset was called")

    monkeypatch.setattr(opsd.data_files, "load_dataset", refuse)


def write(name: str, content: str | bytes | list[dict[str, Any]]) -> str:
    """Write text, bytes or JSON lines into the test's folder and return the path."""
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    data = content.encode() if isinstance(content, str) else content
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


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


# Loading

ODD_ROWS = [
    {"prompt": "a", "answer": "007", "when": "2024-01-01", "x": 1, "y": 0.5, "ok": True, "z": None},
    {"prompt": "b\u2028c", "answer": "NA", "when": "2024-01-02", "x": 2.5, "y": 2.0, "ok": None, "z": None},
    {"prompt": "c", "answer": "", "late": [1, 2], "tools": [{"a": 1}, {"b": "x"}], "x": "text"},
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["rows.jsonl", "list.json", "data.json", "bom.jsonl", "CAPS.JSONL"])
def test_json_values_come_back_as_they_stand_in_the_file(form: str, streaming: bool) -> None:
    """`load_dataset` made datetimes of the dates; `Dataset.from_list` lost the columns that the first row lacked."""
    lines = "".join(json.dumps(row) + "\n" for row in ODD_ROWS)
    content = {
        "list.json": json.dumps(ODD_ROWS, indent=2),
        "data.json": json.dumps({"data": ODD_ROWS}),
        "bom.jsonl": "\ufeff" + lines + "\n \n",
    }
    loaded = load_rows(write(form, content.get(form, lines)), streaming=streaming)

    assert isinstance(loaded, IterableDataset if streaming else Dataset)
    found = [{column: value for column, value in row.items() if value is not None} for row in loaded]
    wanted = [{column: value for column, value in row.items() if value is not None} for row in ODD_ROWS]
    assert found == wanted
    assert [type(row["x"]) for row in loaded] == [int, float, str]
    if not streaming:
        assert set(loaded.column_names) == {column for row in ODD_ROWS for column in row}


def test_every_csv_cell_is_text() -> None:
    path = write("rows.csv", 'prompt,answer\n"What, then?",007\nb,NA\nc,\n')
    wanted = [("What, then?", "007"), ("b", "NA"), ("c", "")]
    assert [(row["prompt"], row["answer"]) for row in load_rows(path)] == wanted
    assert [(row["prompt"], row["answer"]) for row in load_rows(path, streaming=True)] == wanted


def test_a_link_to_a_file_of_another_name_loads() -> None:
    """The hub's cache keeps files as links to blobs whose names have no suffix."""
    Path("rows.jsonl").symlink_to(write("blob", [{"prompt": "a"}]))
    assert load_rows("rows.jsonl")[0]["prompt"] == "a"


def test_an_edited_file_is_read_again() -> None:
    path = write("rows.jsonl", [{"prompt": "old"}])
    assert load_rows(path)[0]["prompt"] == "old"
    write("rows.jsonl", [{"prompt": "new"}])
    os.utime(path, ns=(1, 1))
    assert load_rows(path)[0]["prompt"] == "new"


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_loads(streaming: bool) -> None:
    Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}]).to_parquet("rows.parquet")
    assert [row["prompt"] for row in load_rows("rows.parquet", streaming=streaming)] == ["a", "b"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"prompt": "x"}\n\n{"prompt": "y"\n', r"a\.jsonl line 3: not JSON: Expecting ',' delimiter"),
        ("a.jsonl", '{"prompt": "x"}\n["y"]\n', r"a\.jsonl line 2: a row must be a JSON object .* not a list"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": "\xff"}\n', r"a\.jsonl line 2: not UTF-8"),
        ("a.jsonl", "", r"a\.jsonl is empty"),
        ("a.jsonl", "\n \n", r"a\.jsonl is empty"),
        ("a.json", '[\n {"prompt": "x"},\n {"prompt" "y"}\n]', r"a\.json line 3: not JSON"),
        ("a.json", '{"prompt": "x"}\n{"prompt": "y"}\n', r"JSON Lines: name the file \.jsonl"),
        ("a.json", '[{"prompt": "x"}, 3]', r"a\.json row 1: a row must be a JSON object .* not a int"),
        ("a.json", '{"prompt": "x"}', r"a\.json: a JSON dataset is a list of objects"),
        ("a.json", "[]", r"a\.json is empty"),
        ("a.json", "", r"a\.json is empty"),
        ("a.csv", "prompt,answer\na,1\nb\n", r"a\.csv line 3: not the 2 cells"),
        ("a.csv", "prompt,answer\na,1,2\n", r"a\.csv line 2: not the 2 cells"),
        ("a.csv", 'prompt\n"open\n', r"a\.csv line 2: not CSV"),
        ("a.csv", "prompt,prompt\na,b\n", r"a\.csv line 1: two columns have one name"),
        ("a.csv", "prompt,answer\n", r"a\.csv is empty"),
        ("a.parquet", "not parquet at all", r"a\.parquet is not a Parquet file"),
        ("a.parquet", "", r"a\.parquet is not a Parquet file"),
        ("a.txt", "prompt", r"cannot read rows from a\.txt: .* out of \.csv, \.json, \.jsonl, \.parquet"),
    ],
)
def test_a_malformed_file_is_refused_with_its_line(name: str, content: str | bytes, says: str, streaming: bool) -> None:
    path = write(name, content)
    with pytest.raises(DataError, match=says):
        list(load_rows(path, streaming=streaming))


def test_a_parquet_file_without_rows_is_refused() -> None:
    Dataset.from_dict({"prompt": []}, features=Features({"prompt": Value("string")})).to_parquet("rows.parquet")
    with pytest.raises(DataError, match="is empty"):
        load_rows("rows.parquet")


def test_a_value_that_no_table_holds_is_refused() -> None:
    with pytest.raises(DataError, match="surrogates not allowed"):
        load_rows(write("rows.jsonl", '{"prompt": "\\ud800"}\n'))


@pytest.mark.usefixtures("no_loader")
@pytest.mark.parametrize("source", ["rows.json", "data/rows.jsnl.jsonl", "./data/row.jsonl", "rows", ""])
def test_a_missing_file_is_never_looked_for_on_the_hub(source: str) -> None:
    write("rows.jsonl", [{"prompt": "a"}])
    write("data/rows.jsonl", [{"prompt": "a"}])
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        load_rows(source)


@pytest.mark.usefixtures("no_loader")
@pytest.mark.parametrize("source", ["/no/such/folder/rows", "data\\rows", "a/b/c", "two words/x"])
def test_what_cannot_be_a_hub_id_is_not_asked_for(source: str) -> None:
    with pytest.raises(DataError, match=r"there is no dataset file|neither a file or folder here nor a hub id"):
        load_rows(source)


def test_a_hub_id_is_asked_for_and_its_absence_named() -> None:
    with pytest.raises(DataError, match=r"cannot load the dataset 'org/no-such-rows': Couldn't reach"):
        load_rows("org/no-such-rows")


def test_a_folder_gives_the_files_of_the_split() -> None:
    """Without the rule, the questions of math-test.jsonl would be trained on."""
    for name in ("math-train-1", "math-train-2", "math-test", "notes"):
        write(f"rows/{name}.jsonl", [{"prompt": name}])
    assert load_rows("rows")["prompt"][:] == ["math-train-1", "math-train-2"]
    assert load_rows("rows", split="test")["prompt"][:] == ["math-test"]
    with pytest.raises(DataError, match=r"no split 'tests'; it has: test, train, notes\. Did you mean 'test'"):
        load_rows("rows", split="tests")


def test_a_folder_without_split_names_is_all_train() -> None:
    write("rows/a.csv", "prompt\na\n")
    write("rows/b.csv", "prompt\nb\n")
    assert load_rows("rows")["prompt"][:] == ["a", "b"]
    write("rows/c.jsonl", [{"prompt": "c"}])
    with pytest.raises(DataError, match=r"kind is \.csv and \.jsonl"):
        load_rows("rows")


def test_a_folder_without_files_is_refused() -> None:
    Path("rows").mkdir()
    with pytest.raises(DataError, match="cannot load the dataset 'rows'"):
        load_rows("rows")


def test_a_saved_dataset_loads_from_its_folder() -> None:
    rows = Dataset.from_list([{"prompt": "a"}])
    rows.save_to_disk("one")
    DatasetDict({"train": rows, "test": Dataset.from_list([{"prompt": "b"}])}).save_to_disk("two")
    assert load_rows("one")[0]["prompt"] == "a"
    assert load_rows("two", split="test")[0]["prompt"] == "b"
    assert next(iter(load_rows("two", streaming=True)))["prompt"] == "a"
    with pytest.raises(DataError, match="no split 'dev'; it has: train, test"):
        load_rows("two", split="dev")
    Path("one/state.json").write_text("{")
    with pytest.raises(DataError, match="looks like a saved dataset and does not load"):
        load_rows("one")


def test_settings_that_a_file_cannot_follow_are_refused() -> None:
    path = write("rows.jsonl", [{"prompt": "a"}])
    with pytest.raises(DataError, match="no split 'test'; it has: train"):
        load_rows(path, split="test")
    with pytest.raises(DataError, match="name='main' picks a configuration"):
        load_rows(path, name="main")


# Preparing


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
    """Alike in a stream, where it happens when the row is reached, and in a file's rows, where it happens at once."""
    first = {"prompt": [user("fine")] if isinstance(prompt, list) else "fine"}
    stream = iter(prepare_rows(as_stream([first, {"prompt": prompt}])))
    assert next(stream)["prompt"]
    with pytest.raises(DataError, match=says):
        next(stream)
    dataset = load_rows(write("rows.jsonl", [first, {"prompt": prompt}]))
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
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_chat_messages_are_refused(messages: Any, says: str, streaming: bool) -> None:
    path = write("rows.jsonl", [{"messages": messages}])
    with pytest.raises(DataError, match=f"row 0: .*{says}"):
        list(prepare_rows(load_rows(path, streaming=streaming)))


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


@pytest.mark.parametrize("streaming", [False, True])
def test_text_and_message_prompts_do_not_mix(streaming: bool) -> None:
    path = write("rows.jsonl", [{"prompt": "a"}, {"prompt": "b"}, {"prompt": [user("c")]}])
    with pytest.raises(DataError, match="row 2: `prompt` is messages, and in row 0 it is text"):
        list(prepare_rows(load_rows(path, streaming=streaming)))


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


# Completions


@pytest.mark.parametrize(
    ("row", "completion"),
    [
        ({"completion": "text", "completion_ids": [3, 4]}, [3, 4]),
        ({"completion": "text", "completion_ids": None}, "text"),
        ({"completion": [user("no"), assistant("first"), assistant([{"type": "text", "text": "last"}])]}, "last"),
        ({"completion": None}, None),
        ({}, None),
    ],
)
def test_ids_win_over_text_and_messages_give_their_last_assistant_turn(row: Any, completion: Any) -> None:
    assert completion_of(row) == completion


@pytest.mark.parametrize("completion", [[], [user("x")], [assistant(None, tool_calls=[TOOL_CALL])], ["x"], 3])
def test_a_completion_without_text_is_refused(completion: Any) -> None:
    with pytest.raises(DataError, match="completion"):
        completion_of({"completion": completion})
