"""How a field's value is printed in a template; the filters; where texts may be cut; the settings of a context."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import make_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from opsd.contexts.filters import last_boxed, number_lines, strip_thinking
from opsd.contexts.privileged import PrivilegedContext
from opsd.contexts.renderer import PromptRenderer
from opsd.contexts.truncation import ELLIPSIS, first_share, longest_that_fits
from opsd.errors import ConfigError, TemplateError

TOKENIZER = make_tokenizer()
RENDERER = PromptRenderer(TOKENIZER)
PROMPT = [{"role": "user", "content": "What?"}]
PROSE = "First take the tens. Then add the ones! Is it nineteen?\nYes, it is.\n\nSo the answer is 19."


def printed(body: str, renderer: PromptRenderer | None = RENDERER, **row: Any) -> str:
    context = PrivilegedContext.from_string("{% block user %}" + body + "{% endblock %}")
    return context.messages({"prompt": PROMPT, **row}, renderer=renderer)[0][-1]["content"]


def count_tokens(text: str) -> int:
    return len(TOKENIZER(text, add_special_tokens=False)["input_ids"])


# ---------------------------------------------------------------- values


def test_messages_are_written_by_the_tokenizers_own_template_and_never_as_python_prints_them() -> None:
    """TRL PR 5990: a conversational context reached the teacher as "[{'role': …"."""
    turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "It is 2."}]
    text = printed("{{ talk }}", talk=turns)
    assert text == TOKENIZER.apply_chat_template(turns, tokenize=False).strip()
    assert "role" not in text and "<|im_start|>assistant\nIt is 2.<|im_end|>" in text


def test_messages_without_a_chat_template_say_how_to_write_them() -> None:
    bare = make_tokenizer()
    bare.chat_template = None
    talk = [{"role": "user", "content": "1 + 1?"}]
    with pytest.raises(TemplateError, match=r"no chat template to write them; .*for turn in"):
        printed("{{ talk }}", PromptRenderer(bare), talk=talk)
    loop = "{% for turn in talk %}{{ turn.role }}: {{ turn.content }}{% endfor %}"
    assert printed(loop, PromptRenderer(bare), talk=talk) == "user: 1 + 1?"


def test_messages_that_the_chat_template_refuses_can_still_be_written_in_a_loop() -> None:
    strict = make_tokenizer()
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    talk = [{"role": "user", "content": "1 + 1?"}]
    with pytest.raises(TemplateError, match=r"refuses these messages \(roles must alternate\); .*for turn in"):
        printed("{{ talk }}", PromptRenderer(strict), talk=talk)
    assert printed("{{ talk[0].content }}", PromptRenderer(strict), talk=talk) == "1 + 1?"


def test_conversations_within_lists_and_mappings_are_written_too_and_so_is_the_prompt() -> None:
    talk = [{"role": "user", "content": "1 + 1?"}]
    text = "<|im_start|>user\n1 + 1?<|im_end|>"
    assert printed("{{ talks }}|{{ info.talk }}", talks=[talk, talk], info={"talk": talk}) == f"{text}\n{text}|{text}"
    assert printed("{{ messages }}") == "<|im_start|>user\nWhat?<|im_end|>"


def test_some_turns_of_a_conversation_have_no_text_of_their_own_and_say_so() -> None:
    """A slice is no conversation that a chat template has seen; printing it in another form would go unnoticed."""
    talk = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    with pytest.raises(TemplateError, match=r"some turns of a conversation; .*for turn in"):
        printed("{{ talk[:1] }}", talk=talk)
    assert printed("{% for turn in talk[:1] %}{{ turn.content }}{% endfor %}", talk=talk) == "1 + 1?"


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
    assert printed("[{{ value }}]", value=value) == f"[{text}]"


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
            printed("{{ text | last_boxed }}", text=text)


def test_number_lines_counts_lines_that_say_something() -> None:
    assert number_lines("a\n\n  b\nc") == "1. a\n2.   b\n3. c"
    assert printed("{{ steps | number_lines }}", steps=["add", "carry"]) == "1. add\n2. carry"


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


@pytest.mark.slow
@given(st.text(min_size=1).filter(str.strip), st.floats(0.01, 1.0), st.sampled_from(["line", "sentence", "token"]))
def test_a_share_is_a_beginning_and_no_longer_than_its_share(text: str, share: float, at: Any) -> None:
    part = first_share(text, share, at, TOKENIZER)
    if share == 1.0:
        assert part == text
        return
    beginning = part.removesuffix(ELLIPSIS).rstrip()
    assert text.startswith(beginning)
    tokens = count_tokens(text)
    assert count_tokens(beginning) <= max(1, int(share * tokens)) + 4  # a character is kept whole: up to four


@pytest.mark.parametrize("reveal", [0.3, {"text": 0.3}])
def test_reveal_inserts_the_first_share_of_a_field_by_the_tokenizers_tokens(reveal: Any) -> None:
    text = "First take twelve and seven, then add the ones and the tens of both."
    source = "{% block user %}{{ prompt }} [{{ text }}]{% endblock %}"
    context = PrivilegedContext.from_string(source, reveal=reveal)
    row = {"prompt": PROMPT, "text": text}
    content = context.messages(row, renderer=RENDERER)[0][0]["content"].partition("[")[2]
    assert text.startswith(content.partition(" …")[0])
    assert count_tokens(content.partition(" …")[0]) == int(0.3 * count_tokens(text))
    assert content in TOKENIZER.decode(context.render(row, renderer=RENDERER))


@pytest.mark.parametrize("share", [0, -0.1, 1.5, True, "0.5"])
def test_reveal_of_no_share_is_an_error(share: Any) -> None:
    with pytest.raises(ConfigError, match="above 0 and up to 1"):
        PrivilegedContext("worked_solution", reveal=share)


def test_reveal_and_truncate_apply_to_a_conversation_as_its_text() -> None:
    talk = [{"role": "user", "content": "one two three four"}, {"role": "assistant", "content": "five six seven eight"}]
    source = "{% block user %}{{ talk }}{% endblock %}"
    whole = TOKENIZER.apply_chat_template(talk, tokenize=False).strip()
    context = PrivilegedContext.from_string(source, reveal=0.5)
    content = context.messages({"prompt": PROMPT, "talk": talk}, renderer=RENDERER)[0][0]["content"]
    assert content.endswith(" …") and whole.startswith(content.removesuffix(" …")) and len(content) < len(whole)


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
    assert printed("{{ talk }}", side, talk=PROMPT) == "<|im_start|>user\nWhat?<|im_end|>"


def test_an_empty_system_turn_is_refused() -> None:
    with pytest.raises(ConfigError, match="system is empty"):
        PrivilegedContext("answer_only", system=" ")


def test_a_value_for_all_rows_needs_no_column() -> None:
    context = PrivilegedContext("system_rule", values={"rule": "Answer in one word."})
    assert context.needs == ()
    assert context.messages({"prompt": PROMPT})[0][0] == {"role": "system", "content": "Answer in one word."}
    with pytest.raises(ConfigError, match=r"values names 'rul'.*Did you mean 'rule'"):
        PrivilegedContext("system_rule", values={"rul": "Answer in one word."})
