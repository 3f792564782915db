"""A template as a set of Jinja blocks: found, parsed with all that it extends, checked, rendered block by block.

Knows Jinja and names of variables; knows nothing of chats, tokens or datasets.
"""

from __future__ import annotations

import hashlib
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.sandbox import SecurityError

from opsd import sources
from opsd.contexts.sandbox import MAX_CHARS, Sandbox
from opsd.contexts.trial import render_in_subprocess
from opsd.errors import TemplateError, UnsafeTemplateError, did_you_mean

PARTS = ("system", "user", "assistant")
PROMPT_NAMES = frozenset({"prompt", "messages", "system"})  # the student's own prompt in three forms, so not privileged
UNSAFE = (SecurityError, OverflowError, TimeoutError, MemoryError, RecursionError)
MAX_SOURCE_BYTES = 1_000_000


@dataclass(frozen=True)
class TemplateText:
    """A template given as text, with the name that errors and logs call it by."""

    name: str
    source: str


def find_template(template: str | os.PathLike[str]) -> Path:
    """Return the file of a template.

    Args:
        template: a path (anything with a separator, or ending in .jinja), or a shipped template's name.

    Raises:
        TemplateError: there is no such file, or no shipped template of that name.
    """
    text = os.fspath(template)
    known = sources.names("templates")
    if isinstance(template, os.PathLike) or "/" in text or os.sep in text or text.endswith(".jinja"):
        path = Path(text).expanduser()
        if path.is_file() and path.suffix != ".jinja":
            raise TemplateError(f"a template's file ends in .jinja, and this is {path.name!r}. Rename it.")
        if path.is_file():
            return path
        problem = f"there is no template file {text!r}."
    else:
        found = sources.find("templates", text)
        if found:
            return found
        problem = f"there is no template called {text!r}.{did_you_mean(text, known)}"
    raise TemplateError(
        f"{problem}\nA name without '/' and '.jinja' is one of opsd's own: {', '.join(known)}.\n"
        "`opsd cp NAME .` puts one of them here for you to change."
    )


class TemplateLoader(jinja2.BaseLoader):
    """Finds the parents and includes of a template: `.jinja` files in a folder, and nothing that lies outside it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()

    def get_source(
        self, environment: jinja2.Environment, template: str
    ) -> tuple[str, str | None, Callable[[], bool] | None]:
        """Return a file's text and path."""
        path = (self._folder / template).resolve()  # also through links
        if path.suffix != ".jinja" or not path.is_relative_to(self._folder) or not path.is_file():
            raise jinja2.TemplateNotFound(template)
        if path.stat().st_size > MAX_SOURCE_BYTES:
            raise TemplateError(f"template {path.name!r} is larger than {MAX_SOURCE_BYTES:,} bytes: it is no template.")
        return path.read_text(encoding="utf-8"), str(path), None


class TemplateBlocks:
    """A template with all that it extends or includes; text outside blocks, and dynamic parents, are refused.

    Args:
        origin: the template's file, or its text. Parents are looked for beside the file, then among opsd's own.
        trusted: render it here at once. Otherwise a template that is not opsd's own is rendered once in a process with
            limits before it is rendered in this one.

    Raises:
        TemplateError: a syntax error, a parent that is missing, or something that would never be shown.
    """

    def __init__(self, origin: Path | TemplateText, *, trusted: bool = False) -> None:
        self.origin = origin
        own: jinja2.BaseLoader
        if isinstance(origin, TemplateText):
            self.name, entry, own = origin.name, origin.name, jinja2.DictLoader({origin.name: origin.source})
        else:
            origin = origin.resolve()  # the file that was named may itself be a link
            self.name, entry, own = origin.stem, origin.name, TemplateLoader(origin.parent)
        self._vetted = trusted or (isinstance(origin, Path) and origin.parent == sources.folder("templates"))
        self._loader = jinja2.ChoiceLoader([own, TemplateLoader(sources.folder("templates"))])
        self._environment = Sandbox(self._loader)
        trees = self._parse_all(entry)
        line = self._line_of_descent(entry, trees)
        self._check_outline(line, trees)
        self._templates = [self._environment.get_template(file) for file in line]
        # An included file has no blocks of its own: all of it is shown.
        shown = [
            *self._live_blocks([trees[file] for file in line]),
            *(trees[file] for file in trees.keys() - set(line)),
        ]
        source = "".join(self._loader.get_source(self._environment, file)[0] for file in sorted(trees))
        self.digest = hashlib.sha256(source.encode()).hexdigest()[:16]
        used = set().union(*map(meta.find_undeclared_variables, shown)) - PROMPT_NAMES
        guarded = {name for tree in shown for name in _guarded_names(tree)}
        self.shown = shown
        self.fields = frozenset(used - guarded)
        self.optional_fields = frozenset(used & guarded)

    def render(self, values: Mapping[str, Any]) -> dict[str, str]:
        """Return the text of each block, whitespace and all; a block that nobody wrote is empty.

        Raises:
            TemplateError: the template fails on these values, writes without end, or takes too long.
        """
        if not self._vetted:
            render_in_subprocess(self.origin, self.digest, values)
            self._vetted = True
        return self._rendered(values)

    def _rendered(self, values: Mapping[str, Any]) -> dict[str, str]:
        context = self._templates[0].new_context(dict(values))
        # What Jinja does when it reaches `extends`: a block's elders stand behind it, for super().
        for elder in self._templates[1:]:
            for name, block in elder.blocks.items():
                context.blocks.setdefault(name, []).append(block)
        return {part: self._render_part(part, context) for part in PARTS}

    def speak_without_fields(self) -> bool:
        """Return whether the template adds something of its own to a bare question."""
        question = "What is it?"
        row = {"prompt": question, "messages": [{"role": "user", "content": question}], "system": ""}
        try:
            parts = {part: text.strip() for part, text in self._rendered(row).items()}
        except TemplateError:  # it reads something in the question, which is more than repeating it
            return True
        return parts["user"] not in ("", question) or bool(parts["system"] or parts["assistant"])

    def _parse_all(self, entry: str) -> dict[str, nodes.Template]:
        """Return the syntax trees of the template and of everything that it extends, includes or imports."""
        trees: dict[str, nodes.Template] = {}
        pending = [(entry, self.name)]
        while pending:
            file, wanted_by = pending.pop()
            if file in trees:
                continue
            trees[file] = self._parse(file, wanted_by)
            for reference in meta.find_referenced_templates(trees[file]):
                if reference is None:
                    raise TemplateError(
                        f"template {file!r} computes the name of a template that it extends or includes.\n"
                        "Then nobody can say before training which columns it needs. Write the name out."
                    )
                pending.append((reference, file))
        return trees

    def _parse(self, file: str, wanted_by: str) -> nodes.Template:
        try:
            self._environment.get_template(file)  # compiles: finds what parsing does not, such as unknown filters
            return self._environment.parse(self._loader.get_source(self._environment, file)[0])
        except jinja2.TemplateSyntaxError as error:
            place = f"{error.filename or error.name}, line {error.lineno}"
            raise TemplateError(f"template {self.name!r} does not parse ({place}): {error.message}") from error
        except jinja2.TemplateNotFound as error:
            raise TemplateError(
                f"template {wanted_by!r} extends or includes {file!r}, which is neither beside it nor one of opsd's "
                f"own.{did_you_mean(Path(file).stem, sources.names('templates'))}"
            ) from error
        except UnicodeDecodeError as error:
            raise TemplateError(f"template {file!r} is not text in UTF-8: {error}. Save it as UTF-8.") from error
        except TemplateError:
            raise
        except (RecursionError, SyntaxError, MemoryError, ValueError) as error:  # what Python makes of Jinja's code
            problem = f"template {file!r} nests deeper, or has longer numbers, than a template needs"
            raise TemplateError(f"{problem} ({type(error).__name__}).") from error

    def _line_of_descent(self, entry: str, trees: Mapping[str, nodes.Template]) -> list[str]:
        """Return the template, its parent, its parent's parent and so on."""
        line = [entry]
        while (extends := trees[line[-1]].find(nodes.Extends)) is not None:
            parent = extends.template.as_const()
            if parent in line:
                raise TemplateError(
                    f"template {self.name!r} extends itself: {' -> '.join([*line, parent])}.\n"
                    "A parent is looked for beside the template first. Give the file another name than its parent's."
                )
            line.append(parent)
        return line

    def _check_outline(self, line: list[str], trees: Mapping[str, nodes.Template]) -> None:
        """Refuse what Jinja would skip without a word: text outside blocks, and blocks that nobody shows."""
        known = set(PARTS)
        for file in reversed(line):
            for node in _outline(trees[file]):
                if not isinstance(node, nodes.Block):
                    raise TemplateError(
                        f"template {file!r}, line {node.lineno}: this stands outside every block and would never be "
                        "shown.\nPut it into {% block user %} … {% endblock %}, or into system or assistant."
                    )
                if node.name not in known:
                    raise TemplateError(
                        f"template {file!r}, line {node.lineno}: the block {node.name!r} would never be shown."
                        f"{did_you_mean(node.name, known)} The blocks are {', '.join(sorted(known))}."
                    )
            known |= {block.name for block in trees[file].find_all(nodes.Block)}

    def _live_blocks(self, line: list[nodes.Template]) -> Iterator[nodes.Template]:
        """Yield, as trees, the blocks that are shown: the youngest of each name, and as far up as super() reaches."""
        replaced: set[str] = set()
        for tree in line:
            blocks = [block for block in tree.find_all(nodes.Block) if block.name not in replaced]
            for block in blocks:
                alone = nodes.Template([block], lineno=block.lineno)
                alone.set_environment(self._environment)
                yield alone
            replaced |= {block.name for block in blocks if not _calls_super(block)}

    def _render_part(self, part: str, context: jinja2.runtime.Context) -> str:
        pieces, size = [], 0
        self._environment.begin()
        try:
            for block in context.blocks.get(part, [])[:1]:
                for piece in block(context):
                    pieces.append(piece)
                    size += len(piece)
                    if size > MAX_CHARS:
                        raise OverflowError(f"the block {part} writes more than {MAX_CHARS:,} characters")
        except Exception as error:  # whatever a template's own code raises is the template's error
            kind = UnsafeTemplateError if isinstance(error, UNSAFE) else TemplateError
            raise kind(
                f"template {self.name!r} cannot be rendered{_place(error)}: {str(error).rstrip('.')}.\n{_advice(error)}"
            ) from error
        return "".join(pieces)


def _outline(tree: nodes.Template) -> Iterator[nodes.Node]:
    """Yield what stands at the top of a file, but for `extends` and blank space."""
    for node in tree.body:
        # One Output holds the text and the expressions up to the next tag; its parts know their own lines.
        for part in node.nodes if isinstance(node, nodes.Output) else [node]:
            blank = isinstance(part, nodes.TemplateData) and not part.data.strip()
            if not blank and not isinstance(part, nodes.Extends):
                yield part


def _calls_super(block: nodes.Block) -> bool:
    return any(name.name == "super" for name in block.find_all(nodes.Name))


def _guarded_names(tree: nodes.Node) -> Iterator[str]:
    """Yield the names that a template can do without: those in `is defined` or before `default`."""
    for node in tree.find_all((nodes.Test, nodes.Filter)):
        guards = ("defined", "undefined") if isinstance(node, nodes.Test) else ("default", "d")
        if node.name in guards and isinstance(node.node, nodes.Name):
            yield node.node.name


def _place(error: Exception) -> str:
    """Return " (file, line n)" for the innermost line of a template in the error's traceback."""
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        template = frame.f_globals.get("__jinja_template__")
        if template is not None:
            place = f" ({template.name}, line {template.get_corresponding_lineno(line)})"
    return place


def _advice(error: Exception) -> str:
    if isinstance(error, SecurityError):
        return "Templates run in a sandbox: they read values and apply filters, and reach nothing else."
    if isinstance(error, jinja2.UndefinedError):
        return "Guard what not every row has: {% if name is defined %} … {% endif %}, or name | default('…')."
    return "The template does not fit this row's values."
