"""Columns under the names that other systems give them: one mapping from our names to theirs.

Knows names and nested values; what a row must hold is the business of `rows.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from datasets import Dataset, IterableDataset

from opsd.data.json_columns import as_stored
from opsd.data.values import at_path, is_empty
from opsd.errors import ConfigError, DataError, did_you_mean

# Our column -> theirs, the first of several that a dataset has; a dot reaches into a nested column. What is not named
# here keeps its name. GKD's `messages` need no mapping.
FORMATS: dict[str, dict[str, tuple[str, ...]]] = {
    # SDFT of TRL 1.16: rows of `prompt` and `privileged_context`, text or messages
    "trl": {"prompt": ("prompt",), "privileged_context": ("privileged_context",)},
    # GKD of ms-swift: `teacher_prompt` takes the place of the last user turn
    "ms-swift": {"messages": ("messages",), "teacher_prompt": ("teacher_prompt",)},
    # verl's parquet: the answer stands in `reward_model`, for GSM8K the worked solution in `extra_info`
    "verl": {
        "prompt": ("prompt",),
        "answer": ("reward_model.ground_truth",),
        "solution": ("extra_info.solution", "extra_info.answer"),
    },
    # prime-rl's opsd: `demo_key` names an entry of `info` or of the task's own columns
    "prime-rl": {
        "prompt": ("prompt", "question"),
        "demonstration": ("info.demonstration", "info.demo", "demonstration", "demo"),
        "answer": ("answer", "info.answer"),
    },
}
LOOKED_AT = 256  # rows, of which some may leave a column empty
# Without these a dataset is not of the format that was named.
_REQUIRED = {"trl": "privileged_context", "ms-swift": "teacher_prompt", "verl": "answer", "prime-rl": "demonstration"}


def import_columns(dataset: Any, columns: str | Mapping[str, str] | None) -> Dataset | IterableDataset:
    """Return the dataset with columns under opsd's names.

    Args:
        dataset: map-style or streaming.
        columns: a format of `FORMATS`, {our name: their name or dotted path}, or None for names that fit already.

    Raises:
        ConfigError: no such format.
        DataError: the first row has nothing under a name.
    """
    if columns is None:
        return dataset
    if isinstance(columns, str) and columns not in FORMATS:
        raise ConfigError(
            f"no format is called {columns!r}.{did_you_mean(columns, FORMATS)} Formats: {', '.join(FORMATS)}; or say "
            "which column is which: {answer: reward_model.ground_truth}."
        )
    head: list[Mapping[str, Any]] = list(islice(iter(dataset), LOOKED_AT))
    first = head[0] if head else {}
    sources = _sources(columns, head)
    # A question that stands alone is what a chat's user says.
    asks = isinstance(columns, str) and sources.get("prompt") == "question" and isinstance(first.get("question"), str)

    def renamed(row: dict[str, Any]) -> dict[str, Any]:
        found = {ours: at_path(row, theirs) for ours, theirs in sources.items()}
        if asks:
            found["prompt"] = [{"role": "user", "content": found["prompt"]}]
        return as_stored(found, dataset.features)

    if all(ours == theirs for ours, theirs in sources.items()):
        return dataset
    gone = [theirs for ours, theirs in sources.items() if ours != theirs and theirs in first]
    cache = {"load_from_cache_file": False} if isinstance(dataset, Dataset) else {}
    return dataset.map(renamed, remove_columns=gone, **cache)


def _sources(columns: str | Mapping[str, str], head: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return {ours: theirs} for the columns that one of the first rows has."""
    wanted: Mapping[str, tuple[str, ...]]
    if isinstance(columns, Mapping):
        wanted = {ours: (theirs,) for ours, theirs in columns.items()}
        required = set(wanted)
    else:
        wanted, required = FORMATS[columns], {_REQUIRED[columns]}
    found, has = {}, list(head[0]) if head else []
    for ours, candidates in wanted.items():
        theirs = next((path for path in candidates if any(not is_empty(at_path(row, path)) for row in head)), None)
        if theirs is not None:
            found[ours] = theirs
        elif ours in required:
            raise DataError(
                f"columns={columns!r} finds {ours!r} under {' or '.join(map(repr, candidates))}, and the first rows "
                f"have none of these. They have: {', '.join(has)}.{did_you_mean(candidates[0], has)}"
            )
    return found
