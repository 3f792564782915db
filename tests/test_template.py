"""Templates: the fields they need, the blocks of parents that are rendered, what is refused and where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opsd.contexts.privileged import PrivilegedContext
from opsd.errors import TemplateError

QUESTION = "What is 12 + 7?"
ROW = {"prompt": [{"role": "user", "content": QUESTION}], "answer": "19", "hint": "Add 8, then take 1 away."}


def user_block(body: str) -> PrivilegedContext:
    return PrivilegedContext.from_string("{% block user %}\n" + body + "\n{% endblock %}")


def user_turn(context: PrivilegedContext, row: dict[str, Any]) -> str:
    return context.messages(row)[0][-1]["content"]


@pytest.mark.parametrize(
    ("body", "needed", "optional"),
    [
        ("{{ a }} {{ b.c }} {{ prompt }} {{ system }} {{ messages }}", {"a", "b"}, set()),
        ("{% for x in a %}{{ loop.index }} {{ x }}{% endfor %}{% set y = b %}{{ y }}", {"a", "b"}, set()),
        ("{% if a is defined %}{{ a }}{% endif %}{{ b | default('none') | upper }}", set(), {"a", "b"}),
        ("{% if a is not defined %}no {{ c }}{% endif %}{{ b | d('') }}{{ a.b | default('') }}", {"c"}, {"a", "b"}),
        ("{% if a is undefined %}none{% endif %}", set(), {"a"}),
        ("{% if a %}{{ a }}{% endif %}", {"a"}, set()),
    ],
)
def test_fields_are_what_the_template_reads_and_optional_where_it_asks_first(
    body: str, needed: set[str], optional: set[str]
) -> None:
    context = user_block(body)
    assert (context.fields, context.optional_fields) == (needed, optional)


def test_fields_come_from_parents_and_includes_but_not_from_replaced_blocks(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text('{% extends "answer_only.jinja" %}{% block system %}{{ rule }}{% endblock %}')
    (tmp_path / "unit.jinja").write_text("in {{ unit }}")
    child = tmp_path / "child.jinja"
    child.write_text(
        '{% extends "mine.jinja" %}{% block user %}{{ super() }} {% include "unit.jinja" %}{{ c }}{% endblock %}'
    )
    assert PrivilegedContext(child).fields == {"answer", "rule", "unit", "c"}
    child.write_text('{% extends "mine.jinja" %}{% block user %}{{ c }}{% endblock %}')
    context = PrivilegedContext(str(child))
    assert (context.name, context.fields) == ("child", {"rule", "c"})


def test_block_inside_a_parents_block_can_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "elder.jinja").write_text("{% block user %}{{ prompt }} {% block more %}{% endblock %}{% endblock %}")
    (tmp_path / "child.jinja").write_text("{% extends 'elder.jinja' %}{% block more %}{{ answer }}{% endblock %}")
    assert user_turn(PrivilegedContext(tmp_path / "child.jinja"), ROW) == f"{QUESTION} 19"


def test_tags_on_lines_of_their_own_leave_no_blank_space() -> None:
    context = user_block("A\n    {% if hint is defined %}\nB {{ hint }}\n    {% endif %}\nC")
    assert user_turn(context, ROW) == f"A\nB {ROW['hint']}\nC"


def test_super_says_what_the_parent_says() -> None:
    context = PrivilegedContext.from_string(
        '{% extends "hint.jinja" %}{% block user %}{{ super() }}\nIt is {{ answer }}.{% endblock %}'
    )
    assert user_turn(context, ROW) == f"{QUESTION}\n\nHint: {ROW['hint']}\n\nIt is 19."


def test_optional_field_without_a_value_counts_as_missing() -> None:
    context = user_block("{% if unit is defined %}[{{ unit }}]{% endif %}{{ hint | default('no hint') }}")
    assert user_turn(context, {"prompt": ROW["prompt"], "unit": "", "hint": None}) == "no hint"
    assert user_turn(context, {"prompt": ROW["prompt"], "unit": "cm", "hint": 0}) == "[cm]0"


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{% block user %}\n{% if %}{% endblock %}", "does not parse.*mine.jinja, line 2"),
        ("{% block user %}\n\n{{ answer | shout }}{% endblock %}", "line 3.*'shout'"),
        ("{% extends 'hints.jinja' %}", "'mine.jinja' extends or includes 'hints.jinja'.*Did you mean 'hint'"),
        ("{% extends 'mine.jinja' %}", "extends itself: mine.jinja -> mine.jinja"),
        ("{% extends answer %}", "computes the name"),
        ("{% extends ['base.jinja', 'hint.jinja'] %}", "is not the name of one file"),
        ("{% extends 'base.jinja' %}\n{{ answer }}", "line 2: this is outside every block"),
        ("The answer is {{ answer }}.", "line 1: this is outside every block"),
        ("{% set x = 1 %}{% block user %}{{ x }}{% endblock %}", "outside every block"),
        ("{% block usr %}{{ answer }}{% endblock %}", "block 'usr' is in no parent.*Did you mean 'user'"),
        ("{% extends 'base.jinja' %}", "adds nothing to the student's prompt"),
        ("{% block user %} {{ prompt }} {# the question #}{% endblock %}", "adds nothing to the student's prompt"),
        ("{% block system %}{{ system }}{% endblock %}", "adds nothing to the student's prompt"),
    ],
)
def test_template_that_cannot_work_is_refused_at_once(source: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(source)
    with pytest.raises(TemplateError, match=f"(?s){problem}"):
        PrivilegedContext(path)


def test_template_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_bytes("Größe {{ answer }}".encode("latin-1"))
    with pytest.raises(TemplateError, match="UTF-8"):
        PrivilegedContext(tmp_path / "mine.jinja")


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("{{ answer.__class__.__mro__ }}", r"line 2.*unsafe.*\n.*sandbox"),
        ("{{ messages.append(answer) }}", "unsafe"),
        ("\n{{ answer.unit }}", r"line 3.*'unit'.*\nGuard"),
        ("{% if a is defined %}{% endif %}{{ answer }}{{ a }}", r"'a' is undefined"),
        ("{{ answer + 1 }}", "line 2.*concatenate"),
        ("{% for i in range(10 ** 9) %}{{ answer }}{% endfor %}", r"MAX_RANGE.*\nNo prompt needs this much"),
        ("{% for i in range(90000) %}{{ answer * 10 }}{% endfor %}", "more than 1,000,000 characters"),
    ],
)
def test_template_that_fails_on_a_row_names_template_and_line(body: str, problem: str) -> None:
    with pytest.raises(TemplateError, match=f"(?s)'<string>' cannot be rendered.*{problem}"):
        user_block(body).messages(ROW)


def test_failure_in_a_parent_names_the_parents_line(tmp_path: Path) -> None:
    (tmp_path / "elder.jinja").write_text("{% block user %}\n\n{{ answer.unit }}\n{% endblock %}")
    (tmp_path / "child.jinja").write_text("{% extends 'elder.jinja' %}")
    with pytest.raises(TemplateError, match=r"'child' cannot be rendered \(elder.jinja, line 3\)"):
        PrivilegedContext(tmp_path / "child.jinja").messages(ROW)


def test_own_words_are_privilege_enough_and_so_is_reading_the_question() -> None:
    assert user_turn(user_block("{{ prompt }} Be brief."), ROW) == f"{QUESTION} Be brief."
    assert user_turn(user_block("{{ prompt.split('is ')[1] }}"), ROW) == "12 + 7?"
