"""`opsd lint`: problems of a template, found before it is used."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows, make_tokenizer

from opsd import sources
from opsd.cli import main
from opsd.contexts.lint import lint
from opsd.contexts.renderer import PromptRenderer

RENDERER = PromptRenderer(make_tokenizer())
WHOLE_PROMPT = "teacher_prompt"  # shows no question, since its column holds one
NAMES = [name for name in sources.names("templates") if name not in ("base", WHOLE_PROMPT)]


def written(tmp_path: Path, user: str, more: str = "") -> str:
    path = tmp_path / "mine.jinja"
    path.write_text("{% extends 'base.jinja' %}{% block user %}" + user + "{% endblock %}" + more)
    return str(path)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_templates_are_clean(name: str) -> None:
    findings = lint(name, renderer=RENDERER)
    assert {f.status for f in findings} == {"pass"}, [f.saw for f in findings]


@pytest.mark.parametrize(
    ("user", "more", "columns", "check", "status", "words"),
    [
        ("{{ prompt }} {{ answer ", "", None, "syntax", "fail", "does not parse"),
        ("{{ prompt }} {{ answer | shout }}", "", None, "syntax", "fail", "shout"),
        ("{{ prompt }}", "", None, "syntax", "fail", "adds nothing to the student's prompt"),
        ("{{ prompt }} {{ answer.__class__ }}", "", None, "rendering", "fail", "unsafe"),
        (
            "{{ prompt }} {{ answer }}",
            "",
            ["prompt", "anwser"],
            "fields",
            "fail",
            "no column answer.*'anwser'",
        ),
        ("{{ promt }} {{ answer }}", "", ["prompt", "answer"], "fields", "fail", "no column promt.*mean 'prompt'"),
        ("It is {{ answer }}.", "", None, "fields", "warn", "the question is never printed"),
        (
            "{{ prompt }}{% if hint is defined %} Think.{% endif %}",
            "",
            None,
            "fields",
            "warn",
            "hint is asked for and never printed",
        ),
        (
            "{{ prompt }}",
            "{% block assistant %}It is {{ answer }}{% endblock %}",
            None,
            "leaks",
            "warn",
            "the block assistant prints answer",
        ),
        ("{{ prompt }} {{ answer }}<|im_end|>", "", None, "boundary", "fail", "writes '<|im_end|>' itself"),
        ("[INST] {{ prompt }} {{ answer }} [/INST]", "", None, "boundary", "fail", "itself"),
    ],
)
def test_a_problem_is_named(
    user: str, more: str, columns: Any, check: str, status: str, words: str, tmp_path: Path
) -> None:
    findings = lint(written(tmp_path, user, more), columns=columns)
    pattern = words if ".*" in words else re.escape(words)
    matching = [f for f in findings if (f.check, f.status) == (check, status) and re.search(pattern, f.saw, re.DOTALL)]
    assert len(matching) == 1, [(f.check, f.status, f.saw) for f in findings]


def test_a_good_template_passes_every_check(tmp_path: Path) -> None:
    path = written(tmp_path, "{{ prompt }} {% if hint is defined %}{{ hint }}{% endif %} It is {{ answer }}.")
    findings = lint(path, columns=["prompt", "answer", "solution"], rows=make_rows(), renderer=RENDERER)
    assert {f.status for f in findings} == {"pass"}
    assert "12 rows rendered within the limits" in findings[-1].saw


def test_rows_that_lack_a_field_are_counted_and_rows_that_break_it_are_numbered(tmp_path: Path) -> None:
    rows = [{**row, "answer": "" if i == 3 else row["answer"]} for i, row in enumerate(make_rows())]
    findings = lint(written(tmp_path, "{{ prompt }} {{ answer }}"), columns=["prompt", "answer"], rows=rows)
    assert any(f.status == "warn" and "1 of 12 rows lack" in f.saw for f in findings)
    findings = lint(
        written(tmp_path, "{{ prompt }} {{ solution.split('add')[1] }}"),
        rows=[*make_rows(2), {**make_rows(1)[0], "solution": "none"}],
    )
    assert any(f.status == "fail" and f.saw.startswith("row 2:") for f in findings)


def test_a_prompt_that_the_template_cannot_change_fails_with_its_row(tmp_path: Path) -> None:
    more = "{% block system %}Be kind.{% endblock %}"
    findings = lint(written(tmp_path, "{{ prompt }} {{ answer }}", more), rows=[{"prompt": "1 + 1 =", "answer": "2"}])
    assert any(f.status == "fail" and f.saw.startswith("row 0:") and "plain text" in f.saw for f in findings)


def test_a_placeholder_in_the_students_prompt_is_a_leak(tmp_path: Path) -> None:
    rows = [{**row, "prompt": [{"role": "user", "content": "Add. Hint: {{ answer }}"}]} for row in make_rows()]
    findings = lint(written(tmp_path, "{{ prompt }} {{ answer }}"), rows=rows)
    assert any(f.check == "leaks" and f.status == "fail" and "'{{ answer }}'" in f.saw for f in findings)


def test_the_command_reads_a_dataset_and_a_model_and_exits_with_1_on_a_failure(
    tmp_path: Path, llama_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    data = ["--dataset_name", str(tmp_path / "rows.jsonl"), "--model", llama_folder]
    assert main(["lint", "answer_only", "worked_solution", *data]) == 0
    assert capsys.readouterr().out.count("12 rows rendered") == 2
    assert main(["lint", "answer_only", "hint", *data]) == 1
    out = capsys.readouterr().out
    assert "no column hint" in out and "✗" in out


@pytest.mark.parametrize(
    "user",
    [
        "{{ prompt }} {{ solution | last_boxed }}",
        "{{ prompt }} {% for turn in demos %}{{ turn.role }}{% endfor %}",
        "{{ prompt }} {{ score | round(2) }}",
    ],
)
def test_a_template_that_made_up_values_do_not_fit_is_not_failed_for_it(user: str, tmp_path: Path) -> None:
    findings = lint(written(tmp_path, user))
    assert {f.status for f in findings} == {"pass", "skip"}
