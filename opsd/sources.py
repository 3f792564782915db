"""What a name stands for: a shipped file, a hub id, or an object of a Python module.

Knows folders, file names and modules; what is inside a template, a recipe or a class is read elsewhere.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from opsd.errors import ConfigError, did_you_mean

SUFFIX = {"templates": ".jinja", "teachers": ".yaml"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_OBJECT = re.compile(r"[^\W\d][\w.]*:[^\W\d]\w*")


def folder(kind: str) -> Path:
    """Return the folder of shipped files of one kind: in a wheel, an editable install or a bare checkout.

    Args:
        kind: "templates" or "teachers".

    Raises:
        FileNotFoundError: the installation is broken.
    """
    package = Path(__file__).parent
    # A wheel carries them inside the package; in a checkout they stand beside it.
    for candidate in (package / "_shipped" / kind, package.parent / kind):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(f"opsd's own {kind}/ folder is missing from this installation: install opsd again.")


def names(kind: str) -> list[str]:
    """Return the names (without suffix) of all shipped files of one kind, sorted."""
    return sorted(path.stem for path in folder(kind).glob(f"*{SUFFIX[kind]}"))


def find(kind: str, name: str) -> Path | None:
    """Return the shipped file called `name` (with or without its suffix), or None."""
    path = folder(kind) / (name.removesuffix(SUFFIX[kind]) + SUFFIX[kind])
    return path if path.parent == folder(kind) and path.is_file() else None


def is_hub_id(name: str) -> bool:
    """Tell whether a name may be looked up on a hub: "organisation/name", and no relative path.

    Nothing else is ever looked up, so a misspelt name never leaves the machine.
    """
    return _HUB_ID.fullmatch(name) is not None and not name.startswith(".")


def is_object_name(name: str) -> bool:
    """Tell whether a name has the form "module:object"."""
    return _OBJECT.fullmatch(name) is not None


def import_object(name: str, what: str, known: Iterable[str] = ()) -> Any:
    """Return the object that "module:object" names.

    The module is looked for among the installed ones, then in the current folder. Importing it runs its code.

    Args:
        name: the two names, with a colon between them.
        what: what the object is for, as errors call it: "reward function", "teacher".
        known: prefixes that could have been meant by a misspelt module.

    Raises:
        ConfigError: there is no such module, or no such object in it.
    """
    module, _, attribute = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)  # last, so that a file here never hides an installed module
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{what} {name!r} means {attribute!r} of the module {module!r}, which cannot be imported: {error}."
            f"{did_you_mean(module, known)}\nModules are looked for among the installed ones and in the current folder "
            f"({here}). Check both names, or change into the folder of {module.partition('.')[0]}.py."
        ) from error
