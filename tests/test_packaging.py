"""What a user installs: a wheel in an empty folder, and an editable checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from opsd import sources

ROOT = Path(__file__).parent.parent
CHECK = """
import os
from pathlib import Path
import opsd
from opsd import sources
from opsd.contexts.privileged import PrivilegedContext
from opsd.teachers import load_teacher
from opsd.teachers.recipes import find_recipe, read_recipe
assert not list(Path.cwd().iterdir()), "not an empty folder"
for name in sources.names("templates"):
    if name != "base":
        PrivilegedContext(name)
for name in sources.names("teachers"):
    recipe = read_recipe(find_recipe(name))
    yours = {"model": "org/name", "column": "kind", "teachers": {"a": "org/name"}}
    wanted = {"recipe": name, **{key: yours[key] for key, value in recipe.teacher.items() if value is None}}
    load_teacher(wanted)
print(Path(opsd.__file__).parent, sources.folder("templates"), len(sources.names("templates")), sep="\\n")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(folder.glob("*.whl"))


def check_in_an_empty_folder(folder: Path, path: str) -> list[str]:
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", CHECK], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-3:]


@pytest.mark.slow
def test_a_wheel_carries_every_template_and_recipe_and_loads_them_from_an_empty_folder(
    wheel: Path, tmp_path: Path
) -> None:
    # Installed beside, not into, the environment: --target leaves the dependencies where they are.
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    package, templates, count = check_in_an_empty_folder(tmp_path / "empty", str(target))
    assert package == str(target / "opsd")
    assert templates == str(target / "opsd" / "_shipped" / "templates")
    assert int(count) == len(sources.names("templates"))


@pytest.mark.slow
def test_a_checkout_finds_its_own_files(tmp_path: Path) -> None:
    package, templates, _ = check_in_an_empty_folder(tmp_path / "empty", str(ROOT))
    assert (package, templates) == (str(ROOT / "opsd"), str(ROOT / "templates"))


@pytest.mark.slow
def test_an_editable_install_finds_the_checkouts_files(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    # The outer environment's packages, so that nothing but the project itself is installed.
    outer = next(p for p in sys.path if p.endswith("site-packages"))
    command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--editable", str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [python, "-c", CHECK],
        cwd=tmp_path / "empty",
        env={**os.environ, "PYTHONPATH": outer},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-2] == str(ROOT / "templates")


def test_the_wheel_holds_the_package_its_files_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    roots = {name.split("/")[0] for name in names}
    assert {r for r in roots if not r.endswith(".dist-info")} == {"opsd"}
    for kind, suffix in sources.SUFFIX.items():
        for name in sources.names(kind):
            assert f"opsd/_shipped/{kind}/{name}{suffix}" in names
    pages = [path for path in (ROOT / "opsd" / "report" / "pages").iterdir() if path.is_file()]
    assert len(pages) > 5 and all(f"opsd/report/pages/{page.name}" in names for page in pages)
    assert "opsd/py.typed" in names


def test_the_distribution_is_not_called_like_a_strangers_project(wheel: Path) -> None:
    """`pip install opsd` would bring another project; every text names ours, or installs a checkout."""
    assert wheel.name.startswith("opsd_toolkit-")
    pattern = re.compile(r"pip install [^\n`]*?(?<![\w.-])opsd(?![\w-])")
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md"), *ROOT.glob("opsd/**/*.py")]
    assert not [(path.name, match[0]) for path in texts for match in pattern.finditer(path.read_text())]


@pytest.mark.parametrize("line", (ROOT / "constraints.txt").read_text().splitlines())
def test_the_exact_versions_are_the_ones_installed(line: str) -> None:
    """constraints.txt says what the tests passed with; it must be what they run with."""
    from importlib.metadata import version

    if line.startswith("#"):
        return
    name, wanted = line.split("==")
    assert version(name).split("+")[0] == wanted


def test_files_and_functions_stay_within_their_budgets() -> None:
    """No file over 400 lines; functions: median at most 12 lines, nine of ten at most 40."""
    import ast

    lengths: list[int] = []
    for path in sorted(ROOT.glob("opsd/**/*.py")):
        text = path.read_text()
        assert len(text.splitlines()) <= 400, path
        tree = ast.parse(text)
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        lengths += [f.end_lineno - f.lineno + 1 for f in functions]  # type: ignore[operator]
        assert ast.get_docstring(tree), f"{path} does not say what it is"
    lengths.sort()
    assert lengths[len(lengths) // 2] <= 12 and lengths[int(len(lengths) * 0.9)] <= 40
