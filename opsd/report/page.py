"""Renders the pages: Jinja with escaping, one style, no request to anywhere."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from opsd import __version__

PAGES = Path(__file__).parent / "pages"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(PAGES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["drawing"] = Markup  # an SVG of our own charts, whose library escapes what it writes
    return environment


def render(name: str, **values: Any) -> str:
    """Return a page as HTML, with its style and script inside.

    Args:
        name: a template in `pages/`.
        values: what it shows; text is escaped, and only Markup is not.
    """
    own = {name: Markup((PAGES / name).read_text("utf-8")) for name in ("style.css", "heatmap.js")}
    return (
        _environment()
        .get_template(name)
        .render(style=own["style.css"], script=own["heatmap.js"], version=__version__, **values)
    )
