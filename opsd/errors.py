"""Every error and warning that opsd raises on purpose, in one tree.

Each error is also the standard one it resembles, so `except ValueError` keeps working. A message says three things:
the rule that was broken, why the rule exists, and the way out. `assert` is for our own invariants, never for input.

    OPSDError
    ├── ConfigError             (ValueError)          a setting, or a combination of settings, that cannot work
    ├── DataError               (ValueError)          a dataset, a row or a column
    │   └── LengthError                               a prompt that is too long
    ├── TemplateError           (ValueError)          a template: its syntax, its fields, its use
    │   └── UnsafeTemplateError                       it leaves the sandbox, or spends too much
    ├── TokenizerMismatchError  (ValueError)          student and teacher do not mean the same by the same ids
    ├── UnsupportedModelError   (TypeError)           a model whose head or forward pass opsd cannot reproduce
    ├── TeacherError            (TypeError)           a teacher class, or what its methods return, breaks the interface
    ├── AlignmentError          (RuntimeError)        student and teacher did not score the same tokens
    ├── NonFiniteLossError      (FloatingPointError)  NaN or infinity before the backward pass
    └── CheckpointError         (RuntimeError)        a checkpoint or an output folder that cannot be used
    OPSDWarning                 (UserWarning)         allowed, but probably not what was meant
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Mapping
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

ELEMENTS = {str: "texts", float: "numbers (in YAML 1.0e-1, with the dot)", int: "whole numbers"}  # as errors call them


class OPSDError(Exception):
    """The root of all errors raised by opsd."""


class ConfigError(OPSDError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(OPSDError, ValueError):
    """A dataset, a row or a column that training cannot use."""


class LengthError(DataError):
    """A row whose prompt leaves no room for a completion, or exceeds its context's max_prompt_tokens."""


class TemplateError(OPSDError, ValueError):
    """A template that does not parse, cannot be rendered for a row, or adds nothing to the student's prompt."""


class UnsafeTemplateError(TemplateError):
    """A template that reaches for what it may not touch, or spends more than a prompt could need."""


class TokenizerMismatchError(OPSDError, ValueError):
    """Student and teacher do not mean the same tokens by the same ids."""


class UnsupportedModelError(OPSDError, TypeError):
    """A model whose logits opsd cannot reproduce from its last hidden states and its head."""


class TeacherError(OPSDError, TypeError):
    """A teacher class that lacks a method, or whose method returned something that cannot be used."""


class AlignmentError(OPSDError, RuntimeError):
    """Student and teacher did not score the same tokens."""


class NonFiniteLossError(OPSDError, FloatingPointError):
    """The loss was NaN or infinite; nothing was updated by it."""


class CheckpointError(OPSDError, RuntimeError):
    """A checkpoint or an output folder that cannot be used."""


class OPSDWarning(UserWarning):
    """A setting that is allowed and is probably not what was meant."""


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


def list_settings(settings: type) -> dict[str, type]:
    """Return the fields of a dataclass that take a list and nothing else, each with the type of its elements."""
    lists: dict[str, type] = {}
    for name, hint in get_type_hints(settings).items():
        options = {*get_args(hint)} - {NoneType} if get_origin(hint) in (Union, UnionType) else {hint}
        option = options.pop()
        if not options and get_origin(option) is list:
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


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known name nearest to `name`, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def not_one_of(name: str, value: str, known: Iterable[str]) -> str:
    """Return the message for a setting that takes one of a few words."""
    known = list(known)
    return f"{name} is {value!r}, and must be one of {', '.join(known)}.{did_you_mean(value, known)}"
