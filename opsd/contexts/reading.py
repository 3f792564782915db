"""Turns a name, path, mapping, object or None into a context: the one place that knows all kinds of context."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from opsd.contexts.base import Context, check_keys
from opsd.contexts.privileged import as_plain_context
from opsd.contexts.schedule import ContextSchedule
from opsd.errors import ConfigError
from opsd.settings import parse_yaml


def as_context(value: Any) -> Context | None:
    """Return the context that a user means.

    Args:
        value: a shipped template's name, a path, a mapping of arguments, a context, or None for the student's own
            prompt. A mapping with the key "levels" is a schedule.

    Raises:
        ConfigError: another type, an unknown key, or a mapping without "template" or "levels".
        TemplateError: no such template, or one that cannot work.

    Example:
        >>> as_context("answer_only").name
        'answer_only'
        >>> as_context({"levels": ["worked_solution", "none"], "until_step": {"worked_solution": 100}}).name
        'schedule of worked_solution, none'
    """
    if value is None or isinstance(value, Context):
        return value
    if not (isinstance(value, Mapping) and "levels" in value):
        return as_plain_context(value)
    if "fallback" in value:
        raise ConfigError(
            "a schedule has no setting 'fallback': a row that lacks a column of its level gets the next level in the "
            "order of `levels` that it can fill. Put the levels in that order, and leave fallback out."
        )
    check_keys(value, ContextSchedule)
    return ContextSchedule(**value)


def parse_context(text: str | None) -> Context | None:
    """Return the context of a command-line option: a name, a path, "none", or a mapping as JSON.

    Raises:
        ConfigError: as `as_context`, or text that begins as JSON and is none.
    """
    if text is None or text == "none":
        return None
    if not text.lstrip().startswith("{"):
        return as_context(text)
    try:
        return as_context(parse_yaml(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"a context that begins with '{{' is read as a mapping, and is none: {error}") from error
