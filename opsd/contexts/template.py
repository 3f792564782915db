"""Finds a template, parses it with all that it extends or includes, checks it, and renders it block by block.

Knows Jinja and the names of variables; nothing of chats, tokens, datasets, or of how an untrusted template is tried.
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
from opsd.contexts.sandbox import MAX_CHARS, sandboxed_environment
from opsd.errors import TemplateError, UnsafeTemplateError, did_you_mean
from opsd.settings import looked_in

BLOCKS = ("system", "user", "assistant")
PROMPT_NAMES = frozenset({"prompt", "messages", "system"})  # the student's prompt in three forms: no privileged fields
UNSAFE = (SecurityError, OverflowError, MemoryError, RecursionError)
MAX_SOURCE_BYTES = 1_000_000


@dataclass(frozen=True)
class TemplateText:
    """A template given as text, and its name in errors and logs.

    Example:
        >>> TemplateText("mine", "{% block user %}{{ prompt }} It is {{ answer }}.{% endblock %}").name
        'mine'
    """

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
            raise TemplateError(f"a template file ends in .jinja, and this one is {path.name!r}. Rename it.")
        if path.is_file():
            return path
        problem = f"there is no template file {text!r}.{looked_in(text)}"
    else:
        shipped = sources.find("templates", text)
        if shipped:
            return shipped
        problem = f"there is no template called {text!r}.{did_you_mean(text, known)}"
    raise TemplateError(
        f"{problem}\nA name without '/' and '.jinja' is a shipped template: {', '.join(known)}.\n"
        "`opsd cp NAME .` copies one of them here for you to change."
    )


class TemplateLoader(jinja2.BaseLoader):
    """Finds parents and includes of a template: `.jinja` files of one folder, links resolved, and none outside it.

    Example:
        >>> environment = jinja2.Environment(loader=TemplateLoader(sources.folder("templates")))
        >>> environment.get_template("hint.jinja").blocks.keys()
        dict_keys(['user'])
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()

    def get_source(
        self, environment: jinja2.Environment, template: str
    ) -> tuple[str, str | None, Callable[[], bool] | None]:
        """Return the text and path of a file, as Jinja asks for them."""
        path = (self._folder / template).resolve()  # also through links
        if path.suffix != ".jinja" or not path.is_relative_to(self._folder) or not path.is_file():
            raise jinja2.TemplateNotFound(template)
        if path.stat().st_size > MAX_SOURCE_BYTES:
            raise TemplateError(
                f"template {path.name!r} is larger than {MAX_SOURCE_BYTES:,} bytes, which no template needs."
            )
        return path.read_text(encoding="utf-8"), str(path), None


class TemplateBlocks:
    """A template with all that it extends or includes, rendered block by block.

    Args:
        origin: the template's file, or its text. Parents are looked for beside the file, then among opsd's own.

    Raises:
        TemplateError: a syntax error, a missing parent, a parent whose name is computed, text outside blocks, or a
            block that no parent has.

    Example:
        >>> template = TemplateBlocks(TemplateText("mine", "{% block user %}{{ prompt }} ({{ answer }}){% endblock %}"))
        >>> template.render({"prompt": "What is 12 + 7?", "answer": 19})["user"]
        'What is 12 + 7? (19)'
    """

    name: str
    """The file's name without suffix, or the name given with the text."""
    digest: str
    """16 hexadecimal digits over the text of all files."""
    fields: frozenset[str]
    """Variables that it reads, without `PROMPT_NAMES`."""
    optional_fields: frozenset[str]
    """Variables that it asks for with `is defined` or gives a `default`."""

    def __init__(self, origin: Path | TemplateText) -> None:
        if isinstance(origin, TemplateText):
            self.name, entry = origin.name, origin.name
            loader: jinja2.BaseLoader = jinja2.DictLoader({origin.name: origin.source})
        else:
            origin = origin.resolve()  # the file that was named may itself be a link
            self.name, entry, loader = origin.stem, origin.name, TemplateLoader(origin.parent)
        self.origin = origin
        self._loader = jinja2.ChoiceLoader([loader, TemplateLoader(sources.folder("templates"))])
        self._environment = sandboxed_environment(self._loader)
        trees = self._parse_all(entry)
        lineage = self._lineage(entry, trees)
        self._check_outline(lineage, trees)
        self._templates = [self._environment.get_template(file) for file in lineage]
        included = [trees[file] for file in trees.keys() - set(lineage)]  # has no blocks of its own: all of it counts
        self.live_blocks = [*self._find_live_blocks([trees[file] for file in lineage]), *included]
        source = "".join(self._loader.get_source(self._environment, file)[0] for file in sorted(trees))
        self.digest = hashlib.sha256(source.encode()).hexdigest()[:16]
        self.names = frozenset().union(*map(_undeclared_names, self.live_blocks))
        guarded = {name for tree in self.live_blocks for name in _guarded_names(tree)}
        self.fields = self.names - PROMPT_NAMES - guarded
        self.optional_fields = (self.names - PROMPT_NAMES) & guarded

    @property
    def is_shipped(self) -> bool:
        """Whether the file is one of opsd's own."""
        return isinstance(self.origin, Path) and self.origin.parent == sources.folder("templates").resolve()

    def render(self, values: Mapping[str, Any]) -> dict[str, str]:
        """Return the text of each block, whitespace included; a block that the template does not have is empty.

        Raises:
            UnsafeTemplateError: it leaves the sandbox, or a block has more than `MAX_CHARS` characters.
            TemplateError: it fails on these values.
        """
        context = self._templates[0].new_context(dict(values))
        # As Jinja does when it reaches `extends`: the parents' blocks come behind the template's own, for super().
        for parent in self._templates[1:]:
            for name, block in parent.blocks.items():
                context.blocks.setdefault(name, []).append(block)
        return {name: self._render_block(name, context) for name in BLOCKS}

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
                        "Its columns would be unknown before training.\nWrite the name out."
                    )
                pending.append((reference, file))
        return trees

    def _parse(self, file: str, wanted_by: str) -> nodes.Template:
        try:
            source, path, _ = self._loader.get_source(self._environment, file)
            tree = self._environment.parse(source, file, path)
            modifier = tree.find(nodes.EvalContextModifier)
            if modifier is not None:  # Jinja would compute its value when it compiles, before any limit holds
                raise TemplateError(
                    f"template {file!r}, line {modifier.lineno}: nothing is escaped in a prompt. Remove autoescape."
                )
            self._environment.get_template(file)  # compiles: finds what parsing does not, such as unknown filters
            return tree
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
        except (
            RecursionError,
            SyntaxError,
            MemoryError,
            ValueError,
        ) as error:  # from Python, of the code that Jinja writes
            problem = f"template {file!r} nests deeper, or has longer numbers, than a template needs"
            raise TemplateError(f"{problem} ({type(error).__name__}).") from error

    def _lineage(self, entry: str, trees: Mapping[str, nodes.Template]) -> list[str]:
        """Return the files of the template, its parent, its parent's parent and so on."""
        lineage = [entry]
        while (extends := trees[lineage[-1]].find(nodes.Extends)) is not None:
            parent = extends.template.as_const()  # a constant, or _parse_all would have refused it
            if not isinstance(parent, str):
                raise TemplateError(f"template {lineage[-1]!r} extends {parent!r}, which is not the name of one file.")
            if parent in lineage:
                raise TemplateError(
                    f"template {self.name!r} extends itself: {' -> '.join([*lineage, parent])}.\n"
                    "A parent is looked for beside the template first.\nGive the file another name than its parent's."
                )
            lineage.append(parent)
        return lineage

    def _check_outline(self, lineage: list[str], trees: Mapping[str, nodes.Template]) -> None:
        """Refuse what Jinja drops silently: text outside blocks, and blocks that no parent has."""
        known = set(BLOCKS)
        for file in reversed(lineage):
            for node in _outline(trees[file]):
                if not isinstance(node, nodes.Block):
                    raise TemplateError(
                        f"template {file!r}, line {node.lineno}: this is outside every block, so Jinja drops it.\n"
                        "Put it into {% block user %} … {% endblock %}, or into system or assistant."
                    )
                if node.name not in known:
                    raise TemplateError(
                        f"template {file!r}, line {node.lineno}: the block {node.name!r} is in no parent, so Jinja "
                        f"drops it.{did_you_mean(node.name, known)} The blocks are {', '.join(sorted(known))}."
                    )
            known |= {block.name for block in trees[file].find_all(nodes.Block)}

    def _find_live_blocks(self, lineage: list[nodes.Template]) -> Iterator[nodes.Template]:
        """Yield, as trees, the blocks that are rendered: the first of each name, and those that super() reaches."""
        replaced: set[str] = set()
        for tree in lineage:
            blocks = [block for block in tree.find_all(nodes.Block) if block.name not in replaced]
            for block in blocks:
                alone = nodes.Template([block], lineno=block.lineno)
                alone.set_environment(self._environment)
                yield alone
            replaced |= {block.name for block in blocks if not _calls_super(block)}

    def _render_block(self, name: str, context: jinja2.runtime.Context) -> str:
        pieces, size = [], 0
        try:
            for block in context.blocks.get(name, [])[:1]:
                for piece in block(context):
                    pieces.append(piece)
                    size += len(piece)
                    if size > MAX_CHARS:
                        raise OverflowError(f"the block {name} writes more than {MAX_CHARS:,} characters")
        except Exception as error:  # a template's code may raise anything
            kind = UnsafeTemplateError if isinstance(error, UNSAFE) else TemplateError
            raise kind(
                f"template {self.name!r} cannot be rendered{_place(error)}: {str(error).rstrip('.')}.\n{_advice(error)}"
            ) from error
        return "".join(pieces)


def _outline(tree: nodes.Template) -> Iterator[nodes.Node]:
    """Yield the nodes at the top of a file, without `extends` and blank space."""
    for node in tree.body:
        # One Output holds text and expressions up to the next tag; its parts have line numbers of their own.
        for part in node.nodes if isinstance(node, nodes.Output) else [node]:
            blank = isinstance(part, nodes.TemplateData) and not part.data.strip()
            if not blank and not isinstance(part, nodes.Extends):
                yield part


def _undeclared_names(tree: nodes.Template) -> set[str]:
    """Do as `jinja2.meta.find_undeclared_variables`, whose optimizer would compute constants such as 'x' * 10 ** 9."""
    generator = meta.TrackingCodeGenerator(tree.environment)  # type: ignore[arg-type]
    generator.optimizer = None
    generator.visit(tree)
    return generator.undeclared_identifiers


def _calls_super(block: nodes.Block) -> bool:
    return any(name.name == "super" for name in block.find_all(nodes.Name))


def _guarded_names(tree: nodes.Node) -> Iterator[str]:
    """Yield the names that may be undefined: those in `is defined` or before `default`."""
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
        return "Templates run in a sandbox: they may read values and apply filters, and nothing else."
    if isinstance(error, UNSAFE):
        return "No prompt needs this much. Look for loops, recursion and repetitions."
    if isinstance(error, jinja2.UndefinedError):
        return "Guard what some rows lack: {% if name is defined %} … {% endif %}, or name | default('…')."
    return "The template does not fit this row's values."
