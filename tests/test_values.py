"""Single values of a row: nested paths, emptiness, the text of a message; and that nothing heavy is imported."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from opsd import contexts
from opsd.data.values import at_path, is_empty, is_missing, text_of, without_nan
from opsd.errors import DataError

FILES = Path(contexts.__file__).parent.glob("[a-z]*.py")


def test_dotted_paths_reach_into_nested_columns_also_where_they_are_kept_as_json() -> None:
    row = {"a": {"b": {"c": 1}}, "info": '{"demo": "d"}', "x.y": 2, "broken": "{no"}
    assert [at_path(row, path) for path in ("a.b.c", "info.demo", "x.y", "a.z", "broken.x", "none")] == [
        1, "d", 2, None, None, None,
    ]  # fmt: skip


NAN = float("nan")


def test_empty_is_none_nan_blank_or_without_items_that_are_not() -> None:
    assert all(
        map(is_empty, (None, NAN, np.float32("nan"), np.datetime64("NaT"), pd.NA, pd.NaT, "", " \n", [], {}, ()))
    )
    assert all(map(is_empty, ([None], [NAN, ""], {"truth": NAN}, {"a": [{"b": None}]})))
    assert not any(map(is_empty, (0, False, "x", "nan", 0.0, np.float32(0), ["", 0], {"a": None, "b": 1})))


def test_nan_becomes_none_at_every_depth_and_nothing_else_changes() -> None:
    value = {"a": [1, NAN, {"b": NAN, "c": "nan"}], "d": (NAN, "")}
    assert without_nan(value) == {"a": [1, None, {"b": None, "c": "nan"}], "d": [None, ""]}
    whole = {"a": [1, None, {"b": 0.0}], "d": (True, "")}
    assert without_nan(whole) is whole
    assert [is_missing(each) for each in (None, NAN, pd.NA, "", [], 0)] == [True, True, True, False, False, False]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("Hi", "Hi"),
        (None, ""),  # a turn that only calls a tool
        ([], ""),
        ([{"type": "text", "text": "1 + "}, {"text": "1"}], "1 + 1"),
    ],
)
def test_a_message_has_one_text(content: Any, text: str) -> None:
    assert text_of({"role": "user", "content": content}) == text


@pytest.mark.parametrize("content", [3, [{"type": "image", "text": "x.png"}], ["Hi"], [{"type": "text", "text": None}]])
def test_a_message_that_is_not_text_is_refused(content: Any) -> None:
    with pytest.raises(DataError, match="trains on text only"):
        text_of({"role": "user", "content": content})


def test_what_the_child_imports_to_try_a_template_is_light() -> None:
    """The child has 512 MB of address space and would die of importing datasets, torch or transformers."""
    code = (
        "import sys, opsd.contexts.trial, opsd.contexts.template, opsd.contexts.messages, opsd.data.values\n"
        "assert not {'datasets', 'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["opsd.data.values", *sorted(f"opsd.contexts.{path.stem}" for path in FILES)])
def test_the_examples_in_the_docstrings_are_true(module: str) -> None:
    assert doctest.testmod(importlib.import_module(module)).failed == 0
