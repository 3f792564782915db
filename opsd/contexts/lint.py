"""Looks at a template before it is used: syntax, safety, fields, leaks, and where the assistant's turn begins.

Nothing is rendered in this process but what has passed in a child with limits (`vetting.py`). Knows templates, columns
and rows; nothing of models or training.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2 import meta, nodes

from opsd.contexts.base import ROLLOUT_FIELDS
from opsd.contexts.messages import turns_of
from opsd.contexts.privileged import PrivilegedContext
from opsd.contexts.renderer import PromptRenderer
from opsd.contexts.template import PROMPT_NAMES
from opsd.data.values import OTHER, WRONG, is_empty, text_of
from opsd.errors import DataError, OPSDError, TemplateError, UnsafeTemplateError, did_you_mean
from opsd.findings import Finding, listed

MADE = (*ROLLOUT_FIELDS, WRONG)
_MARKERS = re.compile(
    r"<\|[a-z_]+\|>|\[/?INST\]|</?s>|<(?:start|end)_of_turn>|^#+ ?(?:Assistant|Response):", re.MULTILINE
)
_SAMPLE = "a few words"


def lint(
    template: str,
    *,
    columns: Sequence[str] | None = None,
    rows: Sequence[Mapping[str, Any]] = (),
    renderer: PromptRenderer | None = None,
) -> list[Finding]:
    """Return what is to be said of a template.

    Args:
        template: a name or a path.
        columns: of the dataset it is meant for; None where that is not known.
        rows: some of its rows, rendered for a trial; without any, made-up values are.
        renderer: a model's tokenizer and chat template, to see where the assistant's turn begins.
    """
    try:
        context = PrivilegedContext(template)
    except OPSDError as error:
        return [Finding("syntax", "fail", str(error))]
    needs = listed(sorted(context.fields), 9) or "no column"
    found = [Finding("syntax", "pass", f"parses, with all that it extends; needs {needs}.")]
    found += _fields(context, columns)
    found += _leaks(context, rows)
    found += _boundaries(context)
    found += _trial(context, columns, rows, renderer)
    return found


def _fields(context: PrivilegedContext, columns: Sequence[str] | None) -> Iterator[Finding]:
    find = functools.partial(Finding, "fields")
    for name in sorted(context.fields | context.optional_fields):
        meant = difflib.get_close_matches(name, PROMPT_NAMES, 1, cutoff=0.8)
        if meant and (columns is None or name not in columns):
            yield find(
                "warn",
                f"{name!r} is read as a column of the dataset. Did you mean {meant[0]!r}, the student's own prompt?",
                "Mend the name, if that is meant.",
            )
    printed = set().union(*(_printed_names(tree) for tree in context.blocks.shown)) | PROMPT_NAMES
    unused = sorted((context.fields | context.optional_fields) - printed)
    if unused:
        yield find(
            "warn", f"{listed(unused)} is asked for and never shown.", "Show it ({{ name }}), or drop the question."
        )
    if not {"prompt", "messages"} & set().union(*map(meta.find_undeclared_variables, context.blocks.shown)):
        yield find(
            "warn",
            "the question is never shown: neither {{ prompt }} nor {{ messages }} stands in it.",
            "Write {{ prompt }} into the block user, unless a column holds the teacher's whole prompt.",
        )
    if columns is None:
        return
    missing = context.missing([*columns, *MADE, *(f"{OTHER}{name}" for name in columns)])
    if missing:
        names = " and ".join(" or ".join(group) for group in missing)
        hint = "".join(did_you_mean(name, columns) for group in missing for name in group)
        yield find(
            "fail",
            f"the dataset has no column {names}; it has: {listed(columns, 20)}.{hint}",
            "Rename a column, or say where it is: fields={name: column}.",
        )
    shown = context.fields | context.optional_fields
    rest = [name for name in columns if name not in {"prompt", "messages", "completion", *shown}]
    if rest and not shown & set(columns):
        told = f"it shows no column of the dataset, which has {listed(rest)}."
        yield find("warn", told, "Was {{ " + rest[0] + " }} meant?")


def _printed_names(tree: nodes.Template) -> set[str]:
    """Return the names that a template reads for more than to ask whether they are there."""
    tests = [test for test in tree.find_all(nodes.Test) if test.name in ("defined", "undefined")]
    asked = [test.node for test in tests if isinstance(test.node, nodes.Name)]
    return {name.name for name in tree.find_all(nodes.Name) if all(name is not other for other in asked)}


def _leaks(context: PrivilegedContext, rows: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    find = functools.partial(Finding, "leaks")
    privileged = context.fields | context.optional_fields
    for tree in context.blocks.shown:
        for block in tree.find_all(nodes.Block):
            outputs = block.find_all(nodes.Output)
            names = {name.name for output in outputs for name in output.find_all(nodes.Name)} & privileged
            if block.name == "assistant" and names:
                yield find(
                    "warn",
                    f"the block assistant says {listed(sorted(names))}: those are the student's own words, which its "
                    "rollout would continue, and the student never sees them.",
                    "Say it in the block user or system; the block assistant is for an opening such as <think>.",
                )
    name = re.compile(r"\{\{-?\s*(\w+)\b[^}]*\}\}")
    for number, row in enumerate(rows):
        for match in name.finditer(" ".join(text_of(turn) for turn in turns_of(row.get("prompt")))):
            if match[1] in {*privileged, *row}:
                yield find(
                    "fail",
                    f"the student's prompt in row {number} names {match[0]!r}: a prompt is data and no template, so "
                    "the student sees the placeholder, or, once it is filled in, what only the teacher should.",
                    "Take it out of the prompts; the template is what shows it to the teacher.",
                )
                return


def _boundaries(context: PrivilegedContext) -> Iterator[Finding]:
    for tree in context.blocks.shown:
        for data in tree.find_all(nodes.TemplateData):
            match = _MARKERS.search(data.data)
            if match:
                yield Finding(
                    "boundary",
                    "fail",
                    f"line {data.lineno} writes {match[0]!r} itself: turns are the chat template's business, and the "
                    "rollout would begin behind another header than the one that the model knows.",
                    "Say only what a turn says. The blocks system, user and assistant are the turns.",
                )
                return


def _trial(
    context: PrivilegedContext,
    columns: Sequence[str] | None,
    rows: Sequence[Mapping[str, Any]],
    renderer: PromptRenderer | None,
) -> Iterator[Finding]:
    """Render some rows, first in a child with limits."""
    made = dict.fromkeys(MADE, _SAMPLE)
    made_up = {name: _SAMPLE for name in context.fields | context.optional_fields}
    tried = rows or [{**made_up, "prompt": [{"role": "user", "content": "What is it?"}]}]
    done = 0
    for number, row in enumerate(tried):
        gaps = [name for name in context.fields if name not in made and is_empty(row.get(name))]
        if rows and gaps:
            continue  # said of the columns, or counted below
        try:
            prompt, prefill = context.messages(row, made, side=renderer)
            if renderer is not None and not isinstance(prompt, str):
                text = renderer.tokenizer.decode(renderer.ids(prompt, prefill))
                if not text.endswith(renderer.opening + prefill):
                    yield Finding(
                        "boundary",
                        "fail",
                        f"row {number}: the prompt does not end with {renderer.opening!r}, where the assistant begins, "
                        f"but with {text[-40:]!r}.",
                        "Look at the chat template.",
                    )
                    return
            done += 1
        except UnsafeTemplateError as error:
            yield Finding("rendering", "fail", f"row {number}: {error}" if rows else str(error))
            return
        except TemplateError as error:
            if rows:
                yield Finding("rendering", "fail", f"row {number}: {error}")
            else:  # made-up values are words, and a column may hold anything
                told = f"could not be tried with made-up values: {error}"
                yield Finding("rendering", "skip", told, "Try it with rows: --dataset_name.")
            return
        except DataError as error:
            yield Finding("rendering", "warn", f"row {number}: {error}")
            return
    if rows and done < len(rows):
        told = f"{len(rows) - done} of {len(rows)} rows lack what it needs"
        yield Finding("rendering", "warn", f"{told}.", "Fill them, drop them, or name a fallback in a schedule.")
    if done:
        yield Finding("rendering", "pass", f"renders {done} {'rows' if rows else 'made-up row'}, within limits.")
