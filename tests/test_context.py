"""PrivilegedContext and PromptRenderer: the teacher's prompt, what is refused, what is shortened."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import make_tokenizer
from datasets import Dataset
from transformers import ByT5Tokenizer

from opsd import sources
from opsd.contexts.privileged import PrivilegedContext
from opsd.contexts.reading import as_context, parse_context
from opsd.contexts.renderer import PromptRenderer
from opsd.data.needs import check_columns, check_rows
from opsd.errors import ConfigError, DataError, TemplateError

README = (sources.folder("templates") / "README.md").read_text()
ROW: dict[str, Any] = json.loads(re.search(r"```json\n(.*?)```", README, re.DOTALL)[1])
QUESTION = ROW["prompt"][0]["content"]
NAMES = [name for name in sources.names("templates") if name != "base"]


def user_block(body: str, **settings: Any) -> PrivilegedContext:
    return PrivilegedContext.from_string("{% block user %}\n" + body + "\n{% endblock %}", **settings)


def user_turn(context: PrivilegedContext, row: dict[str, Any], rollout_fields: dict[str, Any] | None = None) -> str:
    return context.messages(row, rollout_fields)[0][-1]["content"]


@pytest.fixture(scope="module")
def renderer() -> PromptRenderer:
    return PromptRenderer(make_tokenizer())


# ---------------------------------------------------------------- the shipped templates


@pytest.mark.parametrize("name", sources.names("templates"))
def test_shipped_template_opens_with_one_line_that_says_what_it_is(name: str) -> None:
    first = sources.find("templates", name).read_text().splitlines()[0]
    assert re.fullmatch(r"\{#- .+\. -#\}", first)


@pytest.mark.parametrize("name", sources.names("templates"))
def test_shipped_template_renders_as_its_readme_entry_shows(name: str) -> None:
    keywords = {"enable_thinking": True} if name == "base" else None
    messages, prefill = PrivilegedContext(name, chat_template_kwargs=keywords).messages(ROW)
    entry = re.search(rf"^### {name}\n.*?```text\n(.*?)\n```", README, re.DOTALL | re.MULTILINE)
    assert entry, f"templates/README.md has no entry for {name}"
    assert entry[1] == "\n\n".join(f"[{turn['role']}]\n{turn['content']}" for turn in messages)
    assert prefill == ""


@pytest.mark.parametrize("name", NAMES)
def test_shipped_template_shows_every_field_and_keeps_the_question(name: str, renderer: PromptRenderer) -> None:
    context = PrivilegedContext(name)
    text = renderer.tokenizer.decode(context.render(ROW, renderer=renderer))
    for field in context.fields | context.optional_fields:
        assert ROW[field] in text
        assert f"`{field}`" in README.split(f"### {name}\n")[1].split("```")[0]
    assert QUESTION in text
    assert context.counts.bare == 0
    assert context.render(ROW, renderer=renderer) != renderer.ids(ROW["prompt"])


def test_answer_only_reads_as_the_demo_was_measured_with() -> None:
    text = user_turn(PrivilegedContext("answer_only"), ROW)
    assert text == f"{QUESTION}\n\nThe correct answer is 19. Answer with it."


def test_base_alone_is_refused_unless_the_chat_template_makes_the_difference(renderer: PromptRenderer) -> None:
    with pytest.raises(TemplateError, match="adds nothing to the student's prompt"):
        PrivilegedContext("base")
    thinking = PrivilegedContext("base", chat_template_kwargs={"enable_thinking": True})
    ids = thinking.render(ROW, renderer=renderer)
    assert renderer.tokenizer.decode(ids).endswith("<|im_start|>assistant\n<think>\n")
    assert thinking.counts.bare == 1


def test_feedback_needs_one_of_its_two_columns() -> None:
    context = PrivilegedContext("feedback")
    assert (context.fields, context.optional_fields) == (frozenset(), {"solution", "feedback"})
    with pytest.raises(DataError, match=r"'feedback' or 'solution'.*has: prompt, answer"):
        check_columns(["prompt", "answer"], context.needs)
    thinking = PrivilegedContext("feedback", chat_template_kwargs={"enable_thinking": True})
    with pytest.raises(DataError, match="'feedback' or 'solution'"):
        check_columns(["prompt"], thinking.needs)
    assert context.missing(["feedback"]) == []
    check_columns(["prompt", "solution"], context.needs)
    rows = [{"solution": None}, {"solution": "s"}, {"feedback": "f"}, {"solution": "", "feedback": " "}]
    with pytest.raises(DataError, match="2 rows of the train dataset: 0, 3"):
        check_rows(Dataset.from_list([{"solution": None, "feedback": None, **row} for row in rows]), context.needs)


def test_feedback_without_anything_to_show_leaves_the_prompt_alone_and_counts_it(renderer: PromptRenderer) -> None:
    context = PrivilegedContext("feedback")
    row = {"prompt": ROW["prompt"], "solution": None}
    assert context.render(row, {"feedback": " "}, renderer=renderer) == renderer.ids(row["prompt"])
    assert (context.counts.rendered, context.counts.bare) == (1, 1)


# ---------------------------------------------------------------- ids


@pytest.mark.parametrize("keywords", [{}, {"enable_thinking": True}])
@pytest.mark.parametrize("own_template", [True, False])
def test_student_ids_are_those_that_trl_samples_from(
    renderer: PromptRenderer, keywords: dict[str, Any], own_template: bool
) -> None:
    from trl.trainer.distillation_trainer import DistillationTrainer

    training = None if own_template else renderer.tokenizer.chat_template.replace("<think>", "<training>")
    ours = PromptRenderer(renderer.tokenizer, chat_template=training, chat_template_kwargs=keywords)
    trl = SimpleNamespace(
        _is_vlm=False,
        processing_class=renderer.tokenizer,
        tools=[],
        chat_template=training,
        chat_template_kwargs=keywords,
    )
    system = {"role": "system", "content": "Be kind."}
    for prompts in ([ROW["prompt"], [system, *ROW["prompt"]]], ["What is 1 + 1?", "Say 2."]):
        assert [ours.ids(prompt) for prompt in prompts] == DistillationTrainer._tokenize_prompts(trl, prompts)[0]


def test_ids_by_way_of_text_are_the_ids_of_the_chat_template(renderer: PromptRenderer) -> None:
    plain, prefilled = renderer.ids(ROW["prompt"]), renderer.ids(ROW["prompt"], "<think>\n")
    assert prefilled[: len(plain)] == plain
    assert renderer.tokenizer.decode(prefilled[len(plain) :]) == "<think>\n"
    text = renderer.tokenizer.apply_chat_template(ROW["prompt"], tokenize=False, add_generation_prompt=True)
    assert renderer.tokenizer(text, add_special_tokens=False)["input_ids"] == plain


def test_tools_reach_the_chat_template_and_an_empty_list_does_not(renderer: PromptRenderer) -> None:
    shows = "{% if tools is not none %}Tools: {{ tools[0].function.name }}{% endif %}"
    tool = {"type": "function", "function": {"name": "clock", "description": "The time.", "parameters": {}}}
    for tools, expected in ((None, ""), ([], ""), ([tool], "Tools: clock")):
        ids = PromptRenderer(renderer.tokenizer, chat_template=shows, tools=tools).ids(ROW["prompt"])
        assert renderer.tokenizer.decode(ids) == expected


def test_context_keywords_go_over_those_of_the_renderer(renderer: PromptRenderer) -> None:
    student = PromptRenderer(renderer.tokenizer, chat_template_kwargs={"enable_thinking": True})
    quiet = PrivilegedContext("hint", chat_template_kwargs={"enable_thinking": False})
    assert "<think>" in renderer.tokenizer.decode(PrivilegedContext("hint").render(ROW, renderer=student))
    assert "<think>" not in renderer.tokenizer.decode(quiet.render(ROW, renderer=student))
    assert student.chat_template_kwargs == {"enable_thinking": True}


def test_a_bridge_ends_the_teachers_prompt_in_an_open_thinking_block(renderer: PromptRenderer) -> None:
    """OPSD #10: a student that reasons in plain text, under a teacher that thinks."""
    bridged = PrivilegedContext("hint", bridge_thinking=True)
    ids = bridged.render(ROW, renderer=renderer)
    assert renderer.tokenizer.decode(ids).endswith("<|im_start|>assistant\n<think>\n")
    plain = PrivilegedContext("hint").render(ROW, renderer=renderer)
    assert ids[: len(plain)] == plain
    # where the chat template opens the block itself, it is not opened twice
    thinking = PrivilegedContext("hint", bridge_thinking=True, chat_template_kwargs={"enable_thinking": True})
    assert renderer.tokenizer.decode(thinking.render(ROW, renderer=renderer)).count("<think>") == 1
    # a prefill of the template's own stands within it
    own = PrivilegedContext.from_string(
        "{% extends 'hint.jinja' %}{% block assistant %}So, {% endblock %}", bridge_thinking=True
    )
    assert renderer.tokenizer.decode(own.render(ROW, renderer=renderer)).endswith("assistant\n<think>\nSo, ")


def test_a_bridge_into_a_block_that_is_closed_already_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<think>\n", "<think>\n\n</think>\n")
    closed = PromptRenderer(tokenizer, chat_template_kwargs={"enable_thinking": True})
    with pytest.raises(ConfigError, match="its chat template has closed one"):
        PrivilegedContext("hint", bridge_thinking=True).render(ROW, renderer=closed)


# ---------------------------------------------------------------- turns and parts


def test_only_the_last_user_turn_changes() -> None:
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]},
        {"role": "tool", "content": "noon"},
        {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "1 + 1?"}]},
        {"role": "assistant", "content": "Well,"},
    ]
    row = {"prompt": turns, "answer": 2}
    before = copy.deepcopy(row)
    messages, _ = PrivilegedContext("answer_only").messages(row)
    answered = {"role": "user", "content": "What is 1 + 1?\n\nThe correct answer is 2. Answer with it."}
    assert messages == [*turns[:4], answered, turns[5]]
    assert row == before


@pytest.mark.parametrize("own", [None, "Be kind."])
def test_system_block_follows_replaces_or_adds_the_system_turn(own: str | None) -> None:
    row = {"prompt": [{"role": "system", "content": own}] * (own is not None) + ROW["prompt"], "rule": "Be brief."}
    replaced = PrivilegedContext.from_string("{% block system %} {{ rule }} {% endblock %}")
    for context, expected in (
        (replaced, "Be brief."),
        (PrivilegedContext("system_rule"), "Be kind.\n\nBe brief." if own else "Be brief."),
    ):
        assert context.messages(row)[0] == [{"role": "system", "content": expected}, *ROW["prompt"]]


def test_blank_and_unchanged_blocks_leave_their_turns_to_the_letter() -> None:
    turns = [{"role": "system", "content": " Be kind.\n"}, {"role": "user", "content": "  What?\n"}]
    source = "{% extends 'base.jinja' %}{% block system %}{% if rule is defined %}{{ rule }}{% endif %}{% endblock %}"
    context = PrivilegedContext.from_string(source + "{% block assistant %}The answer{% endblock %}")
    assert context.messages({"prompt": turns, "rule": None}) == (turns, "The answer")


def test_prefill_is_kept_to_the_letter_but_for_a_leading_newline(renderer: PromptRenderer) -> None:
    context = PrivilegedContext.from_string(
        '{% extends "hint.jinja" %}\n{% block assistant %}\n\n<think>\n {{ answer }} \n{% endblock %}'
    )
    assert context.fields == {"hint", "answer"}
    assert context.messages(ROW)[1] == "<think>\n 19 \n"
    text = renderer.tokenizer.decode(context.render(ROW, renderer=renderer))
    assert text.endswith("<|im_start|>assistant\n<think>\n 19 \n")


def test_text_prompts_stay_text_and_have_only_the_user_block(renderer: PromptRenderer) -> None:
    row = {"prompt": "1 + 1 = ", "answer": 2, "rule": "Be brief."}
    context = user_block("The answer is {{ answer }}. {{ messages[0].content }}")
    assert context.messages(row) == ("The answer is 2. 1 + 1 =", "")
    assert context.render(row, renderer=renderer) == renderer.tokenizer("The answer is 2. 1 + 1 =")["input_ids"]
    for lost in (
        PrivilegedContext("system_rule"),
        PrivilegedContext.from_string("{% block assistant %}a{% endblock %}"),
    ):
        with pytest.raises(DataError, match="plain text"):
            lost.messages(row)


def test_values_are_inserted_as_they_are() -> None:
    row = {"prompt": ROW["prompt"], "answer": "{{ 7 * 7 }} <b> & {% raw %}", "extra": [1, 2], "zero": 0}
    assert user_turn(user_block("{{ answer }}|{{ extra }}|{{ zero }}"), row) == row["answer"] + "|1\n2|0"


def test_produced_values_win_over_columns_of_the_same_name() -> None:
    assert user_turn(user_block("{{ solution }}"), ROW, {"solution": "mine"}) == "mine"


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        (None, "this row's is None"),
        (["Hi"], "list of messages"),
        ([{"role": "system", "content": "Hi"}], "needs a user turn; this row has: system"),
        ([], "needs a user turn; this row has: no turns"),
        ([{"role": "user", "content": [{"type": "image", "image": "x.png"}]}], "text only"),
    ],
)
def test_prompt_that_cannot_be_used_is_named(prompt: Any, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        PrivilegedContext("hint").messages({"prompt": prompt, "hint": "h"})


# ---------------------------------------------------------------- columns and rows


def test_missing_column_is_named_with_the_nearest_and_the_templates_that_fit() -> None:
    needs = PrivilegedContext("worked_solution").needs
    with pytest.raises(DataError) as error:
        check_columns(["prompt", "answer", "solutions"], needs)
    message = str(error.value)
    assert (
        "'worked_solution' needs the column 'solution', and the train dataset has: prompt, answer, solutions."
        in message
    )
    assert "Did you mean 'solutions'?" in message
    assert "have no more information than the student's" in message
    assert "pick a template for these columns: `opsd templates --columns prompt,answer,solutions`." in message


@pytest.mark.parametrize("row", [{"answer": None}, {"answer": "  "}, {"answers": "19"}])
def test_rendering_refuses_a_needed_field_without_a_value(row: dict[str, Any]) -> None:
    with pytest.raises(TemplateError, match="'answer_only' needs 'answer', which is"):
        PrivilegedContext("answer_only").messages({"prompt": ROW["prompt"], **row})


# ---------------------------------------------------------------- length


def long_row(words: int = 60) -> dict[str, Any]:
    return {"prompt": ROW["prompt"], "solution": " ".join(f"w{i}" for i in range(words)), "answer": "19"}


def limited(limit: int, side: str = "tail", **settings: Any) -> PrivilegedContext:
    settings = {"truncate": "solution", "truncate_side": side, "max_prompt_tokens": limit} | settings
    return PrivilegedContext("worked_solution", **settings)


@pytest.mark.parametrize(
    ("cut", "shape"),
    [("tail", r"w0 w1 .* …"), ("head", r"… .* w58 w59"), ("middle", r"w0 w1 .* … .* w58 w59")],
)
def test_only_the_named_field_is_shortened_and_by_as_little_as_possible(
    renderer: PromptRenderer, cut: str, shape: str
) -> None:
    row = long_row()
    whole = PrivilegedContext("worked_solution").render(row, renderer=renderer)
    context = limited(len(whole) - 40, cut)
    ids = context.render(row, renderer=renderer)
    assert len(whole) - 50 < len(ids) <= len(whole) - 40
    before, after = renderer.tokenizer.decode(whole).split(row["solution"])
    text = renderer.tokenizer.decode(ids)
    assert text.startswith(before) and text.endswith(after)
    assert re.fullmatch(shape, text[len(before) : -len(after)])
    assert (context.counts.rendered, context.counts.shortened) == (1, 1)
    assert context.counts.tokens_cut == len(whole) - len(ids)


def test_prompt_that_just_fits_is_left_alone(renderer: PromptRenderer) -> None:
    row = long_row()
    whole = PrivilegedContext("worked_solution").render(row, renderer=renderer)
    context = limited(len(whole))
    assert context.render(row, renderer=renderer) == whole
    assert (context.counts.rendered, context.counts.shortened, context.counts.tokens_cut) == (1, 0, 0)


@pytest.mark.parametrize("cut", ["head", "tail", "middle"])
def test_shortening_never_cuts_through_a_character(renderer: PromptRenderer, cut: str) -> None:
    row = {"prompt": ROW["prompt"], "solution": "añ€𝄞漢字" * 12}
    size = len(PrivilegedContext("worked_solution").render(row, renderer=renderer))
    for limit in range(size - 100, size - 60):
        ids = limited(limit, cut).render(row, renderer=renderer)
        text = renderer.tokenizer.decode(ids)
        assert len(ids) <= limit
        assert "…" in text and "\N{REPLACEMENT CHARACTER}" not in text


def test_slow_tokenizer_shortens_by_characters() -> None:
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    row = {"prompt": "What is 12 + 7?", "solution": "añ€𝄞漢字" * 12}
    ids = limited(250).render(row, renderer=PromptRenderer(tokenizer))
    assert 250 - 8 < len(ids) <= 250
    assert "only:\nañ€𝄞" in tokenizer.decode(ids) and "…" in tokenizer.decode(ids)


def test_produced_text_is_shortened_like_a_column(renderer: PromptRenderer) -> None:
    context = PrivilegedContext("feedback", truncate="feedback", max_prompt_tokens=100)
    ids = context.render({"prompt": ROW["prompt"], "feedback": "old"}, {"feedback": "new " * 200}, renderer=renderer)
    assert len(ids) <= 100
    assert "new new" in renderer.tokenizer.decode(ids)


def test_question_longer_than_the_limit_is_an_error_whatever_is_cut(renderer: PromptRenderer) -> None:
    with pytest.raises(DataError, match="even with one token of 'solution'"):
        limited(20).render(long_row(), renderer=renderer)


def test_too_long_without_leave_to_shorten_says_what_could_be(renderer: PromptRenderer) -> None:
    with pytest.raises(DataError, match=r"has \d+ tokens .* is 50\.(?s:.*)truncate=: solution\)"):
        limited(50, truncate=None).render(long_row(), renderer=renderer)


def test_only_text_can_be_shortened(renderer: PromptRenderer) -> None:
    with pytest.raises(DataError, match=r"holds no text here: \{'step': "):
        limited(50).render({"prompt": ROW["prompt"], "solution": {"step": "one " * 90}}, renderer=renderer)


# ---------------------------------------------------------------- how a context is named


def test_every_way_to_name_a_context_is_understood(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{% block user %}{{ answer }}{% endblock %}")
    assert as_context(None) is None
    context = as_context({"template": "worked_solution", "truncate": "solution"})
    assert isinstance(context, PrivilegedContext) and as_context(context) is context
    assert (context.name, context.truncate, context.max_prompt_tokens) == ("worked_solution", "solution", None)
    assert as_context("hint").name == "hint"
    assert as_context(path).name == as_context(str(path)).name == "own"
    assert as_context({"levels": ["hint", path, "none"]}).name == "schedule of hint, own, none"


def test_a_context_on_the_command_line_is_a_name_a_path_json_or_none(tmp_path: Path) -> None:
    assert parse_context(None) is None and parse_context("none") is None
    assert parse_context("hint").name == "hint"
    assert parse_context(' {"template": "partial_solution", "reveal": 0.3}').columns == {"solution"}
    assert parse_context('{"levels": ["hint", "none"]}').name == "schedule of hint, none"
    with pytest.raises(ConfigError, match="is read as a mapping, and is none"):
        parse_context("{template: hint")


def test_path_is_never_looked_up_among_the_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("hint.jinja", "./hint", Path("hint")):
        with pytest.raises(TemplateError, match="no template file"):
            PrivilegedContext(path)
    Path("hint.jinja").write_text("{% block user %}{{ mine }}{% endblock %}")
    assert PrivilegedContext("hint.jinja").fields == {"mine"}
    assert PrivilegedContext("hint").fields == {"hint"}


@pytest.mark.parametrize(
    ("value", "error", "problem"),
    [
        ("answer_onyl", TemplateError, "Did you mean 'answer_only'"),
        ({"template": "hint", "trunkate": "hint"}, ConfigError, "'trunkate'. Did you mean 'truncate'"),
        ({"truncate": "hint"}, ConfigError, "needs the key 'template'"),
        (3, ConfigError, "not int"),
        ({"template": "hint", "truncate": "hnit"}, ConfigError, "Did you mean 'hint'"),
        ({"template": "concise", "truncate": "prompt"}, ConfigError, "Its fields: none"),
        (
            {"template": "hint", "truncate_side": "left"},
            ConfigError,
            "is 'left', and must be one of head, tail, middle",
        ),
        ({"template": "hint", "max_prompt_tokens": 0}, ConfigError, "at least 1"),
        ({"levels": ["hint", "none"], "fallback": {"hint": "none"}}, ConfigError, "the next level in the order"),
    ],
)
def test_wrong_setting_is_refused(value: Any, error: type[Exception], problem: str) -> None:
    with pytest.raises(error, match=problem):
        as_context(value)


def test_the_readmes_own_template_works() -> None:
    context = PrivilegedContext.from_string(re.search(r"```jinja\n(.*?)```", README, re.DOTALL)[1])
    assert (context.fields, context.optional_fields) == ({"answer"}, {"unit"})
    assert user_turn(context, ROW, {"unit": "apples"}) == f"{QUESTION} The answer is 19 apples."
