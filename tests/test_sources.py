"""What a name stands for: hub ids, and objects of modules in the current folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from opsd.errors import ConfigError
from opsd.sources import import_object, is_hub_id, is_object_name


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("organisation/name-1.5", "hub id"),
        ("organisation/model/file", None),
        ("./folder", None),
        ("../folder", None),
        ("name", None),
        ("module:Class", "object"),
        ("package.module:function", "object"),
        ("module:", None),
        (":name", None),
        ("C:\\models", None),
        ("regex:Answer: (\\w+)", None),
        ("organisation/name:x", None),
    ],
)
def test_a_name_has_one_form(name: str, kind: str | None) -> None:
    assert (is_hub_id(name), is_object_name(name)) == (kind == "hub id", kind == "object")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_a_module_is_found_in_the_current_folder(here: Path) -> None:
    (here / "module_of_this_folder.py").write_text("VALUE = 7\n")
    assert import_object("module_of_this_folder:VALUE", "number") == 7


def test_a_file_of_the_current_folder_hides_no_installed_module(here: Path) -> None:
    (here / "wave.py").write_text("open = None\n")
    sys.modules.pop("wave", None)
    assert import_object("wave:open", "function") is not None


@pytest.mark.parametrize("name", ["no_such_module:f", "math:no_such_name"])
def test_what_cannot_be_imported_is_refused_with_both_names_and_the_folder(here: Path, name: str) -> None:
    module, _, attribute = name.partition(":")
    rule = f"reward function '{name}' means '{attribute}' of the module '{module}'"
    with pytest.raises(ConfigError, match=rule) as error:
        import_object(name, "reward function")
    assert str(here) in str(error.value) and "Check both names" in str(error.value)


def test_a_misspelt_prefix_is_named() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'regex'"):
        import_object("regx:f", "grader", ["regex"])
