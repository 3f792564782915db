"""Scores in a folder: written once in shards, found again by the ids of prompt and completion.

A folder has `manifest.json`, which says what scored, and `scores-NNNNNN.parquet`. A shard is written whole or not at
all, so that a run that is killed goes on behind the last one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from opsd.errors import CheckpointError, ConfigError
from opsd.serving.answers import Asked, TokenScores

MANIFEST = "manifest.json"
SHARD = "scores-{:06d}.parquet"
GROUP = 16  # sequences that are read together
GROUPS_KEPT = 64  # in memory
BYTES_PER_ENTRY, BYTES_PER_TOKEN = 8, 4  # an id and a log-probability; the token's own
SCHEMA = pa.schema(
    [
        ("key", pa.binary(16)), ("ids", pa.list_(pa.int32())), ("logprobs", pa.list_(pa.float32())),
        ("sampled", pa.list_(pa.float32())),
    ]
)  # fmt: skip


def key_of(asked: Asked) -> bytes:
    """Return a hash of a sequence and of where its scored tokens begin."""
    ids = np.array([asked.start, *asked.ids], dtype=np.int64)
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


def megabytes(tokens: int, top_k: int) -> float:
    """Return what the scores of so many tokens take at most, in MB (10⁶ bytes)."""
    return tokens * (top_k * BYTES_PER_ENTRY + BYTES_PER_TOKEN) / 1e6


class ScoreStore:
    """Scores in a folder.

    >>> store = ScoreStore.open(Path("scores"))
    >>> store.find(Asked((5, 9, 2), 1))  # a TokenScores, or None

    Args:
        folder: of the scores.
        manifest: what scored.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]):
        self.folder, self.manifest = folder, dict(manifest)
        self._places: dict[bytes, tuple[Path, int]] = {}  # key -> shard, and row in it
        for path in sorted(folder.glob("scores-*.parquet")):
            self._index(path)
        self._group = lru_cache(maxsize=GROUPS_KEPT)(self._read_group)

    @classmethod
    def open(cls, folder: Path) -> ScoreStore:
        """Return the scores in a folder.

        Raises:
            CheckpointError: it has none, or they are damaged.
        """
        try:
            manifest = orjson.loads((folder / MANIFEST).read_bytes())
            int(manifest["top_k"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{folder} has no scores: its {MANIFEST} cannot be read ({error}). Write them: opsd score ROLLOUTS "
                f"--teacher … -o {folder}."
            ) from error
        return cls(folder, manifest)

    @classmethod
    def begin(cls, folder: Path, manifest: Mapping[str, Any], shown: str = "") -> ScoreStore:
        """Return the scores in a folder, to go on with; an empty folder gets this manifest.

        Args:
            folder: of the scores.
            manifest: what scores, in values that are the same when scoring goes on.
            shown: the same in words, which are not compared.

        Raises:
            ConfigError: it has scores of something else.
        """
        path = folder / MANIFEST
        if path.is_file():
            store = cls.open(folder)
            changed = [name for name in manifest if store.manifest.get(name) != manifest[name]]
            if changed:
                name = changed[0]
                raise ConfigError(
                    f"{folder} has scores of another {name}: {store.manifest.get(name)!r}, and now it is "
                    f"{manifest[name]!r}. Scores of two kinds cannot be told apart later. Choose another folder."
                )
            return store
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{MANIFEST}")
        written = {**manifest, "shown": shown}
        temporary.write_bytes(orjson.dumps(written, option=orjson.OPT_INDENT_2))
        temporary.replace(path)
        return cls(folder, written)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, asked: Asked) -> bool:
        return key_of(asked) in self._places

    @property
    def top_k(self) -> int:
        """Likeliest tokens of each place."""
        return int(self.manifest["top_k"])

    def find(self, asked: Asked) -> TokenScores | None:
        """Return the scores of a sequence; None where they are not here."""
        found = self._places.get(key_of(asked))
        if found is None:
            return None
        path, row = found
        table = self._group(path, row // GROUP)
        values = {name: table[name][row % GROUP].values.to_numpy() for name in ("ids", "logprobs", "sampled")}
        shape = (len(values["sampled"]), self.top_k)
        return TokenScores(
            values["ids"].astype(np.int64).reshape(shape), values["logprobs"].reshape(shape), values["sampled"]
        )

    def write(self, scored: Sequence[tuple[Asked, TokenScores]]) -> None:
        """Write a shard."""
        rows = [
            {
                "key": key_of(asked), "ids": scores.ids_TK.reshape(-1), "logprobs": scores.logprobs_TK.reshape(-1),
                "sampled": scores.sampled_T,
            }
            for asked, scores in scored
        ]  # fmt: skip
        numbers = [int(path.stem.rpartition("-")[2]) for path in self.folder.glob("scores-*.parquet")]
        path = self.folder / SHARD.format(max(numbers, default=-1) + 1)  # one may have been removed in between
        temporary = path.with_name(f".{path.name}")
        try:
            table = pa.Table.from_pylist(rows, schema=SCHEMA)
            pq.write_table(table, temporary, compression="zstd", row_group_size=GROUP)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        self._index(path)

    def _index(self, path: Path) -> None:
        try:
            keys = pq.read_table(path, columns=["key"])["key"].to_pylist()
        except (OSError, pa.ArrowInvalid) as error:
            raise CheckpointError(
                f"the scores {path} are damaged ({error}). Remove that file and score again: the others are kept."
            ) from error
        self._places |= {key: (path, row) for row, key in enumerate(keys)}

    def _read_group(self, path: Path, group: int) -> Any:
        with pq.ParquetFile(path) as file:
            return file.read_row_group(group)
