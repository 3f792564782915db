"""Templates from strangers: escapes from the sandbox are refused, and so is what spends too much time or memory."""

from __future__ import annotations

import datetime
import os
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from opsd.cli import main
from opsd.contexts import trial
from opsd.contexts.privileged import PrivilegedContext
from opsd.contexts.sandbox import MAX_CHARS
from opsd.contexts.template import MAX_SOURCE_BYTES
from opsd.errors import TemplateError, UnsafeTemplateError

ROW: dict[str, Any] = {"prompt": [{"role": "user", "content": "What is 12 + 7?"}], "answer": "19", "steps": ["a", "b"]}
REACHED = "REACHED"

# ways out of the sandbox: attribute walks, and changes to values
WALKS = {
    "class": "{{ answer.__class__ }}",
    "mro": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "item class": "{{ answer['__class__'] }}",
    "attr filter": "{{ answer | attr('__class__') }}",
    "attr by map": "{{ [answer] | map(attribute='__class__') | list }}",
    "joined name": "{{ answer | attr('__cl' ~ 'ass__') }}",
    "format": "{{ '{0.__class__}'.format(answer) }}",
    "format map": "{{ '{x.__class__}'.format_map({'x': answer}) }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m.__globals__ }}",
    "globals of range": "{{ range.__globals__ }}",
    "globals of cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "joiner": "{{ joiner.__init__.__globals__ }}",
    "namespace": "{{ namespace.__init__.__globals__ }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "self": "{{ self.__init__.__globals__ }}",
    "self block": "{{ self._TemplateReference__context.environment }}",
    "loop": "{% for x in steps %}{{ loop.__class__ }}{% endfor %}",
    "caller": "{% macro m() %}{{ caller.__globals__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "generator frame": "{{ (steps | map('upper')).gi_frame.f_globals }}",
    "filter's code": "{{ (steps | map('upper')).gi_code }}",
    "bound method": "{{ answer.upper.__self__.__class__ }}",
    "config of the environment": "{{ environment.loader }}",
    "mutate a list": "{{ steps.append('c') }}",
    "clear messages": "{{ messages.clear() }}",
    "pop a turn": "{{ messages[0].pop('content') }}",
    "update a turn": "{{ messages[0].update({'role': 'assistant'}) }}",
    "import": "{% import 'os' as os %}{{ os.name }}",
}
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
# what needs too much time or memory, and what the error says
SPENDERS = {
    "huge range": ("{% for i in range(10 ** 9) %}{{ answer }}{% endfor %}", "MAX_RANGE"),
    "repetition": ("{{ answer * 10 ** 10 }}", "within 512 MB, so it was stopped"),
    "wide format": ("{{ '{:>10000000000}'.format(1) }}", "within 512 MB, so it was stopped"),
    "doubling": (
        "{% set ns = namespace(s='xx') %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "within 512 MB, so it was stopped",
    ),
    "loops in loops": (LOOPS, "within 2 seconds, so it was stopped"),
    "power of powers": ("{{ 9 ** (9 ** 9) }}", "within 2 seconds, so it was stopped"),
    "recursive macro": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    "endless output": ("{% for i in range(99999) %}{{ answer * 1000 }}{% endfor %}", "more than 1,000,000 characters"),
}


@pytest.fixture(autouse=True)
def _try_every_template_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_passed", set())
    monkeypatch.setattr(trial, "SECONDS", 2)  # the default is 5, which a slow machine may need for templates that pass


def block(body: str) -> str:
    return "{% extends 'base.jinja' %}{% block user %}{{ prompt }} {{ answer }} " + body + "{% endblock %}"


def written(folder: Path, body: str) -> Path:
    path = folder / "stranger.jinja"
    path.write_text(block(body))
    return path


def refusal(template: Path) -> str:
    """Return why a template is refused, in bounded time and memory of this process, and with no process left behind."""
    process, start = psutil.Process(), time.perf_counter()
    before = process.memory_info().rss
    with pytest.raises(TemplateError) as error:
        PrivilegedContext(template).messages(ROW)
    assert time.perf_counter() - start < 3 * trial.SECONDS + 1
    assert process.memory_info().rss - before < 100 * 2**20
    assert not process.children(recursive=True)
    return str(error.value)


@pytest.mark.parametrize("name", WALKS)
def test_a_walk_out_of_the_sandbox_is_refused(name: str, tmp_path: Path) -> None:
    before = str(ROW)
    message = refusal(written(tmp_path, WALKS[name]))
    assert "stranger" in message and "uid=" not in message and "<class" not in message
    assert str(ROW) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", SPENDERS)
def test_a_template_that_spends_is_stopped_in_bounded_time_and_memory(name: str, tmp_path: Path) -> None:
    body, problem = SPENDERS[name]
    message = refusal(written(tmp_path, body))
    assert "stranger" in message and problem in message


@pytest.mark.parametrize("reference", ["../secret.jinja", "link.jinja", "secret.txt", "folder/../../secret.jinja"])
@pytest.mark.parametrize("tag", ["include", "extends", "import"])
def test_files_outside_the_templates_folder_are_not_read(tag: str, reference: str, tmp_path: Path) -> None:
    folder = tmp_path / "templates"
    (folder / "folder").mkdir(parents=True)
    (tmp_path / "secret.jinja").write_text(REACHED)
    (folder / "secret.txt").write_text(REACHED)
    os.symlink(tmp_path / "secret.jinja", folder / "link.jinja")
    use = f"{{% {tag} '{reference}' {'as x ' if tag == 'import' else ''}%}}"
    source = use if tag == "extends" else block(use)
    path = folder / "stranger.jinja"
    path.write_text(source)
    with pytest.raises(TemplateError, match="neither beside it nor one of opsd's own") as error:
        PrivilegedContext(path)
    assert REACHED not in str(error.value)


def test_absolute_paths_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "stranger.jinja"
    for target in ("/etc/passwd", str(tmp_path / "x.jinja")):
        path.write_text(block(f"{{% include '{target}' %}}"))
        with pytest.raises(TemplateError, match="neither beside it"):
            PrivilegedContext(path)


def test_a_template_that_includes_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "stranger.jinja"
    path.write_text("{% block user %}{{ prompt }} {{ answer }}{% include 'stranger.jinja' %}{% endblock %}")
    assert "stranger" in refusal(path)


@pytest.mark.parametrize(
    "source",
    [
        "{% block user %}" + "{% if answer %}" * 3000 + "{% endif %}" * 3000 + "{% endblock %}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    ],
    ids=["tags", "parentheses"],
)
def test_a_template_that_nests_too_deep_is_refused(source: str, tmp_path: Path) -> None:
    path = tmp_path / "stranger.jinja"
    path.write_text(source)
    with pytest.raises(TemplateError):
        PrivilegedContext(path)


def test_a_file_too_large_is_no_template(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match="is larger than 1,000,000 bytes"):
        PrivilegedContext(written(tmp_path, "x" * MAX_SOURCE_BYTES))


@pytest.mark.parametrize(
    "body",
    [
        "{{ 'x' * 10 ** 9 }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ 'x' | center(10 ** 9) }}",
        "{% if 'x' * 10 ** 9 %}{% endif %}",
        "{% set x = 'x' * 10 ** 9 %}",
        "{% for x in 'x' * 10 ** 9 %}{% endfor %}",
    ],
)
def test_constants_are_not_computed_while_a_template_is_read(body: str) -> None:
    """Jinja folds constants when it compiles, where no limit holds: 'x' * 10 ** 9 took a gigabyte."""
    start, before = time.perf_counter(), psutil.Process().memory_info().rss
    PrivilegedContext.from_string(block(body))
    assert time.perf_counter() - start < 1 and psutil.Process().memory_info().rss - before < 50 * 2**20


def test_the_output_of_a_template_is_capped_on_every_row_also_after_it_passed() -> None:
    """One that is harmless on the row that it is tried with, and writes without end on a later one."""
    context = PrivilegedContext.from_string(block("{% for i in range(answer | int) %}{{ answer * 100 }}{% endfor %}"))
    context.messages(ROW)
    with pytest.raises(UnsafeTemplateError, match=f"more than {MAX_CHARS:,} characters"):
        context.messages({**ROW, "answer": "90000"})
    with pytest.raises(UnsafeTemplateError, match="MAX_RANGE"):
        context.messages({**ROW, "answer": "900000"})


@pytest.mark.slow
def test_a_template_without_needed_fields_is_tried_again_with_the_first_row_that_fills_it(tmp_path: Path) -> None:
    path = tmp_path / "stranger.jinja"
    spends = "{% if answer is defined %}" + LOOPS + "{% endif %}"
    path.write_text(block("").replace("{{ answer }}", spends))
    assert "stranger" in refusal(path)


@pytest.mark.slow
def test_a_template_without_fields_that_spends_is_stopped_when_the_context_is_made(tmp_path: Path) -> None:
    """Whether it adds text to a bare question is found by rendering one, in the child as well."""
    path = tmp_path / "stranger.jinja"
    path.write_text(block(LOOPS).replace("{{ answer }}", ""))
    with pytest.raises(UnsafeTemplateError, match="within 2 seconds"):
        PrivilegedContext(path)


def test_the_child_imports_nothing_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("jinja2", "json", "pickle", "random", "opsd"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / REACHED)!r}, 'w').close()")
    PrivilegedContext.from_string(block("from here")).messages(ROW)
    assert not (tmp_path / REACHED).exists()


def test_values_reach_the_child_as_they_are() -> None:
    context = PrivilegedContext.from_string(block("{{ when.year }} {{ amount | round(1) }}"))
    row = {**ROW, "when": datetime.date(2026, 11, 24), "amount": 2.25}
    assert context.messages(row)[0][0]["content"].endswith("2026 2.2")


@pytest.mark.parametrize(
    "body",
    [
        "{% for x in steps %}" * 25 + "{% endfor %}" * 25,
        "{% if answer %}" * 120 + "{% endif %}" * 120,
        "{{ " + "9" * 5000 + " }}",
    ],
    ids=["loops", "conditions", "digits"],
)
def test_what_python_cannot_compile_is_a_template_error(body: str) -> None:
    with pytest.raises(TemplateError):
        PrivilegedContext.from_string(block(body)).messages(ROW)


def test_autoescape_is_refused_before_its_value_is_computed() -> None:
    with pytest.raises(TemplateError, match="line 1: nothing is escaped in a prompt"):
        PrivilegedContext.from_string(block("{% autoescape 'x' * 10 ** 8 %}{% endautoescape %}"))


def test_a_template_is_tried_once_and_opsds_own_never(monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[Any] = []
    run = trial.subprocess.run
    monkeypatch.setattr(trial.subprocess, "run", lambda *args, **kwargs: children.append(args) or run(*args, **kwargs))
    PrivilegedContext("answer_only").messages(ROW)
    assert not children
    for _ in range(2):
        context = PrivilegedContext.from_string(block("once"))
        for _ in range(3):
            context.messages(ROW)
    assert len(children) == 1


@pytest.mark.parametrize("body", [WALKS["class"], SPENDERS["doubling"][0]])
def test_lint_refuses_a_stranger_and_exits_with_1(
    body: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lint", str(written(tmp_path, body))]) == 1
    assert "✗" in capsys.readouterr().out
