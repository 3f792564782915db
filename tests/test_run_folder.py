"""Files of a run's folder are written whole or not at all."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from opsd.evaluation.run_folder import write_json


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    for values in ({"accuracy": 0.25}, {"accuracy": 0.5, "name": "é"}):
        write_json(path, values)
        assert json.loads(path.read_text("utf-8")) == values
    assert "é" in path.read_text("utf-8") and [each.name for each in path.parent.iterdir()] == ["results.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    """A disk may be full, and a value may not be JSON."""
    path = tmp_path / "results.json"
    write_json(path, {"accuracy": 0.25})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"accuracy": 0.5, "folder": tmp_path})

    (tmp_path / ".results.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space.*results\.json"):
        write_json(path, {"accuracy": 0.5})
    assert json.loads(path.read_text("utf-8")) == {"accuracy": 0.25}


def test_what_is_not_plain_is_made_plain_where_asked(tmp_path: Path) -> None:
    write_json(tmp_path / "card.json", {"folder": Path("runs")}, default=str)
    assert json.loads((tmp_path / "card.json").read_text()) == {"folder": "runs"}


# ---- writing ---------------------------------------------------------------------------------------------------------

WRITERS = {
    *("write_text", "write_bytes", "dump", "save_file", "save", "touch", "open", "savez", "copyfile", "copy"),
    "write_table",
}
# Those that write under a temporary name and rename it; the lock and the probe hold nothing that is read back.
WHOLE = {
    "evaluation/run_folder.py: write_whole",
    "training/checkpoints.py: write",
    "training/checkpoints.py: check_writable",
    "training/evaluator.py: _save",  # a result, which saves itself by `write_json`
    "training/run_lock.py: _acquire",
    "training/trainer.py: __init__",  # copies settings, no file
    "health/traces.py: write_rollouts",
    "health/log.py: append",  # a line at a time, of which a reader may miss the last
}


def writing_calls() -> Iterator[tuple[str, str]]:
    """Yield every call of three rooms that could write a file, as (file: function, name)."""
    package = Path(__file__).parents[1] / "opsd"
    for path in sorted(path for room in ("training", "health", "evaluation") for path in (package / room).glob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            where = f"{path.relative_to(package).as_posix()}: {function.name}"
            for call in ast.walk(function):
                if isinstance(call, ast.Call):
                    called = call.func
                    name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
                    reads = name == "open" and any(getattr(arg, "value", "") in ("r", "rb") for arg in call.args)
                    if name in WRITERS and not reads:
                        yield where, ast.unparse(call)


def test_every_file_of_a_run_is_written_whole_or_not_at_all() -> None:
    """A kill in the middle of evaluation.json broke the resume: whatever a run reads back goes through one writer."""
    others = [(where, call) for where, call in writing_calls() if where not in WHOLE]
    assert not others and {where for where, _ in writing_calls()} == WHOLE
