"""Jinja's sandbox with a purse: what a template computes is bounded in time and in size while it is rendered.

The sandbox of Jinja bounds what a template may touch. Here loops and macros look at the clock, every text that is made
counts, and no number is large enough to ask for gigabytes. Knows Jinja only.
"""

from __future__ import annotations

import functools
import inspect
import re
import time
from collections.abc import Callable
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from opsd.contexts.filters import FILTERS, as_text

MAX_CHARS = 1_000_000  # about 250,000 tokens: not a prompt but a loop that ran away
SECONDS = 2.0  # a prompt is rendered in milliseconds
_WIDE = re.compile(r"\d{7,}|\*")  # a width or precision beyond MAX_CHARS, or one that is an argument


class Sandbox(ImmutableSandboxedEnvironment):
    """An environment for templates from anyone.

    Args:
        loader: finds parents and includes.
    """

    intercepted_binops = frozenset({"*", "+", "**", "%"})

    def __init__(self, loader: jinja2.BaseLoader):
        super().__init__(
            loader=loader,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=_written,
        )
        self.filters = {name: _bounded(name, each) for name, each in {**self.filters, **FILTERS}.items()}
        self.globals.pop("lipsum", None)
        self._written, self._deadline = 0, 0.0

    def begin(self) -> None:
        """Fill the purse, before a rendering."""
        self._written, self._deadline = 0, time.monotonic() + SECONDS

    def charge(self, characters: int) -> None:
        """Pay for text that was made, and look at the clock.

        Raises:
            OverflowError: too much was written.
            TimeoutError: too long was taken.
        """
        self._written += characters
        if self._written > MAX_CHARS:
            raise OverflowError(f"it writes more than {MAX_CHARS:,} characters")
        if time.monotonic() > self._deadline:
            raise TimeoutError(f"it takes longer than {SECONDS:g} seconds")

    def concatenated(self, *parts: Any) -> str:
        """Stand for the operator ~."""
        texts = [str(part) for part in parts]
        _check_size(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Compute `left operator right`, if the result is of a size that a prompt could need."""
        if operator == "**" and not (isinstance(left, int | float) and abs(left) <= 1e6 and abs(right) <= 50):
            raise OverflowError("a power this large is no part of a prompt")
        if operator == "%" and isinstance(left, str):
            _check_format(left)
        sizes = [len(side) for side in (left, right) if isinstance(side, str | list | tuple)]
        times = [abs(side) for side in (left, right) if isinstance(side, int)]
        if sizes and operator in "*+":
            _check_size(sum(sizes) if operator == "+" else sizes[0] * (times or [1])[0])
        return super().call_binop(context, operator, left, right)

    def call(*args: Any, **kwargs: Any) -> Any:
        """Call a function or a method, if its arguments and its answer are of a size that a prompt could need."""
        self, context, function, *given = args
        method = inspect.unwrap(function)  # the sandbox puts a function of its own around `format`
        _check_arguments(getattr(method, "__name__", ""), getattr(method, "__self__", None), given, kwargs)
        found = ImmutableSandboxedEnvironment.call(self, context, function, *given, **kwargs)
        if isinstance(found, str):
            _check_size(len(found))
        return found

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Parse, and let every turn of a loop or a macro pay for the text in it."""
        tree = super()._parse(source, name, filename)
        for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
            body: list[nodes.Node] = node.body  # type: ignore[attr-defined]
            static = sum(len(data.data) for part in body for data in _with_itself(part))
            pay = nodes.Call(
                nodes.EnvironmentAttribute("charge"), [nodes.Const(static)], [], None, None, lineno=node.lineno
            )
            body.insert(0, nodes.ExprStmt(pay, lineno=node.lineno))
        _replace_tildes(tree)
        tree.set_environment(self)
        return tree


@jinja2.pass_context  # keeps Jinja from computing constants when it compiles, before any limit holds
def _written(context: jinja2.runtime.Context, value: Any) -> Any:
    """Return an expression's value as text, paid for; what is undefined is left to Jinja."""
    if isinstance(value, jinja2.Undefined):
        return value
    text = as_text(value)
    context.environment.charge(len(text))  # type: ignore[attr-defined]
    return text


def _with_itself(node: nodes.Node) -> list[nodes.TemplateData]:
    """Return the literal texts in a node."""
    return [*([node] if isinstance(node, nodes.TemplateData) else []), *node.find_all(nodes.TemplateData)]


def _replace_tildes(tree: nodes.Template) -> None:
    """Put a call that checks sizes in the place of every `a ~ b`."""
    for node in [tree, *tree.find_all(nodes.Node)]:
        for field, value in node.iter_fields():
            if isinstance(value, nodes.Concat):
                setattr(node, field, _call_of(value))
            elif isinstance(value, list):
                value[:] = [_call_of(item) if isinstance(item, nodes.Concat) else item for item in value]


def _call_of(concat: nodes.Concat) -> nodes.Call:
    joins = nodes.EnvironmentAttribute("concatenated")
    return nodes.Call(joins, concat.nodes, [], None, None, lineno=concat.lineno)


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that refuses what would be too large."""

    @functools.wraps(function)  # Jinja's marks for what it passes go with it
    def checked(*args: Any, **kwargs: Any) -> Any:
        passed = 1 if hasattr(function, "jinja_pass_arg") else 0
        value, *rest = args[passed:] or [None]
        _check_arguments(name, value, rest, kwargs)
        found = function(*args, **kwargs)
        if isinstance(found, str):
            _check_size(len(found))
        return found

    return checked


def _check_arguments(name: str, value: Any, given: list[Any], kwargs: dict[str, Any]) -> None:
    """Refuse numbers that ask for too much, wide formats, and replacements and joins that would be too long."""
    given = [*given, *kwargs.values()]
    for number in given:
        if isinstance(number, int) and abs(number) > MAX_CHARS and name != "format":
            raise OverflowError(f"{number:,} is larger than any number that a prompt could need")
    if name in ("format", "format_map") and isinstance(value, str):
        _check_format(value)
    if name == "replace" and isinstance(value, str) and len(given) >= 2:
        _check_size(len(value) + value.count(str(given[0])) * len(str(given[1])))
    if name == "join":
        between, items = (str(given[0]) if given else "", value)
        if isinstance(value, str) and given and not isinstance(given[0], str):  # the method: the separator is its own
            between, items = value, given[0]
        if isinstance(items, list | tuple | str):
            _check_size(len(between) * len(items))


def _check_format(text: str) -> None:
    if _WIDE.search(text) and re.search(r"[%{:]", text):
        raise OverflowError("a format this wide is no part of a prompt")


def _check_size(characters: int) -> None:
    if characters > MAX_CHARS:
        raise OverflowError(f"this makes more than {MAX_CHARS:,} characters")
