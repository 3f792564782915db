"""Reads settings: YAML files, and values by the type that a setting takes.

Knows types; which settings there are and in which range they may lie is said beside the classes that have them.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Hashable, Mapping
from enum import Enum
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from opsd.errors import ConfigError, not_one_of

WITH_THE_DOT = "in YAML 1.0e-1, with the dot"
ELEMENTS = {str: "texts", float: f"numbers ({WITH_THE_DOT})", int: "whole numbers"}  # as errors call them
WORDS = {
    bool: "true or false", int: "a whole number", float: f"a number ({WITH_THE_DOT})", str: "a text",
    dict: "a mapping, such as {key: value}", list: "a list, such as [first, second]",
}  # fmt: skip
PLAIN = (bool, int, float, str, list, tuple, dict)  # what YAML and a shell can give


# ---- files ----------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML in which no key stands twice: PyYAML keeps the last of two without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} stands twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Return what a YAML text says.

    Raises:
        yaml.YAMLError: it is invalid, or a mapping in it has a key twice.
    """
    return yaml.load(text, _Loader)  # a SafeLoader


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        ConfigError: the file is missing, is invalid YAML (with line and column), or holds no mapping.
    """
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} could not be read: {error.strerror}.{looked_in(path)}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping (`key: value` lines), and holds {type(content).__name__}.")
    return content


def looked_in(path: str | Path) -> str:
    """Return where a path that leads nowhere was looked for, to end an error with."""
    if Path(path).is_absolute():
        return " Check the path."
    return f" Relative paths start in the folder that opsd is called in: looked for {Path(path).absolute()}."


# ---- values ---------------------------------------------------------------------------------------------------------


def as_number(name: str, value: Any) -> float:
    """Return a setting that must be a number; YAML reads 1e-1 as text, for it wants 1.0e-1.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{name} must be a number, and is {value!r}. In YAML write 1.0e-1, with the dot.")
    return float(value)


def as_count(name: str, value: Any) -> int:
    """Return a setting that must be a whole number of at least 1.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1, and is {value!r}.")
    return value


def as_list(name: str, value: Any, element: Any = str) -> Any:
    """Return a setting that is a list: one element alone becomes a list of it, and None stays None.

    A text where a list is meant would be read letter by letter.

    Args:
        name: of the setting.
        value: what the user gave.
        element: the type of an element.

    Raises:
        ConfigError: neither a list nor an element, or a list that holds something else.

    Example:
        >>> as_list("mask_tokens", "<|im_end|>")
        ['<|im_end|>']
    """
    if value is None:
        return None
    is_list = isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping)
    accepted = {float: Real, int: Integral, tuple: list | tuple}.get(element, element)
    for each in value if is_list else (value,):
        if not isinstance(each, accepted) or (isinstance(each, bool) and element is not bool):
            raise ConfigError(
                f"{name} is a list of {ELEMENTS.get(element, element.__name__)}, and {each!r} is none: a text in place "
                f"of a list would be read letter by letter. Write {name}: [first, second]."
            )
    return value if is_list else [value]


# ---- fields of a dataclass ------------------------------------------------------------------------------------------


@cache
def types_of(settings: type) -> dict[str, tuple[Any, ...]]:
    """Return the fields of a dataclass, each with the types that it takes."""
    hints = get_type_hints(settings)
    return {
        name: get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        for name, hint in hints.items()
        if get_origin(hint) is not None or isinstance(hint, type | UnionType)
    }


@cache
def list_settings(settings: type) -> dict[str, type]:
    """Return the fields of a dataclass that take a list and nothing else, each with the type of its elements."""
    lists: dict[str, type] = {}
    for name, types in types_of(settings).items():
        option, *others = {*types} - {NoneType}
        if not others and get_origin(option) is list:
            (element,) = get_args(option)
            lists[name] = get_origin(element) or element
    return lists


def read_lists(settings: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values of a dataclass's fields, with a list for each field that takes one.

    Raises:
        ConfigError: as `as_list`.
    """
    lists = list_settings(settings)
    return {name: as_list(name, value, lists[name]) if name in lists else value for name, value in values.items()}


def read_values(settings: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values of a dataclass's fields, each in a type that its field takes.

    A list may be given as its one element, a mapping as the text of one, a whole number as 1.0e+3, a number as 1e-3,
    which YAML reads as text; and `no`, which YAML reads as false, is the word again where a setting takes words.

    Raises:
        ConfigError: a value that is of none of its field's types.

    Example:
        >>> from trl import ModelConfig
        >>> read_values(ModelConfig, {"lora_r": 8.0, "lora_target_modules": "q_proj"})
        {'lora_r': 8, 'lora_target_modules': ['q_proj']}
    """
    types = types_of(settings)
    return {
        name: _read_value(name, value, types[name]) if name in types else value
        for name, value in read_lists(settings, values).items()
    }


def _read_value(name: str, value: Any, types: tuple[Any, ...]) -> Any:
    kinds = {get_origin(each) or each for each in types} - {NoneType}
    words = [each for each in kinds if isinstance(each, type) and issubclass(each, Enum)]
    if isinstance(value, str) and dict in kinds and value.lstrip().startswith("{"):
        return _mapping_in(name, value)
    if value is False and words and "no" in [member.value for member in words[0]]:
        return "no"
    if isinstance(value, str) and str not in kinds and not words:
        value = _written(value)
    if isinstance(value, float) and int in kinds and float not in kinds and value.is_integer():
        return int(value)
    if isinstance(value, str) and words and value not in (known := [member.value for member in words[0]]):
        raise ConfigError(not_one_of(name, value, known))
    if value is None or not isinstance(value, PLAIN) or any(_is_of(value, each) for each in types):
        return value
    accepted = " or ".join(text for kind, text in WORDS.items() if kind in kinds)
    raise ConfigError(f"{name} takes {accepted}, and is {value!r:.80}.")


def _written(text: str) -> Any:
    """Return the number or the truth value that a text writes, or the text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return float(text) if re.search(r"[.eEn]", text) else int(text)  # n: nan and inf
    except ValueError:
        return text


def _is_of(value: Any, kind: Any) -> bool:
    """Tell whether a plain value is of a type; True and False are no numbers."""
    kind = get_origin(kind) or kind
    if kind is Literal or not isinstance(kind, type):
        return True  # checked where it is used
    if isinstance(value, bool):  # transformers says text where it also takes true: fsdp, resume_from_checkpoint
        return kind in (bool, str)
    accepted: dict[type, Any] = {float: Real, str: str | os.PathLike, list: list | tuple, dict: Mapping}
    return isinstance(value, accepted.get(kind, kind))


def _mapping_in(name: str, text: str) -> dict[str, Any]:
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} begins as a mapping, and is none: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must be a mapping, and is {text!r:.80}.")
    return value
