"""Finds in a template what parsing and rendering do not: chat markers, unused fields, leaks, missing columns.

Parsing errors are those of the context's constructor, and rendering errors those of its first rows, which a child
process tries where the template is not opsd's own. Knows templates, columns and rows; nothing of models or training.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2 import nodes

from opsd.contexts.base import ROLLOUT_FIELDS
from opsd.contexts.markup import MARKERS
from opsd.contexts.messages import turns_of
from opsd.contexts.privileged import PrivilegedContext
from opsd.contexts.renderer import PromptRenderer
from opsd.contexts.template import PROMPT_NAMES
from opsd.data.values import OTHER, WRONG, text_of
from opsd.errors import OPSDError, TemplateError, UnsafeTemplateError, did_you_mean
from opsd.findings import Finding, listed
from opsd.settings import as_list

ADDED = (*ROLLOUT_FIELDS, WRONG)  # columns that training or a control adds
# A template writes no marker of any format, nor a special token or a heading that may be one.
_MARKERS = re.compile("|".join((*MARKERS.values(), r"<\|[a-z_]+\|>|</?s>|^#+ ?(?:Assistant|Response):")), re.MULTILINE)
_PLACEHOLDER = re.compile(r"\{\{-?\s*(\w+)\b[^}]*\}\}")
_SAMPLE = "a few words"


def lint(
    template: str,
    *,
    columns: Sequence[str] | None = None,
    rows: Sequence[Mapping[str, Any]] = (),
    renderer: PromptRenderer | None = None,
) -> list[Finding]:
    """Return the findings about a template.

    Args:
        template: a name or a path.
        columns: the dataset's columns; None where they are not known.
        rows: rows to render; without any, a row of sample values is rendered.
        renderer: a model's tokenizer and chat template, to render ids as well.

    Example:
        >>> [finding.status for finding in lint("answer_only", columns=["prompt", "answer"])]
        ['pass', 'pass']
    """
    try:
        context = PrivilegedContext(template)
    except OPSDError as error:
        return [Finding("syntax", "fail", str(error))]
    needs = listed(sorted(context.fields), 9) or "no column"
    return [
        Finding("syntax", "pass", f"the template and its parents parse; it needs {needs}."),
        *_unused_fields(context),
        *_missing_columns(context, as_list("columns", columns)),
        *_assistant_leaks(context),
        *_placeholders(context, rows),
        *_chat_markers(context),
        *_renderings(context, rows, renderer),
    ]


def _unused_fields(context: PrivilegedContext) -> Iterator[Finding]:
    find = functools.partial(Finding, "fields", "warn")
    printed = set().union(*map(_printed_names, context.template.live_blocks)) | PROMPT_NAMES
    unused = sorted((context.template.fields | context.template.optional_fields) - printed)
    if unused:
        yield find(f"{listed(unused)} is asked for and never printed.", "Print it ({{ name }}), or drop the question.")
    if not {"prompt", "messages"} & context.template.names:
        yield find(
            "the question is never printed: the template has neither {{ prompt }} nor {{ messages }}.",
            "Write {{ prompt }} into the block user, unless a column holds the teacher's whole prompt.",
        )


def _printed_names(tree: nodes.Template) -> set[str]:
    """Return the names that a template reads for more than to ask whether they are defined."""
    tests = [test for test in tree.find_all(nodes.Test) if test.name in ("defined", "undefined")]
    asked = [test.node for test in tests if isinstance(test.node, nodes.Name)]
    return {name.name for name in tree.find_all(nodes.Name) if all(name is not other for other in asked)}


def _missing_columns(context: PrivilegedContext, columns: Sequence[str] | None) -> Iterator[Finding]:
    if columns is None:
        return
    missing = context.missing([*columns, *ADDED, *(f"{OTHER}{name}" for name in columns)])
    if missing:
        names = " and ".join(" or ".join(need.names) for need in missing)
        hint = "".join(did_you_mean(name, columns) for need in missing for name in need.names)
        yield Finding(
            "fields",
            "fail",
            f"the dataset has no column {names}; it has: {listed(columns, 20)}.{hint}",
            "Rename a column, or name the one to use: fields={name: column}.",
        )


def _assistant_leaks(context: PrivilegedContext) -> Iterator[Finding]:
    privileged = context.template.fields | context.template.optional_fields
    for tree in context.template.live_blocks:
        for block in tree.find_all(nodes.Block):
            outputs = block.find_all(nodes.Output)
            names = {name.name for output in outputs for name in output.find_all(nodes.Name)} & privileged
            if block.name == "assistant" and names:
                yield Finding(
                    "leaks",
                    "warn",
                    f"the block assistant prints {listed(sorted(names))} as the beginning of the assistant's turn, "
                    "which the rollout continues and the student never sees.",
                    "Print it in the block user or system; the block assistant is for an opening such as <think>.",
                )


def _placeholders(context: PrivilegedContext, rows: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    for number, row in enumerate(rows):
        for match in _PLACEHOLDER.finditer(" ".join(map(text_of, turns_of(row.get("prompt"))))):
            if match[1] in {*context.columns, *row}:
                yield Finding(
                    "leaks",
                    "fail",
                    f"the student's prompt in row {number} contains {match[0]!r}. A prompt is data and not a template: "
                    "the student sees the placeholder, or, once it is filled in, the privileged text.",
                    "Remove it from the prompts; the template inserts the column for the teacher.",
                )
                return


def _chat_markers(context: PrivilegedContext) -> Iterator[Finding]:
    for tree in context.template.live_blocks:
        for data in tree.find_all(nodes.TemplateData):
            match = _MARKERS.search(data.data)
            if match:
                yield Finding(
                    "boundary",
                    "fail",
                    f"line {data.lineno} writes {match[0]!r} itself. The chat template writes the markers of turns, "
                    "and the rollout would begin after a header that the model does not know.",
                    "Write only the text of a turn. The blocks system, user and assistant are the turns.",
                )
                return


def _renderings(
    context: PrivilegedContext, rows: Sequence[Mapping[str, Any]], renderer: PromptRenderer | None
) -> Iterator[Finding]:
    find = functools.partial(Finding, "rendering")
    added = dict.fromkeys(ADDED, _SAMPLE)
    samples = [{**dict.fromkeys(context.columns, _SAMPLE), "prompt": [{"role": "user", "content": "What is it?"}]}]
    filled = [number for number, row in enumerate(rows or samples) if context.has_fields({**row, **added})]
    for number in filled:
        row = (rows or samples)[number]
        try:
            if renderer is None:
                context.messages(row, added)
            else:
                context.render(row, added, renderer=renderer)
        except OPSDError as error:
            if rows or isinstance(error, UnsafeTemplateError) or not isinstance(error, TemplateError):
                yield find("fail", f"row {number}: {error}" if rows else str(error))
            else:  # sample values are words, and a column may hold anything
                yield find("skip", f"sample values do not fit: {error}", "Render rows: --dataset_name.")
            return
    if len(filled) < len(rows):
        yield find("warn", f"{len(rows) - len(filled)} of {len(rows)} rows lack a column that it needs.", "Fill them.")
    if filled:
        yield find("pass", f"{len(filled)} {'rows' if rows else 'sample row'} rendered within the limits.")
