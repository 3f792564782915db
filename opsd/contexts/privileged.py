"""Renders one template for a row: a dataset row in, the ids of the teacher's prompt out.

The template's blocks `system`, `user` and `assistant` are rendered one by one (template.py), so a prompt is built of
turns and no text is parsed back into turns. A template of unknown origin is tried in a child process first (trial.py).
Knows nothing of models, teachers, completions or training.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from opsd.contexts.base import Context, ContextCounts, check_keys
from opsd.contexts.filters import as_text
from opsd.contexts.markup import check_not_a_chat
from opsd.contexts.messages import (
    Prompt,
    Turns,
    block_positions,
    changed_text,
    plain_text,
    read_examples,
    turns_of,
    with_blocks,
    with_conversations,
)
from opsd.contexts.renderer import PromptRenderer
from opsd.contexts.template import TemplateBlocks, TemplateText, find_template
from opsd.contexts.trial import render_in_subprocess, try_template
from opsd.contexts.truncation import Boundary, Side, check_cut, first_share, longest_that_fits
from opsd.data.needs import Need, Row
from opsd.data.values import OTHER, at_path, is_empty, text_of, without_nan
from opsd.errors import ConfigError, DataError, LengthError, TemplateError, UnsafeTemplateError, did_you_mean

REASON = "Without it the teacher's prompt would have no more information than the student's."
WAY_OUT = "pick a template for these columns: `opsd templates --columns {columns}`"
_QUESTION = "What is it?"
_BARE_ROW = {"prompt": _QUESTION, "messages": [{"role": "user", "content": _QUESTION}], "system": ""}


class PrivilegedContext(Context):
    r"""A plain context: one template and its settings.

    Args:
        template: a shipped template's name, or a path (anything with a separator, or ending in .jinja).
        fields: {field of the template: column}, where a column has another name. A dotted path reaches into a nested
            column: {"answer": "reward_model.ground_truth"}.
        values: {field: value}, the same for every row: {"rule": "Answer in one word."}.
        reveal: share of the privileged field to insert, in (0, 1], by tokens and from its beginning; {field: share}
            where the template has several fields.
        system: the teacher's system turn; replaces the row's own and the template's block.
        examples: messages of worked examples, a user turn and an answer each, which stand in every prompt behind the
            system turn: small models follow examples where they do not follow a rule.
        chat_template_kwargs: keywords for the chat template; they go over the renderer's.
        bridge_thinking: end the teacher's prompt in an open `<think>` block, which the student's rollout then
            continues: for a student that reasons in plain text under a teacher that thinks.
        truncate: the field to shorten where a prompt is too long. No other part of a prompt is ever shortened.
        truncate_side: which part of that field is cut away: head, tail or middle.
        truncate_at: where it may be cut, also by `reveal`: line, sentence or token; a finer boundary is used where
            not one piece would be left.
        max_prompt_tokens: tokens of the longest prompt; None for no limit.

    Raises:
        TemplateError: no such template, it does not parse, or it adds nothing to the student's prompt.
        ConfigError: a setting that cannot work.

    Example:
        >>> context = PrivilegedContext("answer_only", fields={"answer": "reward_model.ground_truth"})
        >>> context.messages({"prompt": "What is 12 + 7?", "reward_model": {"ground_truth": "19"}})
        ('What is 12 + 7?\n\nThe correct answer is 19. Answer with it.', '')
    """

    def __init__(
        self,
        template: str | os.PathLike[str] | TemplateText,
        *,
        fields: Mapping[str, str] | None = None,
        values: Mapping[str, Any] | None = None,
        reveal: float | Mapping[str, float] | None = None,
        system: str | None = None,
        examples: Turns = (),  # type: ignore[assignment]
        chat_template_kwargs: Mapping[str, Any] | None = None,
        bridge_thinking: bool = False,
        truncate: str | None = None,
        truncate_side: Side = "tail",
        truncate_at: Boundary = "token",
        max_prompt_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.template = TemplateBlocks(template if isinstance(template, TemplateText) else find_template(template))
        self.name = self.template.name
        self.digest = self.template.digest
        self._template_fields = self.template.fields | self.template.optional_fields
        self._column_names = dict(fields or {})
        self._constants = dict(values or {})
        self._shares = self._read_shares(reveal)
        self.system = system
        self.examples = read_examples(examples)
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.bridge_thinking = bridge_thinking
        self.truncate = truncate
        self.truncate_side = truncate_side
        self.truncate_at = truncate_at
        self.max_prompt_tokens = max_prompt_tokens
        self._check_settings()
        self._adds_text = bool(self.template.fields or self._constants) or self._adds_text_without_fields()
        self._read_needs()
        settings = (self.chat_template_kwargs, self.bridge_thinking, self.system, self.examples)
        if not (self.needs or self._adds_text or any(settings)):
            raise TemplateError(
                f"template {self.name!r} adds nothing to the student's prompt: it uses no other column and has no text "
                "of its own.\nA teacher with the student's prompt needs no template.\n"
                "Use a column in the block user, such as {{ answer }}, or leave the context out."
            )

    @classmethod
    def from_string(cls, source: str, *, name: str = "<string>", **settings: Any) -> PrivilegedContext:
        """Return the context of a template given as text; the settings are those of the class."""
        return cls(TemplateText(name, source), **settings)

    # ---- what it is -------------------------------------------------------------------------------------------

    @property
    def contexts(self) -> Sequence[PrivilegedContext]:
        """Itself."""
        return [self]

    def pick(self, row: Row, rollout_fields: Row | None = None) -> PrivilegedContext:
        """Return itself."""
        return self

    def possible_contexts(self, row: Row, rollout_fields: Row | None = None) -> Sequence[PrivilegedContext]:
        """Return itself."""
        return [self]

    @property
    def description(self) -> dict[str, Any]:
        """Template, digest and settings."""
        names = ("name", "digest", "chat_template_kwargs", "truncate", "truncate_side", "max_prompt_tokens")
        # The other settings appear only where they are set, which keeps run cards short.
        others = {
            "fields": self._column_names,
            "values": self._constants,
            "reveal": self._shares,
            "system": self.system,
            "examples": self.examples,
            "bridge_thinking": self.bridge_thinking,
            "truncate_at": None if self.truncate_at == "token" else self.truncate_at,
        }
        return {name: getattr(self, name) for name in names} | {k: v for k, v in others.items() if v}

    def of_other_rows(self) -> PrivilegedContext:
        """Return the same template filled from another row; a rollout's own attempt and pass rate stay."""
        names = self._template_fields - {*self._constants, "attempt", "pass_rate"}
        if not names or "sibling" in names:
            problem = "inserts a rollout's siblings" if names else "inserts the same text for every row"
            raise ConfigError(
                f"template {self.name!r} {problem}, so nothing in it can come from another row.\nThe control "
                "wrong-context would be the run itself.\nUse the control no-context."
            )
        other = copy.copy(self)
        other._column_names = self._column_names | {name: f"{OTHER}{self._column(name)}" for name in names}
        other.name, other._own_counts = f"{self.name} of another row", ContextCounts()
        other._read_needs()
        return other

    def with_kwargs(self, renderer: PromptRenderer) -> PromptRenderer:
        """Return a renderer with this context's chat template keywords over its own."""
        keywords = {**renderer.chat_template_kwargs, **self.chat_template_kwargs}
        return dataclasses.replace(renderer, chat_template_kwargs=keywords)

    # ---- rendering --------------------------------------------------------------------------------------------

    def messages(
        self, row: Row, rollout_fields: Row | None = None, *, renderer: PromptRenderer | None = None
    ) -> tuple[Prompt, str]:
        """Return the teacher's messages (text, where the row's prompt is text) and the prefill of the assistant's turn.

        Args:
            row: a dataset row.
            rollout_fields: what training adds for this rollout; it wins over a column of the same name.
            renderer: writes conversations in fields, counts tokens, opens a thinking block; without one, conversations
                are written plainly, four characters count as a token, and no block is opened.

        Raises:
            DataError: the row's prompt cannot be used.
            TemplateError: a needed field is empty, or the template fails on this row.
            ConfigError: bridge_thinking, and the chat template has already closed a thinking block.
        """
        renderer = None if renderer is None else self.with_kwargs(renderer)
        return self._messages(row, self._values(row, rollout_fields, renderer), renderer)

    def render(self, row: Row, rollout_fields: Row | None = None, *, renderer: PromptRenderer) -> list[int]:
        """Return the ids of the teacher's prompt, shortened to `max_prompt_tokens`, and count it.

        Raises:
            DataError: the row's prompt cannot be used, or is too long and cannot be shortened enough.
            TemplateError: a needed field is empty, or the template fails on this row.
            ConfigError: bridge_thinking, and the chat template has already closed a thinking block.
        """
        renderer = self.with_kwargs(renderer)
        values = self._values(row, rollout_fields, renderer)
        prompt, prefill = self._messages(row, values, renderer)
        ids = renderer.ids(prompt, prefill)
        if self.max_prompt_tokens is not None and len(ids) > self.max_prompt_tokens:
            shortened = self._shorten(row, values, renderer, len(ids), self.max_prompt_tokens)
            self._own_counts.shortened += 1
            self._own_counts.tokens_cut += len(ids) - len(shortened)
            ids = shortened
        self._own_counts.rendered += 1
        self._own_counts.bare += not prefill and prompt == row["prompt"]
        return ids

    def _values(self, row: Row, rollout_fields: Row | None, renderer: PromptRenderer | None) -> dict[str, Any]:
        """Return the template's variables for a row, without those that always mean the student's prompt."""
        columns = {**row, **(rollout_fields or {})}
        values = {**columns, **{field: at_path(columns, column) for field, column in self._column_names.items()}}
        values = without_nan(values | self._constants)
        for field in sorted(self.template.fields):
            if is_empty(values.get(field)):
                column = self._column(field)
                has_column = column in values or column.partition(".")[0] in columns
                columns_of_row = f"no column of this row: {', '.join(row)}.{did_you_mean(column, row)}"
                raise TemplateError(
                    f"template {self.name!r} needs {column!r}, which is "
                    f"{'empty here.' if has_column else columns_of_row}\n{REASON}\n"
                    f"Fill it, drop the row, or make it optional: {{% if {field} is defined %}}."
                )
        for field in self._template_fields & values.keys():
            values[field] = with_conversations(values[field], _writer(renderer))
        for field, share in self._shares.items():
            if not is_empty(values.get(field)):
                tokenizer = renderer and renderer.tokenizer
                values[field] = first_share(as_text(values[field]), share, self.truncate_at, tokenizer)
        # An optional field without a value is undefined, so that a template needs to ask only `is defined`.
        return {k: v for k, v in values.items() if k not in self.template.optional_fields or not is_empty(v)}

    def _messages(self, row: Row, values: Mapping[str, Any], renderer: PromptRenderer | None) -> tuple[Prompt, str]:
        turns = turns_of(row.get("prompt"))
        texts = {block: text_of(turns[position]) for block, position in block_positions(turns).items()}
        messages: Any = turns
        if "messages" in self.template.names:  # writing a conversation costs as much as a prompt
            messages = with_conversations(turns, _writer(renderer))
        variables = {**values, "prompt": texts["user"], "messages": messages, "system": texts.get("system", "")}
        try_template(self.template, variables)
        blocks = self.template.render(variables)
        if self.system is not None:
            blocks["system"] = self.system
        prefill = blocks["assistant"].removeprefix("\n")
        is_text = isinstance(row["prompt"], str)
        check_not_a_chat(texts["user"], blocks["user"], self.name, renderer, is_turn=not is_text)
        if self.bridge_thinking and renderer is not None:
            prefill = renderer.open_thinking(prefill)
        if is_text:
            return self._text_prompt(row["prompt"], blocks, prefill), prefill
        return with_blocks(turns, blocks, self.examples), prefill

    def _text_prompt(self, prompt: str, blocks: Mapping[str, str], prefill: str) -> str:
        if blocks["system"].strip() or prefill or self.examples:
            raise DataError(
                f"template {self.name!r} writes a system turn or examples, or begins the assistant's turn, and this "
                "row's prompt is plain text, which has no turns.\nThese texts would be lost.\n"
                "Move them into the block user, or give prompts as messages."
            )
        return changed_text(prompt, prompt, blocks["user"])

    def _shorten(
        self, row: Row, values: Mapping[str, Any], renderer: PromptRenderer, size: int, limit: int
    ) -> list[int]:
        """Return the prompt's ids with as many tokens of the `truncate` field as the limit allows."""
        problem = f"the teacher's prompt has {size} tokens with template {self.name!r}; max_prompt_tokens is {limit}"
        if self.truncate is None:
            fields = ", ".join(sorted(self.columns)) or "this template has none"
            raise LengthError(
                f"{problem}.\nCut off at the limit, it would lose the question or the privileged text.\n"
                f"Raise max_prompt_tokens, name a field that may be shortened (truncate=: {fields}), or drop such rows "
                "(drop_long_rows)."
            )
        field, value = self.truncate, values.get(self.truncate)

        def ids(shortened: Any) -> list[int]:
            return renderer.ids(*self._messages(row, {**values, field: shortened}, renderer))

        shortened = longest_that_fits(
            value, self.truncate_side, self.truncate_at, renderer.tokenizer, lambda cut: len(ids(cut)) <= limit
        )
        if shortened is not None:
            return ids(shortened)
        if not isinstance(value, str | list):
            raise DataError(f"{problem}, and {field!r}, to be shortened, holds no text here: {value!r:.60}.")
        raise LengthError(
            f"{problem}, and it is longer even with one token of {field!r}.\n"
            "The question is never shortened.\nRaise max_prompt_tokens, or drop such rows (drop_long_rows)."
        )

    # ---- settings ---------------------------------------------------------------------------------------------

    def _column(self, field: str) -> str:
        return self._column_names.get(field, field)

    def _adds_text_without_fields(self) -> bool:
        """Return whether the template changes a bare question, where none of its fields has a value."""
        template = self.template
        try:
            blocks = (
                template.render(_BARE_ROW) if template.is_shipped else render_in_subprocess(template.origin, _BARE_ROW)
            )
        except UnsafeTemplateError:
            raise
        except TemplateError:  # it reads a part of the question, so it does more than repeat it
            return True
        texts = {part: text.strip() for part, text in blocks.items()}
        return texts["user"] not in ("", _QUESTION) or bool(texts["system"] or texts["assistant"])

    def _read_needs(self) -> None:
        """Set the columns that are read, and what a row must have."""
        needed_by = f"template {self.name!r}"
        self.fields = frozenset(self._column(name) for name in self.template.fields - set(self._constants))
        self.optional_fields = frozenset(self._column(name) for name in self.template.optional_fields)
        self.truncated_column = None if self.truncate is None else self._column(self.truncate)
        self.needs = tuple(Need((name,), needed_by, REASON, WAY_OUT) for name in sorted(self.fields))
        if self.optional_fields and not self._adds_text:
            self.needs = (*self.needs, Need(tuple(sorted(self.optional_fields)), needed_by, REASON, WAY_OUT))

    def _read_shares(self, share: float | Mapping[str, float] | None) -> dict[str, float]:
        if share is None or isinstance(share, Mapping):
            return dict(share or {})
        names = sorted(self._template_fields - set(self._constants))
        if len(names) != 1:
            raise ConfigError(
                f"reveal={share!r} inserts a share of a template's one field, and {self.name!r} has: "
                f"{', '.join(names) or 'none'}.\nName the field: reveal={{field: {share!r}}}."
            )
        return {names[0]: share}

    def _check_settings(self) -> None:
        usable = sorted(self._template_fields)
        settings: dict[str, Iterable[str]] = {
            "fields": self._column_names,
            "values": self._constants,
            "reveal": self._shares,
            "truncate": [] if self.truncate is None else [self.truncate],
        }
        for setting, name in [(setting, name) for setting, names in settings.items() for name in names]:
            if name not in usable:
                raise ConfigError(
                    f"{setting} names {name!r}, which is no field of template {self.name!r}, so it would do nothing."
                    f"{did_you_mean(name, usable)} Its fields: {', '.join(usable) or 'none'}."
                )
        for name, share in self._shares.items():
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
                raise ConfigError(
                    f"reveal inserts a share of {name!r} above 0 and up to 1, and is {share!r}.\nFor none of it, leave "
                    "the context out, or use the level 'none' of a schedule."
                )
        if self.system is not None and not self.system.strip():
            raise ConfigError(
                "system is empty, so it would do nothing. Write the teacher's system turn, or leave it out."
            )
        check_cut(self.truncate_side, self.truncate_at)
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise ConfigError(f"max_prompt_tokens is at least 1 or None (no limit), not {self.max_prompt_tokens!r}.")


def as_plain_context(value: Any) -> PrivilegedContext:
    """Return the plain context of a template's name, a path, a mapping of arguments, or a plain context.

    Raises:
        ConfigError: another type, an unknown key, or a mapping without "template".
    """
    if isinstance(value, PrivilegedContext):
        return value
    if isinstance(value, (str, os.PathLike)):
        return PrivilegedContext(value)
    if not isinstance(value, Mapping):
        raise ConfigError(
            "a context is a template's name, a path, a mapping, a PrivilegedContext or a ContextSchedule, not "
            f"{type(value).__name__}."
        )
    check_keys(value, PrivilegedContext)
    if "template" not in value:
        raise ConfigError(
            "a context needs the key 'template', a shipped template's name or a path to a .jinja file; or 'levels', of "
            "which one is picked per row and step."
        )
    return PrivilegedContext(**value)


def _writer(renderer: PromptRenderer | None) -> Callable[[Turns], str]:
    """Return what writes a conversation as text."""
    return plain_text if renderer is None else lambda turns: renderer.transcript(turns).strip()
