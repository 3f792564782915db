"""Where rows come from: a file, a folder or a hub id becomes a dataset.

Knows files, splits and lines, not what is in a row (that is `rows.py`, which exports `load_rows` too).

JSON and CSV are read here and stored by `datasets` with columns typed by what the file holds, because the inference
of `load_dataset` rewrites privileged columns: "2024-01-01" becomes a datetime, "007" in a CSV becomes 7.
"""

from __future__ import annotations

import csv
import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.parquet as pq
from datasets import Dataset, Features, IterableDataset, Json, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetsError

from opsd.data.json_columns import as_stored
from opsd.errors import DataError, did_you_mean
from opsd.settings import looked_in
from opsd.sources import is_hub_id

__all__ = ["load_rows"]

Row = dict[str, Any]
T = TypeVar("T")

_SPLITS = {"train", "test", "validation", "valid", "val", "dev", "eval"}
# What loading raises when the source is at fault: not found, unreachable, unknown split, not the format it claims.
_LOAD_ERRORS = (DatasetsError, OSError, ValueError, RuntimeError)


def load_rows(
    source: str, *, split: str = "train", name: str | None = None, streaming: bool = False
) -> Dataset | IterableDataset:
    """Load a dataset from a file, a folder or the hub; only "org/name" that is not on disk asks the network.

    Args:
        source: a .jsonl, .json, .csv or .parquet file; a folder of such files (split by the words train, test, ... in
            their names) or one written by `save_to_disk`; or a hub id such as "org/name".
        split: the split to take; a single file is one split, "train".
        name: the configuration of a hub dataset.
        streaming: read rows as they are needed; a malformed line is then reported when it is reached.

    Raises:
        DataError: the source does not exist, is empty, or is malformed (file and line are named).
    """
    path = Path(source).expanduser()
    if source and path.exists():
        return _load_local(path, split, name, streaming)
    if source.startswith((".", "/", "~")) or "\\" in source or path.suffix.lower() in _SUFFIXES:
        raise DataError(f"there is no dataset file {source!r}.{_near_files(path)}{looked_in(path)}")
    if not is_hub_id(source):
        raise DataError(
            f"{source!r} is neither a file or folder here nor a hub id, which has the form 'org/name'. "
            f"Nothing was downloaded.{_near_files(path)}{looked_in(path)}"
        )
    return _load(source, source, name=name, split=split, streaming=streaming)


def _near_files(path: Path) -> str:
    """Name the files beside a missing path that resemble it, else the data files there."""
    if not path.parent.is_dir():
        return f" The folder {str(path.parent)!r} does not exist either."
    names = sorted(entry.name for entry in path.parent.iterdir())
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    near = near or [name for name in names if Path(name).suffix.lower() in _SUFFIXES][:5]
    return f" Near it: {', '.join(near)}." if near else f" The folder {str(path.parent)!r} has no dataset files."


def _load_local(path: Path, split: str, name: str | None, streaming: bool) -> Dataset | IterableDataset:
    saved = any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json"))
    by_split = _files_by_split(path) if path.is_dir() else {"train": [path]}
    if (
        not saved and not by_split
    ):  # a copy of a hub repository keeps its files deeper, or says in its README.md where they are
        return _load(str(path), str(path), name=name, split=split, streaming=streaming)
    if name is not None:
        raise DataError(f"name={name!r} picks a configuration of a hub dataset, and {path} is none: leave it out.")
    if saved:
        return _load_saved(path, split, streaming)
    files = _pick_split(path, by_split, split)
    kinds = {file.suffix.lower() for file in files}
    if len(kinds) > 1 or not kinds <= _SUFFIXES:
        raise DataError(
            f"cannot read rows from {path}: the file kind is {' and '.join(sorted(kinds)) or 'unknown'}. "
            f"Give one file, or a folder with files of one kind, out of {', '.join(sorted(_SUFFIXES))}."
        )
    return _load_parquet(files, streaming) if kinds == {".parquet"} else _load_text(files, streaming)


def _files_by_split(folder: Path) -> dict[str, list[Path]]:
    """Group data files by the split word in their names; where no name has one, all are "train"."""
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES)
    words = [[word for word in re.split(r"[^a-z]+", file.stem.lower()) if word in _SPLITS] for file in files]
    by_split: dict[str, list[Path]] = {}
    for file, found in zip(files, words, strict=True):
        # Beside train.jsonl, a file without a split word is a split of its own: nobody said to train on it.
        split = found[0] if found else file.stem if any(words) else "train"
        by_split.setdefault(split, []).append(file)
    return by_split


def _pick_split(path: Path, splits: Mapping[str, T], split: str) -> T:
    if split not in splits:
        raise DataError(f"{path} has no split {split!r}; it has: {', '.join(splits)}.{did_you_mean(split, splits)}")
    return splits[split]


def _load_saved(folder: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    try:
        saved = load_from_disk(str(folder))
    except _LOAD_ERRORS as error:
        raise DataError(f"{folder} looks like a saved dataset and does not load: {error}. Save it again.") from error
    dataset = _pick_split(folder, {"train": saved} if isinstance(saved, Dataset) else saved, split)
    return dataset.to_iterable_dataset() if streaming else dataset


def _load_parquet(files: list[Path], streaming: bool) -> Dataset | IterableDataset:
    for file in files:
        try:
            n_rows = pq.read_metadata(file).num_rows
        except (OSError, ValueError) as error:
            raise DataError(f"{file} is not a Parquet file: {error}. Was it copied or downloaded whole?") from error
        if not n_rows:
            raise DataError(f"{file} is empty: it has no rows to train on.")
    paths = [str(file) for file in files]
    return _load(str(files[0]), "parquet", data_files=paths, split="train", streaming=streaming)


def _load_text(files: list[Path], streaming: bool) -> Dataset | IterableDataset:
    paths = [str(file.absolute()) for file in files]
    if streaming:
        return IterableDataset.from_generator(_rows_in, gen_kwargs={"paths": paths})
    features = _read_features(paths)
    # `datasets` caches by these arguments alone: with the times, an edited file is read again.
    times = tuple(file.stat().st_mtime_ns for file in files)
    try:
        return Dataset.from_generator(
            _typed_rows, gen_kwargs={"paths": paths, "times": times, "features": features}, features=features
        )
    except _LOAD_ERRORS as error:
        raise DataError(f"{files[0]}: a value does not fit into a table: {_reason(error)}. Fix that value.") from error


def _reason(error: Exception) -> BaseException:
    """Return the error that says something: a DatasetGenerationError itself only says that there is another."""
    return (error.__cause__ or error) if isinstance(error, DatasetGenerationError) else error


def _load(source: str, *args: Any, **kwargs: Any) -> Dataset | IterableDataset:
    try:
        return load_dataset(*args, **kwargs)
    except _LOAD_ERRORS as error:
        raise DataError(
            f"cannot load the dataset {source!r}: {_reason(error)}\n"
            "Check its name, `split` and `name`, and the connection; or download it and give the path of the file."
        ) from error


def _typed_rows(paths: Sequence[str], times: Sequence[int], features: Features) -> Iterator[Row]:
    """Yield the rows of text files as their features store them; `times` only tells their versions apart."""
    for row in _rows_in(paths):
        yield as_stored(row, features)


def _rows_in(paths: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of text files."""
    for path in map(Path, paths):
        rows = _READERS[path.suffix.lower()](path)
        first = next(rows, None)
        if first is None:
            raise DataError(f"{path} is empty: it has no rows to train on.")
        yield from chain([first], rows)


def _read_features(paths: Sequence[str]) -> Features:
    """Read and check every row, and type each column so that values come back as they stand in the file."""
    kinds: dict[str, set[type]] = {}
    for row in _rows_in(paths):
        for column, value in row.items():
            kinds.setdefault(column, set()).add(type(value))
    return Features({column: _feature(found - {type(None)}) for column, found in kinds.items()})


def _feature(kinds: set[type]) -> Value | Json:
    """Return the feature for one column; `Json` keeps lists, dicts and mixtures as they are, adding no None keys."""
    if not kinds:
        return Value("string")
    scalars = {str: "string", bool: "bool", int: "int64", float: "float64"}
    kind = next(iter(kinds))
    return Value(scalars[kind]) if len(kinds) == 1 and kind in scalars else Json()


def _parse_json(data: bytes, where: str) -> Any:
    try:
        # Python writes NaN for a missing value, which is not JSON; beside text it would make the column a mixture.
        return json.loads(
            data.decode("utf-8-sig"),
            parse_constant=lambda name: None if name == "NaN" else float(name),
            object_pairs_hook=_need_keys_once,
        )
    except _KeyTwiceError as error:
        raise DataError(
            f"{where}: the key {error.args[0]!r} stands twice in one object, and one of its values would be lost."
        ) from error
    except json.JSONDecodeError as error:
        line = f" line {error.lineno}" if error.lineno > 1 else ""
        hint = " One object per line is JSON Lines: name the file .jsonl." if error.msg == "Extra data" else ""
        raise DataError(f"{where}{line}: not JSON: {error.msg} at column {error.colno}.{hint}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8: {error.reason} at byte {error.start}. Save it as UTF-8.") from error


class _KeyTwiceError(Exception):
    """The key is its argument."""


def _need_keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise _KeyTwiceError(next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number])))
    return content


def _need_object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f'{where}: a row must be a JSON object like {{"prompt": ...}}, not a {type(value).__name__}.')
    return value


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path.name} line {number}"
                yield _need_object(_parse_json(line.strip(), where), where)


def _json_rows(path: Path) -> Iterator[Row]:
    data = path.read_bytes()
    content = _parse_json(data, path.name) if data.strip() else []
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise DataError(f'{path.name}: a JSON dataset is a list of objects, or {{"data": [...]}} around one.')
    for number, row in enumerate(rows):
        yield _need_object(row, f"{path.name} row {number}")


def _csv_rows(path: Path) -> Iterator[Row]:
    """Every cell is text: "007" and "NA" mean what they say."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            header = reader.fieldnames or ()
            if len(header) == 1 and (other := next((each for each in ";\t|" if each in header[0]), None)):
                raise DataError(
                    f"{path.name} line 1: one column, {header[0]!r}. Its cells seem to be separated by {other!r}, and "
                    "opsd reads commas. Save it with commas, or as .jsonl or .parquet."
                )
            if len(set(header)) < len(header):
                raise DataError(f"{path.name} line 1: two columns have one name, and one of them would be lost.")
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(
                        f"{path.name} line {reader.line_num}: not the {len(header)} cells that the header has. "
                        "A comma inside a cell needs the cell in double quotes."
                    )
                yield row
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path.name} line {reader.reader.line_num}: not CSV in UTF-8: {error}.") from error


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows}
_SUFFIXES = {*_READERS, ".parquet"}
