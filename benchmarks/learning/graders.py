"""Graders of the experiments, named in a run file as `benchmarks.learning.graders:NAME`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from opsd.evaluation import load_grader

LEAST_WORDS = 5  # of a sentence
KEY = "answer"

_contains = load_grader("contains")


def json_reply(text: str, row: Mapping[str, Any]) -> bool:
    """Return whether the text is `{"answer": "…"}` and nothing else, with the right answer in it."""
    reply = _reply_of(text)
    return reply is not None and bool(_contains(reply, row))


def json_form(text: str) -> bool:
    """Return whether the text is `{"answer": "…"}` and nothing else, with any answer in it."""
    return bool(_reply_of(text))


def _reply_of(text: str) -> str | None:
    try:
        reply = json.loads(text)
    except ValueError:
        return None
    return str(reply[KEY]).strip() if isinstance(reply, dict) and list(reply) == [KEY] else None


def sentence(text: str, row: Mapping[str, Any]) -> bool:
    """Return whether the text is at least five words long and has the word that was asked for."""
    words = re.findall(r"[a-z]+", text.lower())
    return row["answer"] in words and len(words) >= LEAST_WORDS
