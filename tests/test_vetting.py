"""Templates from strangers: escapes from the sandbox are refused, and so is whatever would not end or not fit."""

from __future__ import annotations

import datetime
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import psutil
import pytest

from opsd.cli import main
from opsd.contexts import trial
from opsd.contexts.privileged import PrivilegedContext
from opsd.contexts.sandbox import MAX_CHARS, SECONDS
from opsd.contexts.template import MAX_SOURCE_BYTES
from opsd.errors import TemplateError, UnsafeTemplateError

ROW: dict[str, Any] = {"prompt": [{"role": "user", "content": "What is 12 + 7?"}], "answer": "19", "steps": ["a", "b"]}
REACHED = "REACHED"

# attribute walks and other ways to Python; each would print REACHED-like text or fail in another way than refused
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
DOUBLING = (
    "{% set ns = namespace(s='xx') %}{% for i in range(40) %}{% set ns.s = MORE %}{% endfor %}{{ ns.s | length }}"
)
# what would not end, or would not fit
SPENDERS = {
    "huge range": "{% for i in range(10 ** 9) %}{{ answer }}{% endfor %}",
    "repetition": "{{ answer * 10 ** 9 }}",
    "repetition the other way": "{{ 10 ** 9 * answer }}",
    "list repetition": "{{ (steps * 10 ** 9) | length }}",
    "power": "{{ 10 ** 10 ** 10 }}",
    "power of powers": "{{ 9 ** 9 ** 9 }}",
    "wide field": "{{ '%1000000000d' % 1 }}",
    "wide format": "{{ '{:>1000000000}'.format(1) }}",
    "centred": "{{ answer | center(1000000000) }}",
    "indented": "{{ answer | indent(1000000000, true) }}",
    "ljust": "{{ answer.ljust(1000000000) }}",
    "doubling": DOUBLING.replace("MORE", "ns.s + ns.s"),
    "doubling by tilde": DOUBLING.replace("MORE", "ns.s ~ ns.s"),
    "doubling by replace": DOUBLING.replace("MORE", "ns.s | replace('x', 'xx')"),
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "recursive macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "endless output": "{% for i in range(99999) %}{{ answer * 1000 }}{% endfor %}",
    "much lorem ipsum": "{{ lipsum(100000) }}",
    "sum of lists": "{{ range(90000) | map('string') | sum(start='') }}",
}


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try every template anew."""
    monkeypatch.setattr(trial, "_passed", set())


def block(body: str) -> str:
    return "{% extends 'base.jinja' %}{% block user %}{{ prompt }} {{ answer }} " + body + "{% endblock %}"


def refusal(template: Path) -> str:
    """Return why a template is refused, in bounded time and memory of this process."""
    process, start = psutil.Process(), time.perf_counter()
    before = process.memory_info().rss
    with pytest.raises(TemplateError) as error:
        PrivilegedContext(template).messages(ROW)
    assert time.perf_counter() - start < 3 * trial.SECONDS
    assert process.memory_info().rss - before < 100 * 2**20
    return str(error.value)


@pytest.mark.parametrize("name", WALKS)
def test_a_walk_out_of_the_sandbox_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "stranger.jinja"
    path.write_text(block(WALKS[name]))
    before = str(ROW)
    message = refusal(path)
    assert "stranger" in message and "uid=" not in message and "<class" not in message
    assert str(ROW) == before


@pytest.mark.parametrize("name", SPENDERS)
def test_what_would_not_end_or_not_fit_is_refused_in_bounded_time_and_memory(name: str, tmp_path: Path) -> None:
    path = tmp_path / "stranger.jinja"
    path.write_text(block(SPENDERS[name]))
    assert "stranger" in refusal(path)


def test_a_child_that_does_not_end_is_stopped_and_leaves_no_process(tmp_path: Path) -> None:
    path = tmp_path / "stranger.jinja"
    path.write_text(block(SPENDERS["loops in loops"]))
    start = time.perf_counter()
    assert f"takes longer than {SECONDS:g} seconds" in refusal(path)
    assert time.perf_counter() - start >= SECONDS
    assert not psutil.Process().children(recursive=True)


@pytest.mark.parametrize(("spend", "bound"), [("while True: pass", "5 seconds"), ("x = 'x' * 10**10", "512 MB")])
def test_the_child_itself_is_bounded_whatever_the_sandbox_lets_through(
    spend: str, bound: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hole in the sandbox, made on purpose: a filter that runs away, in the child only."""
    hole = (
        f"from opsd.contexts.filters import FILTERS\ndef hole(value, share):\n    {spend}\nFILTERS['reveal'] = hole\n"
    )
    (tmp_path / "sitecustomize.py").write_text(hole)
    monkeypatch.syspath_prepend(tmp_path)
    context = PrivilegedContext.from_string(block("{{ answer | reveal(0.5) }}"))
    start = time.perf_counter()
    with pytest.raises(UnsafeTemplateError, match=f"within {bound}"):
        context.messages(ROW)
    assert time.perf_counter() - start < 2 * trial.SECONDS


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
    path = tmp_path / "stranger.jinja"
    path.write_text(block("x" * MAX_SOURCE_BYTES))
    with pytest.raises(TemplateError, match="is larger than 1,000,000 bytes"):
        PrivilegedContext(path)


@pytest.mark.parametrize("body", ["{{ 'x' * 10 ** 9 }}", "{{ 9 ** 9 ** 9 }}", "{{ 'x' | center(10 ** 9) }}"])
def test_constants_are_not_computed_while_a_template_is_read(body: str) -> None:
    """Jinja folds constants when it compiles, where no limit holds: 'x' * 10 ** 9 took a gigabyte."""
    start, before = time.perf_counter(), psutil.Process().memory_info().rss
    PrivilegedContext.from_string(block(body))
    assert time.perf_counter() - start < 1 and psutil.Process().memory_info().rss - before < 50 * 2**20


def test_training_caps_what_a_template_writes_after_it_has_passed() -> None:
    """One that behaves on the row it is tried with, and not on a later one."""
    context = PrivilegedContext.from_string(block("{% for i in range(answer | int) %}{{ answer * 100 }}{% endfor %}"))
    context.messages(ROW)
    with pytest.raises(TemplateError, match=f"more than {MAX_CHARS:,} characters"):
        context.messages({**ROW, "answer": "90000"})
    with pytest.raises(TemplateError, match="more than 1,000,000 characters"):
        PrivilegedContext.from_string(block("{{ answer * (answer | int) }}")).messages({**ROW, "answer": "9" * 7})


@pytest.mark.parametrize(
    "body",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{{ answer.ljust(3000000000) | length }}",
        "{{ answer | center(3000000000) | length }}",
        "{{ '{:>100000000}'.format(answer) | length }}",
        "{{ '%100000000s' % answer }}",
        "{{ '%*d' % (100000000, 1) }}",
        "{{ '%100000000s' | format(answer) }}",
        "{{ (answer * 9000).replace('1', answer * 9000) | length }}",
        "{{ (answer * 9000) | replace('1', answer * 9000) | length }}",
        "{{ (answer * 4000).join(range(9000) | map('string') | list) | length }}",
        "{{ range(9000) | map('string') | list | join(answer * 4000) | length }}",
        "{% set x %}{% for i in range(99999) %}{{ answer * 1000 }}{% endfor %}{% endset %}",
        "{% set x %}{% for i in range(99999) %}" + "x" * 5000 + "{% endfor %}{% endset %}",
        "{% set ns = namespace(s='xx') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{{ steps | batch(900000000, 'x') | list | length }}",
    ],
)
def test_a_template_that_behaves_when_it_is_tried_out_is_bounded_afterwards_too(body: str) -> None:
    """The child sees one row; what a template does with the next is bounded in this process, in time and memory."""
    context = PrivilegedContext.from_string(
        block("{% for once in range(1 if answer == '11' else 0) %}" + body + "{% endfor %}")
    )
    context.messages(ROW)
    start = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(UnsafeTemplateError, match="cannot be rendered"):
            context.messages({**ROW, "answer": "11"})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - start < 3 * SECONDS
    assert peak < 20 * 2**20


def test_a_template_without_needed_fields_is_tried_out_with_the_first_row_that_fills_it(tmp_path: Path) -> None:
    path = tmp_path / "stranger.jinja"
    spends = "{% if answer is defined %}" + SPENDERS["loops in loops"] + "{% endif %}"
    path.write_text(block("").replace("{{ answer }}", spends))
    assert "stranger" in refusal(path)


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


def test_a_template_is_tried_out_once_and_opsds_own_never(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    run = trial.subprocess.run
    monkeypatch.setattr(trial.subprocess, "run", lambda *args, **kwargs: tried.append(args) or run(*args, **kwargs))
    PrivilegedContext("answer_only").messages(ROW)
    assert not tried
    for _ in range(2):
        context = PrivilegedContext.from_string(block("once"))
        for _ in range(3):
            context.messages(ROW)
    assert len(tried) == 1
    without_fields = PrivilegedContext.from_string(block("be brief").replace("{{ answer }}", ""))
    assert len(tried) == 1  # what it says by itself is seen here, within the same bounds
    without_fields.messages(ROW)
    assert len(tried) == 2


@pytest.mark.parametrize("name", ["class", "loops in loops"])
def test_lint_refuses_a_stranger_and_exits_with_1(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "stranger.jinja"
    path.write_text(block({**WALKS, **SPENDERS}[name]))
    assert main(["lint", str(path)]) == 1
    assert "✗" in capsys.readouterr().out
