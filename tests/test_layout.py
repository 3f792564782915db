"""The house: every import of `opsd/` runs down the order of the rooms, and none runs in a circle.

Lazy imports and those for typing count too: an arrow is an arrow, whenever it is followed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "opsd"

# From the top to the bottom. A room imports its own files and rooms below it; rooms on one line do not know each other.
# A loose file is a room of its own. CONTRIBUTING.md shows this order as a picture.
ORDER = (
    ("__main__",),
    ("cli",),
    ("commands",),
    ("doctor", "report"),
    ("training",),
    ("health",),
    ("evaluation",),
    ("losses", "teachers"),
    ("signals", "rollouts"),
    ("contexts", "models", "serving"),
    ("data",),
    ("findings", "sources", "settings"),
    ("errors",),
    ("__init__",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
LOOSE_FILES = 11


def module_name(path: Path, package: Path = PACKAGE) -> str:
    """opsd/data/rows.py -> data.rows; opsd/data/__init__.py -> data.__init__; opsd/cli.py -> cli."""
    return ".".join(path.relative_to(package).with_suffix("").parts)


def imported_names(tree: ast.AST) -> Iterable[str]:
    """Yield the dotted names below `opsd` that any import statement of a file reaches for, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def read_arrows(package: Path = PACKAGE) -> dict[str, set[str]]:
    """Return {module: modules it imports}, of modules inside the package."""
    files = {module_name(path, package): path for path in sorted(package.rglob("*.py"))}
    arrows: dict[str, set[str]] = {}
    for name, path in files.items():
        targets = set()
        for imported in imported_names(ast.parse(path.read_text())):
            head, _, rest = imported.partition(".")
            if head != "opsd":
                continue
            target = rest or "__init__"
            targets |= {each for each in (target, f"{target}.__init__") if each in files}
        arrows[name] = targets - {name}
    return arrows


def room_of(module: str) -> str:
    return module.split(".")[0]


def circles(arrows: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Return every set of nodes that reach each other (Tarjan's strongly connected components of two and more)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in arrows.get(node, ()):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            component = [stack.pop()]
            while component[-1] != node:
                component.append(stack.pop())
            if len(component) > 1:
                found.append(sorted(component))

    for node in arrows:
        if node not in index:
            visit(node)
    return found


def upward(arrows: Mapping[str, Iterable[str]]) -> list[str]:
    """Return the arrows that leave a room for one that is not below it."""
    return [
        f"{module} -> {target}"
        for module, targets in arrows.items()
        for target in sorted(targets)
        if room_of(module) != room_of(target) and LEVEL[room_of(module)] >= LEVEL[room_of(target)]
    ]


def between_rooms(arrows: Mapping[str, Iterable[str]]) -> dict[str, set[str]]:
    rooms: dict[str, set[str]] = {}
    for module, targets in arrows.items():
        rooms.setdefault(room_of(module), set()).update(room_of(target) for target in targets)
    return {room: targets - {room} for room, targets in rooms.items()}


def test_every_file_stands_in_a_room_of_the_order() -> None:
    assert {room_of(module) for module in read_arrows()} <= set(LEVEL)


def test_files_import_in_no_circle() -> None:
    assert circles(read_arrows()) == []


def test_rooms_import_in_no_circle() -> None:
    assert circles(between_rooms(read_arrows())) == []


def test_no_import_runs_against_the_order_of_the_rooms() -> None:
    assert upward(read_arrows()) == []


def test_few_files_stand_loose() -> None:
    loose = sorted(path.name for path in PACKAGE.glob("*.py"))
    assert len(loose) <= LOOSE_FILES, loose


@pytest.mark.parametrize(
    "line",
    ["import opsd.training.late", "def f():\n    from opsd.training import late", "from opsd import training"],
)
def test_an_arrow_is_seen_wherever_it_stands(tmp_path: Path, line: str) -> None:
    """A lazy import, or one of a whole room, is an arrow too; this one runs upward and closes a circle."""
    (tmp_path / "data").mkdir()
    (tmp_path / "training").mkdir()
    for folder in ("data", "training"):
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "data" / "early.py").write_text(line + "\n")
    (tmp_path / "training" / "late.py").write_text("from opsd.data.early import thing\n")
    (tmp_path / "training" / "__init__.py").write_text("import opsd.training.late\n")
    arrows = read_arrows(tmp_path)
    assert upward(arrows) and circles(arrows) and circles(between_rooms(arrows))
