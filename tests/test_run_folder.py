"""Files of a run's folder are written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opsd.evaluation.run_folder import write_json


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    for values in ({"accuracy": 0.25}, {"accuracy": 0.5, "name": "é"}):
        write_json(path, values)
        assert json.loads(path.read_text("utf-8")) == values
    assert "é" in path.read_text("utf-8") and [each.name for each in path.parent.iterdir()] == ["results.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk may be full, and a value may not be JSON."""
    path = tmp_path / "results.json"
    write_json(path, {"accuracy": 0.25})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"accuracy": 0.5, "folder": tmp_path})

    def full(self: Path, text: str, encoding: str) -> None:
        with self.open("w", encoding=encoding) as file:
            file.write(text[:5])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"accuracy": 0.5})
    assert json.loads(path.read_text("utf-8")) == {"accuracy": 0.25}


def test_what_is_not_plain_is_made_plain_where_asked(tmp_path: Path) -> None:
    write_json(tmp_path / "card.json", {"folder": Path("runs")}, default=str)
    assert json.loads((tmp_path / "card.json").read_text()) == {"folder": "runs"}
