"""Renders the pages: Jinja with escaping, one style, no request to anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from opsd import __version__
from opsd.health.tokens import printable

PAGES = Path(__file__).parent / "pages"


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
    own = {name: Markup((PAGES / name).read_text("utf-8")) for name in ("style.css", "heatmap.js", "watch.js")}
    return (
        _environment()
        .get_template(name)
        .render(style=own["style.css"], script=own["heatmap.js"], watch=own["watch.js"], version=__version__, **values)
    )
