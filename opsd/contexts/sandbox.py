"""Jinja's own sandbox, set up for prompts.

The sandbox refuses unsafe attributes and changes to values, and limits `range` to MAX_RANGE items. It does not limit
what a template computes. Time and memory are limited in the child process of trial.py, on the first use of a template
only, and every rendering is capped at MAX_CHARS. So a template that is harmless on the row it is tried with and spends
on a later row is bounded by that cap and MAX_RANGE alone: there, nested loops can stall the process that trains, and
`'x' * 10 ** 9` can exhaust its memory. Read a template that opsd does not ship before you train with it.
"""

from __future__ import annotations

from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from opsd.contexts.filters import FILTERS, as_text

MAX_CHARS = 1_000_000  # of one block; about 250,000 tokens, longer than any prompt


def sandboxed_environment(loader: jinja2.BaseLoader) -> ImmutableSandboxedEnvironment:
    """Return a Jinja environment for templates of any origin.

    Args:
        loader: finds parents and includes.
    """
    environment = ImmutableSandboxedEnvironment(
        loader=loader,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
        optimized=False,  # or Jinja computes constant expressions when it compiles, before any limit holds
    )
    environment.filters |= FILTERS
    environment.globals.pop("lipsum", None)  # random text: a prompt would differ from one run to the next
    return environment


@jinja2.pass_context  # keeps Jinja from computing constant output when it compiles
def _finalize(context: jinja2.runtime.Context, value: Any) -> Any:
    """Return the text of an expression's value; Jinja itself refuses an undefined one."""
    return value if isinstance(value, jinja2.Undefined) else as_text(value)
