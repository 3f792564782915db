"""Columns that `datasets` stores as JSON: how a text must be given so that the same text is read back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from datasets import Features, Json


def as_stored(row: Mapping[str, Any], features: Features | None) -> dict[str, Any]:
    """Return a row as `datasets` must be given it, so that a text in a Json column is read back as that text.

    It takes a text there for JSON already: "007" would come back as the number 7, and "null" as None.

    Args:
        row: a row.
        features: of the dataset that stores it; None where they are not known.

    Example:
        >>> as_stored({"steps": "007"}, Features({"steps": Json()}))
        {'steps': '"007"'}
    """
    columns = [column for column, feature in (features or {}).items() if isinstance(feature, Json)]
    texts = {column: json.dumps(row[column]) for column in columns if isinstance(row.get(column), str)}
    return {**row, **texts}
