"""What may be looked up on a hub: "organisation/name" and nothing else, so that a slip never leaves the machine."""

from __future__ import annotations

import re

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_id(name: str) -> bool:
    """Tell whether a name has the form of a hub id and is not a relative path."""
    return _HUB_ID.fullmatch(name) is not None and not name.startswith(".")
