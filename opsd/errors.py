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
    ├── NonFiniteLossError      (FloatingPointError)  NaN or infinity, before anything is updated
    ├── ServerError             (RuntimeError)        a server that does not answer, or refuses a request
    │   └── AnswerError                               an answer that cannot be true
    └── CheckpointError         (RuntimeError)        a checkpoint or an output folder that cannot be used
    OPSDWarning                 (UserWarning)         allowed, but probably not what was meant
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
    """The loss, or logits that a token is drawn from, were NaN or infinite; nothing was updated by them."""


class ServerError(OPSDError, RuntimeError):
    """A server that does not answer, or that refuses a request."""


class AnswerError(ServerError):
    """An answer of a server that breaks its protocol or cannot be true; it is never used."""


class CheckpointError(OPSDError, RuntimeError):
    """A checkpoint or an output folder that cannot be used."""


class OPSDWarning(UserWarning):
    """A setting that is allowed and is probably not what was meant."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known name nearest to `name`, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def not_one_of(name: str, value: str, known: Iterable[str]) -> str:
    """Return the message for a setting that takes one of a few words."""
    known = list(known)
    return f"{name} is {value!r}, and must be one of {', '.join(known)}.{did_you_mean(value, known)}"
