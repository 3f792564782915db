"""Finds the templates and recipes that travel with opsd: in a wheel, an editable install or a bare checkout.

Knows folders and file names only; what is inside a template or a recipe is read elsewhere.
"""

from __future__ import annotations

from pathlib import Path

SUFFIX = {"templates": ".jinja", "teachers": ".yaml"}


def folder(kind: str) -> Path:
    """Return the folder of shipped files of one kind.

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
