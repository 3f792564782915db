"""What a column may hold and how it reads in a template; the filters; where texts may be cut."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import make_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from opsd.contexts.filters import last_boxed, number_lines, read_by, strip_thinking, truncate_tokens
from opsd.contexts.privileged import PrivilegedContext
from opsd.contexts.renderer import PromptRenderer
from opsd.contexts.truncation import ELLIPSIS, count_tokens, first_share, longest_that_fits
from opsd.errors import ConfigError, TemplateError

TOKENIZER = make_tokenizer()
SIDE = PromptRenderer(TOKENIZER)
PROMPT = [{"role": "user", "content": "What?"}]
PROSE = "First take the tens. Then add the ones! Is it nineteen?\nYes, it is.\n\nSo the answer is 19."


def shown(body: str, side: PromptRenderer | None = SIDE, **row: Any) -> str:
    context = PrivilegedContext.from_string("{% block user %}" + body + "{% endblock %}")
    return context.messages({"prompt": PROMPT, **row}, side=side)[0][-1]["content"]


# ---------------------------------------------------------------- values


def test_messages_are_written_by_the_tokenizers_own_template_and_never_as_python_prints_them() -> None:
    """TRL PR 5990: a conversational context reached the teacher as "[{'role': …"."""
    turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "It is 2."}]
    text = shown("{{ talk }}", talk=turns)
    assert text == TOKENIZER.apply_chat_template(turns, tokenize=False).strip()
    assert "role" not in text and "<|im_start|>assistant\nIt is 2.<|im_end|>" in text


def test_messages_without_a_chat_template_say_how_to_write_them() -> None:
    bare = make_tokenizer()
    bare.chat_template = None
    talk = [{"role": "user", "content": "1 + 1?"}]
    with pytest.raises(TemplateError, match=r"no chat template to write them.*\n?.*for turn in"):
        shown("{{ talk }}", PromptRenderer(bare), talk=talk)
    loop = "{% for turn in talk %}{{ turn.role }}: {{ turn.content }}{% endfor %}"
    assert shown(loop, PromptRenderer(bare), talk=talk) == "user: 1 + 1?"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (19, "19"),
        (0.5, "0.5"),
        (True, "True"),
        (["first", "second"], "first\nsecond"),
        ([1, 2.5], "1\n2.5"),
        ({"unit": "cm", "Größe": 3}, '{"unit": "cm", "Größe": 3}'),
        ([{"a": 1}], '{"a": 1}'),
    ],
)
def test_other_values_read_as_a_person_would_write_them(value: Any, text: str) -> None:
    assert shown("[{{ value }}]", value=value) == f"[{text}]"


# ---------------------------------------------------------------- filters


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>hm, 18?</think>It is 19.", "It is 19."),
        ("hm, 18?</think>\nIt is 19.", "It is 19."),  # the chat template had opened the block
        ("It is 19. <think>or is it", "It is 19."),
        ("<think>a</think>b<think>c</think>d", "d"),
        ("It is 19.", "It is 19."),
    ],
)
def test_strip_thinking_leaves_what_was_answered(text: str, answer: str) -> None:
    assert strip_thinking(text) == answer


def test_last_boxed_finds_the_last_whole_box_with_its_braces() -> None:
    assert last_boxed(r"\boxed{1} and \boxed{\frac{a}{b}} end") == r"\frac{a}{b}"
    for text in ("no box", r"\boxed{open {a}"):
        with pytest.raises(TemplateError, match="last_boxed finds no whole"):
            shown("{{ text | last_boxed }}", text=text)


def test_number_lines_counts_lines_that_say_something() -> None:
    assert number_lines("a\n\n  b\nc") == "1. a\n2.   b\n3. c"
    assert shown("{{ steps | number_lines }}", steps=["add", "carry"]) == "1. add\n2. carry"


@pytest.mark.parametrize("at", ["token", "sentence", "line"])
@pytest.mark.parametrize("side", ["head", "tail", "middle"])
@pytest.mark.parametrize("count", [8, 13, 20])
def test_truncate_tokens_keeps_to_its_count_and_shows_the_gap(at: Any, side: Any, count: int) -> None:
    with read_by(SIDE):
        cut = truncate_tokens(PROSE, count, side, at)
        assert truncate_tokens(PROSE, 1000, side, at) == PROSE
    assert count_tokens(cut, TOKENIZER) <= count < count_tokens(PROSE, TOKENIZER)
    assert ELLIPSIS in cut


def test_truncate_tokens_that_would_leave_nothing_is_an_error() -> None:
    with pytest.raises(TemplateError, match=r"truncate_tokens\(1\) leaves nothing"):
        shown("{{ text | truncate_tokens(1) }}", text="añ€𝄞漢字" * 9)


@pytest.mark.parametrize("share", [0, -0.1, 1.5])
def test_reveal_of_no_share_is_an_error(share: float) -> None:
    with pytest.raises(TemplateError, match="above 0 and up to 1"):
        shown("{{ text | reveal(" + str(share) + ") }}", text="a b c")


# ---------------------------------------------------------------- boundaries


@pytest.mark.parametrize(
    ("at", "pieces"),
    [
        ("line", ["First take the tens. Then add the ones! Is it nineteen?", "Yes, it is.", "So the answer is 19."]),
        (
            "sentence",
            ["First take the tens.", "Then add the ones!", "Is it nineteen?", "Yes, it is.", "So the answer is 19."],
        ),
    ],
)
def test_texts_are_cut_between_lines_and_sentences(at: Any, pieces: list[str]) -> None:
    for kept in range(1, len(pieces)):
        short = longest_that_fits(PROSE, "tail", at, TOKENIZER, lambda cut, k=kept: cut.count(pieces[k]) == 0)
        assert short.startswith(pieces[0]) and short.endswith(ELLIPSIS)
        assert pieces[kept - 1] in short and pieces[kept] not in short
    for cut_side, first, last in (("head", ELLIPSIS, pieces[-1]), ("middle", pieces[0], pieces[-1])):
        short = longest_that_fits(PROSE, cut_side, at, TOKENIZER, lambda cut: len(cut) < 85)
        assert short.startswith(first) and short.endswith(last) and ELLIPSIS in short


def test_a_piece_too_large_is_cut_at_the_next_finer_boundary() -> None:
    one_line = "First take the tens. Then add the ones! Is it nineteen?"
    short = longest_that_fits(one_line, "tail", "line", TOKENIZER, lambda cut: len(cut) < 45)
    assert short == f"First take the tens. Then add the ones! {ELLIPSIS}"
    short = longest_that_fits("nineteen " * 9, "tail", "line", TOKENIZER, lambda cut: len(cut) < 30)
    assert short.startswith("nineteen nineteen") and short.endswith(ELLIPSIS)


def test_lists_lose_whole_items() -> None:
    steps = ["one", "two", "three", "four"]
    fits = lambda cut: len(cut) <= 3  # noqa: E731
    assert longest_that_fits(steps, "tail", "line", TOKENIZER, fits) == ["one", "two", ELLIPSIS]
    assert longest_that_fits(steps, "head", "line", TOKENIZER, fits) == [ELLIPSIS, "three", "four"]
    assert longest_that_fits(steps, "middle", "line", TOKENIZER, fits) == ["one", ELLIPSIS, "four"]
    assert longest_that_fits(19, "tail", "line", TOKENIZER, fits) is None


@given(st.text(min_size=1).filter(str.strip), st.floats(0.01, 1.0), st.sampled_from(["line", "sentence", "token"]))
def test_a_share_is_a_beginning_and_no_longer_than_its_share(text: str, share: float, at: Any) -> None:
    part = first_share(text, share, at, TOKENIZER)
    if share == 1.0:
        assert part == text
        return
    told = part.removesuffix(ELLIPSIS).rstrip()
    assert text.startswith(told)
    tokens = count_tokens(text, TOKENIZER)
    assert count_tokens(told, TOKENIZER) <= max(1, int(share * tokens)) + 4  # a character is kept whole: up to four


def test_the_setting_reveal_is_the_filter_reveal() -> None:
    text = "First take twelve and seven, then add the ones and the tens of both."
    source = "{% block user %}{{ prompt }} [{{ text BODY }}]{% endblock %}"
    by_setting = PrivilegedContext.from_string(source.replace("BODY", ""), reveal=0.3)
    by_filter = PrivilegedContext.from_string(source.replace("BODY", "| reveal(0.3)"))
    row = {"prompt": PROMPT, "text": text}
    assert by_setting.render(row, side=SIDE) == by_filter.render(row, side=SIDE)
    shown_text = by_setting.messages(row, side=SIDE)[0][0]["content"].partition("[")[2]
    assert count_tokens(shown_text.partition(" …")[0], TOKENIZER) == int(0.3 * count_tokens(text, TOKENIZER))


def test_fields_can_change_places() -> None:
    source = "{% block user %}{{ prompt }} {{ a }} {{ b }}{% endblock %}"
    context = PrivilegedContext.from_string(source, fields={"a": "b", "b": "a"})
    assert context.messages({"prompt": PROMPT, "a": "A", "b": "B"})[0][0]["content"] == "What? B A"


def test_messages_in_a_field_bring_no_tools_and_no_first_token() -> None:
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<|pad|>"
    tokenizer.chat_template = "{{ bos_token }}{% if tools %}TOOLS {% endif %}" + tokenizer.chat_template
    tool = {"type": "function", "function": {"name": "clock", "description": "The time.", "parameters": {}}}
    side = PromptRenderer(tokenizer, tools=[tool])
    assert shown("{{ talk }}", side, talk=PROMPT) == "<|im_start|>user\nWhat?<|im_end|>"


def test_an_empty_system_turn_is_refused() -> None:
    with pytest.raises(ConfigError, match="system is empty"):
        PrivilegedContext("answer_only", system=" ")


def test_a_value_for_all_rows_needs_no_column() -> None:
    context = PrivilegedContext("system_rule", values={"rule": "Answer in one word."})
    context.check_columns(["prompt"])
    assert context.messages({"prompt": PROMPT})[0][0] == {"role": "system", "content": "Answer in one word."}
    with pytest.raises(ConfigError, match=r"values names 'rul'.*Did you mean 'rule'"):
        PrivilegedContext("system_rule", values={"rul": "Answer in one word."})
