"""Renders the pages: Jinja with escaping, one style, no request to anywhere."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from opsd import __version__
from opsd.health.text import printable

PAGES = Path(__file__).parent / "pages"
SCRIPTS = ("heatmap.js", "watch.js")


@dataclass(frozen=True)
class Table:
    """A table of a page.

    >>> Table("With its controls", ["", "gain"], [["method", "+27.5"]], ["method beat its control (sft)"])

    Args:
        title: above it.
        head: of the columns.
        rows: cells.
        notes: lines below it.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(PAGES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=_shown,
    )  # fmt: skip
    environment.filters["drawing"] = Markup  # an SVG of our own charts, whose library escapes what it writes
    return environment


def _shown(value: Any) -> Any:
    """Return text without control characters; markup is our own."""
    return printable(value, keep="\n") if isinstance(value, str) and not isinstance(value, Markup) else value


def render(name: str, **values: Any) -> str:
    """Return a page as HTML, with its style and script inside.

    Args:
        name: a template in `pages/`.
        values: what it shows; text is escaped, and only Markup is not.
    """
    own = {script: (PAGES / script).read_text("utf-8") for script in SCRIPTS}
    # A page runs these scripts and no other, whatever stands in its text.
    hashes = (b64encode(sha256(text.encode()).digest()).decode() for text in own.values())
    shared = {
        "style": Markup((PAGES / "style.css").read_text("utf-8")),
        "script": Markup(own["heatmap.js"]),
        "watch": Markup(own["watch.js"]),
        "allowed": Markup(" ".join(f"'sha256-{each}'" for each in hashes)),
        "version": __version__,
    }
    return _environment().get_template(name).render(**shared, **values)
