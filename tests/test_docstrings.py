"""Examples in docstrings are run."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "opsd"
ROOMS = ("evaluation",)  # rooms whose examples need nothing but imports of their own module
MODULES = [path for room in ROOMS for path in sorted((PACKAGE / room).glob("*.py")) if ">>> " in path.read_text()]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_the_examples_of_a_module_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"opsd.{path.parent.name}.{path.stem}")
    examples = [test for test in doctest.DocTestFinder().find(module) if test.examples]
    if "Mathematics" in "".join(example.source for test in examples for example in test.examples):
        pytest.importorskip("math_verify")
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for test in examples:
        runner.run(test)
    assert runner.tries and not runner.failures
