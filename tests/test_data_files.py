"""Loading: what files, folders and hub ids give, and that a bad one is refused with its line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value

import opsd.data.files
from opsd.data.columns import import_columns
from opsd.data.files import load_rows
from opsd.data.prepare import prepare_rows
from opsd.errors import DataError


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would ask the hub fails the test."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("load_dataset was called")

    monkeypatch.setattr(opsd.data.files, "load_dataset", refuse)


def write(name: str, content: str | bytes | list[dict[str, Any]]) -> str:
    """Write text, bytes or JSON lines into the test's folder and return the path."""
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    data = content.encode() if isinstance(content, str) else content
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


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


def test_a_text_in_a_column_of_mixed_values_stays_that_text() -> None:
    """The text "007" beside a number became 7, "1.50" became 1.5, and "null" an empty answer."""
    values = ["007", 5, "1.50", "null", "NaN", '"quoted"', ["1"], {"b": "2"}, None]
    loaded = load_rows(write("rows.jsonl", [{"prompt": "a", "answer": value} for value in values]))
    for rows in (loaded, import_columns(loaded, {"prompt": "prompt", "answer": "answer"}), prepare_rows(loaded)):
        assert [row["answer"] for row in rows] == values
    renamed = import_columns(loaded.rename_column("prompt", "ask"), {"prompt": "ask", "answer": "answer"})
    assert [row["answer"] for row in renamed] == values


def test_every_csv_cell_is_text() -> None:
    path = write("rows.csv", 'prompt,answer\n"What, then?",007\nb,NA\nc,\n')
    wanted = [("What, then?", "007"), ("b", "NA"), ("c", "")]
    assert [(row["prompt"], row["answer"]) for row in load_rows(path)] == wanted
    assert [(row["prompt"], row["answer"]) for row in load_rows(path, streaming=True)] == wanted


def test_a_link_to_a_file_of_another_name_loads() -> None:
    """The hub's cache keeps files as links to blobs whose names have no suffix."""
    Path("rows.jsonl").symlink_to(write("blob", [{"prompt": "a"}]))
    assert load_rows("rows.jsonl")[0]["prompt"] == "a"


def test_a_column_that_starts_late_is_kept() -> None:
    """Tables are written in batches; the column must be there before the first row that has it."""
    loaded = load_rows(write("rows.jsonl", [{"prompt": "a"}] * 2500 + [{"prompt": "b", "hint": "h"}]))
    assert loaded[0] == {"prompt": "a", "hint": None}
    assert loaded[2500] == {"prompt": "b", "hint": "h"}


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
