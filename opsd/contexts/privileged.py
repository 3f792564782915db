"""What the teacher is shown: one dataset row in, the ids of the teacher's prompt out.

A template is a set of Jinja blocks (`system`, `user`, `assistant`), each rendered by itself (blocks.py), so that
a prompt is made of parts and no text is parsed back into turns.
Knows nothing of models, teachers, completions or training.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any

from opsd import sources
from opsd.contexts.base import Context, ContextCounts
from opsd.contexts.filters import read_by, reveal
from opsd.contexts.messages import Prompt, turns_of
from opsd.contexts.renderer import THINK, PromptRenderer
from opsd.contexts.template import TemplateBlocks, TemplateText, find_template
from opsd.contexts.truncation import Boundary, Side, check_cut, longest_that_fits
from opsd.data.values import OTHER, at_path, is_empty, text_of
from opsd.errors import ConfigError, DataError, TemplateError, did_you_mean


class PrivilegedContext(Context):
    """A template and its settings: what one teacher is shown of a row.

    Args:
        template: a shipped template's name, or a path (anything with a separator, or ending in .jinja).
        fields: where the template's fields come from when a column has another name: {field: column}. A dotted path
            reaches into a nested column: {"answer": "reward_model.ground_truth"}.
        values: fields that are the same for every row: {"rule": "Answer in one word."}.
        reveal: share of the privileged field to show, in (0, 1], by tokens and from its beginning; a mapping
            {field: share} where the template has several.
        system: the teacher's system turn, in place of the row's own and of the template's block.
        chat_template_kwargs: keywords for the chat template, over those of the renderer.
        bridge_thinking: end the teacher's prompt in an open `<think>` block, which the student's rollout then
            continues: for a student that reasons in plain text under a teacher that thinks.
        truncate: the field to shorten where a prompt is too long. Nothing else is ever shortened.
        truncate_side: the part of that field that is cut away.
        truncate_at: where it may be cut, also by `reveal`; a finer boundary where not one piece would be left.
        max_prompt_tokens: the longest prompt, in tokens; None = no limit here.

    Raises:
        TemplateError: no such template, it does not parse, or it shows the teacher nothing.
        ConfigError: a setting that cannot work.
    """

    def __init__(
        self,
        template: str | os.PathLike[str] | TemplateText,
        *,
        fields: Mapping[str, str] | None = None,
        values: Mapping[str, Any] | None = None,
        reveal: float | Mapping[str, float] | None = None,
        system: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        bridge_thinking: bool = False,
        truncate: str | None = None,
        truncate_side: Side = "tail",
        truncate_at: Boundary = "token",
        max_prompt_tokens: int | None = None,
    ) -> None:
        self.blocks = TemplateBlocks(template if isinstance(template, TemplateText) else find_template(template))
        self.name = self.blocks.name
        self.digest = self.blocks.digest
        self._columns_of = dict(fields or {})
        self._constants = dict(values or {})
        self._shares = self._read_shares(reveal)
        self.system = system
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.bridge_thinking = bridge_thinking
        self.truncate = truncate
        self.truncate_side = truncate_side
        self.truncate_at = truncate_at
        self.max_prompt_tokens = max_prompt_tokens
        self._counts = ContextCounts()
        self._check_settings()
        self._read_fields()
        differs = bool(self._constants or self.chat_template_kwargs or self.bridge_thinking or self.system)
        if not (self.fields or self._needs or differs or self.blocks.speak_without_fields()):
            raise TemplateError(
                f"template {self.name!r} shows the teacher nothing: it uses no column but the prompt and says "
                "nothing of its own.\nA teacher that sees what the student sees needs no template.\n"
                "Use a column in the block user, such as {{ answer }}, or leave the context out."
            )

    def _read_fields(self) -> None:
        self.fields = frozenset(self._column(name) for name in self.blocks.fields - set(self._constants))
        self.optional_fields = frozenset(self._column(name) for name in self.blocks.optional_fields)
        # Of each group, a row must have at least one.
        self._needs: list[tuple[str, ...]] = [(field,) for field in sorted(self.fields)]
        if self.optional_fields and not (self.fields or self._constants or self.blocks.speak_without_fields()):
            self._needs.append(tuple(sorted(self.optional_fields)))

    @classmethod
    def from_string(cls, source: str, *, name: str = "<string>", **settings: Any) -> PrivilegedContext:
        """Return the context of a template given as text; the settings are those of the class."""
        return cls(TemplateText(name, source), **settings)

    def of_other_rows(self) -> PrivilegedContext:
        """Return the same template, shown what belongs to another row; a rollout's own attempt and rate stay."""
        shown = (self.blocks.fields | self.blocks.optional_fields) - {*self._constants, "attempt", "pass_rate"}
        if not shown or "sibling" in shown:
            what = "what training makes of a row's own rollouts" if shown else "the same to every row"
            raise ConfigError(
                f"template {self.name!r} shows {what}, so nothing in it could be another row's. The control "
                "wrong-context has no meaning here: take no-context."
            )
        other = copy.copy(self)
        other._columns_of = self._columns_of | {name: f"{OTHER}{self._column(name)}" for name in shown}
        other.name, other._counts = f"{self.name} of another row", ContextCounts()
        other._read_fields()
        return other

    def side(self, renderer: PromptRenderer) -> PromptRenderer:
        """Return a renderer with this context's keywords over its own."""
        keywords = {**renderer.chat_template_kwargs, **self.chat_template_kwargs}
        return dataclasses.replace(renderer, chat_template_kwargs=keywords)

    def messages(
        self,
        row: Mapping[str, Any],
        rollout_fields: Mapping[str, Any] | None = None,
        *,
        side: PromptRenderer | None = None,
    ) -> tuple[Prompt, str]:
        """Return the teacher's messages (text, if the row's prompt is text) and what the assistant has begun to say.

        Args:
            row: a dataset row.
            produced: what training made for this row; it wins over a column of the same name.
            side: whose tokenizer filters and messages use; without one, as much as can be known.

        Raises:
            DataError: the row's prompt cannot be used.
            TemplateError: a field is missing or empty, or the template fails on this row.
        """
        return self._told(row, self._values(row, rollout_fields, side), side)

    def _told(
        self, row: Mapping[str, Any], values: Mapping[str, Any], side: PromptRenderer | None
    ) -> tuple[Prompt, str]:
        turns = turns_of(row.get("prompt"))
        at = positions_of(turns)
        own = {role: text_of(turns[index]) for role, index in at.items()}
        names = {"prompt": own["user"], "messages": turns, "system": own.get("system", "")}
        with read_by(side):
            parts = self.blocks.render({**values, **names})
        if self.system is not None:
            parts["system"] = self.system
        prefill = parts["assistant"].removeprefix("\n")
        if isinstance(row["prompt"], str):
            return self._as_text(row["prompt"], parts, prefill), ""
        for role, index in at.items():
            turns[index]["content"] = retold(turns[index].get("content"), own[role], parts[role])
        if "system" not in at and parts["system"].strip():
            turns.insert(0, {"role": "system", "content": parts["system"].strip()})
        return turns, prefill

    def render(
        self, row: Mapping[str, Any], rollout_fields: Mapping[str, Any] | None = None, *, side: PromptRenderer
    ) -> list[int]:
        """Return the ids of the teacher's prompt, shortened if it must be, and count what happened.

        Args:
            row: a dataset row.
            produced: what training made for this row; it wins over a column of the same name.
            side: the teacher's renderer; this context's keywords go over its own.

        Raises:
            DataError: as `messages`, or the prompt is too long and may not be shortened, or not by enough.
            TemplateError: as `messages`.
        """
        side = self.side(side)
        prompt, prefill = self.messages(row, rollout_fields, side=side)
        prefill = self.bridged(prefill, side)
        ids = side.ids(prompt, prefill)
        if self.max_prompt_tokens is not None and len(ids) > self.max_prompt_tokens:
            short = self._shortened(row, rollout_fields, side, len(ids), self.max_prompt_tokens)
            self._counts.shortened += 1
            self._counts.tokens_cut += len(ids) - len(short)
            ids = short
        self._counts.rendered += 1
        self._counts.bare += not prefill and prompt == row["prompt"]
        return ids

    def check_columns(self, columns: Iterable[str], rollout_fields: Iterable[str] = ()) -> None:
        """Check that a dataset with these columns, and what training produces, has every field the template needs.

        Raises:
            TemplateError: it has not; the message names the shipped templates that would do.
        """
        columns = list(columns)
        missing = self.missing([*columns, *rollout_fields])
        if not missing:
            return
        hints = "".join(did_you_mean(name, columns) for group in missing for name in group)
        raise TemplateError(
            f"template {self.name!r} needs {_columns(missing)}, and the dataset has: {', '.join(columns)}.{hints}\n"
            "Without it the teacher would know no more than the student and grade at random.\n"
            f"Rename a column, or pick a template for what you have ({', '.join(fitting_templates(columns))}): "
            f"`opsd templates --columns {','.join(columns)}`."
        )

    def missing(self, available: Iterable[str]) -> list[tuple[str, ...]]:
        """Return the fields that these names leave open: of each group, one would be enough."""
        have = set(available)
        return [group for group in self._needs if not any(name in have or name.split(".")[0] in have for name in group)]

    def has_fields(self, values: Mapping[str, Any]) -> bool:
        """Tell whether a row has what the template needs."""
        return all(any(not is_empty(at_path(values, name)) for name in group) for group in self._needs)

    def possible_contexts(
        self, row: Mapping[str, Any], rollout_fields: Mapping[str, Any] | None = None
    ) -> list[Context]:
        """Return itself."""
        return [self]

    def untruncated_fields(self, names: Iterable[str]) -> set[str]:
        """Return those of these fields that may be shown at any length."""
        cut = None if self.truncate is None else self._column(self.truncate)
        return {name for name in names if name in self.fields | self.optional_fields and name != cut}

    @property
    def counts(self) -> ContextCounts:
        """What happened so far."""
        return self._counts

    def forget_counts(self) -> None:
        """Count from here."""
        self._counts = ContextCounts()

    @property
    def description(self) -> dict[str, Any]:
        """Template, digest and settings."""
        names = ("name", "digest", "chat_template_kwargs", "truncate", "truncate_side", "max_prompt_tokens")
        # Later settings stand only where they are set, so that runs from before them resume.
        later = {
            "fields": self._columns_of,
            "values": self._constants,
            "reveal": self._shares,
            "system": self.system,
            "bridge_thinking": self.bridge_thinking,
            "truncate_at": None if self.truncate_at == "token" else self.truncate_at,
        }
        return {name: getattr(self, name) for name in names} | {k: v for k, v in later.items() if v}

    def check_rows(self, rows: Iterable[Mapping[str, Any]], rollout_fields: Iterable[str] = ()) -> None:
        """Check that no row leaves a needed field empty: None, a blank string or an empty list.

        Raises:
            TemplateError: some do; the message gives their numbers, counted from 0.
        """
        groups = self.missing(rollout_fields)
        empty: dict[tuple[str, ...], list[int]] = {group: [] for group in groups}
        for number, row in enumerate(rows):
            for group in groups:
                if all(is_empty(at_path(row, field)) for field in group):
                    empty[group].append(number)
        found = [f"{_columns([group])}, empty in {_row_numbers(n)}" for group, n in empty.items() if n]
        if found:
            raise TemplateError(
                f"template {self.name!r} needs {'; and '.join(found)}.\n"
                "There the teacher would know no more than the student and grade at random.\n"
                "Fill these rows or drop them."
            )

    def _column(self, field: str) -> str:
        return self._columns_of.get(field, field)

    def _read_shares(self, share: float | Mapping[str, float] | None) -> dict[str, float]:
        if share is None or isinstance(share, Mapping):
            return dict(share or {})
        shown = sorted((self.blocks.fields | self.blocks.optional_fields) - set(self._constants))
        if len(shown) != 1:
            raise ConfigError(
                f"reveal={share!r} shows a share of the one field of a template, and {self.name!r} has: "
                f"{', '.join(shown) or 'none'}. Say which: reveal={{field: {share!r}}}."
            )
        return {shown[0]: share}

    def _check_settings(self) -> None:
        usable = sorted(self.blocks.fields | self.blocks.optional_fields)
        settings = {"fields": self._columns_of, "values": self._constants, "reveal": self._shares}
        named = [(setting, name) for setting, names in settings.items() for name in names]
        for setting, name in [*named, *([] if self.truncate is None else [("truncate", self.truncate)])]:
            if name not in usable:
                raise ConfigError(
                    f"{setting} names {name!r}, which is not a field of template {self.name!r}, so it would do nothing."
                    f"{did_you_mean(name, usable)} Its fields: {', '.join(usable) or 'none'}."
                )
        for name, share in self._shares.items():
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
                raise ConfigError(
                    f"reveal shows a share of {name!r} above 0 and up to 1, and is {share!r}. To show nothing, use no "
                    "context, or the level 'none' of a schedule."
                )
        if self.system is not None and not self.system.strip():
            raise ConfigError("system is empty: the teacher's system turn would be none of your making. Leave it out.")
        check_cut(self.truncate_side, self.truncate_at)
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise ConfigError(f"max_prompt_tokens is at least 1 or None (no limit), not {self.max_prompt_tokens!r}.")

    def _values(
        self, row: Mapping[str, Any], rollout_fields: Mapping[str, Any] | None, side: PromptRenderer | None
    ) -> dict[str, Any]:
        given = {**row, **(rollout_fields or {})}
        values = {**given, **{field: at_path(given, column) for field, column in self._columns_of.items()}}
        values |= self._constants
        for field in sorted(self.blocks.fields):
            if is_empty(values.get(field)):
                column = self._column(field)
                has = f"not among this row's: {', '.join(row)}.{did_you_mean(column, row)}"
                raise TemplateError(
                    f"template {self.name!r} needs {column!r}, which is {'empty here.' if column in values else has}\n"
                    "Without it the teacher would know no more than the student and grade at random.\n"
                    f"Fill it, drop the row, or make it optional: {{% if {field} is defined %}}."
                )
        for field, share in self._shares.items():
            if not is_empty(values.get(field)):
                with read_by(side):
                    values[field] = reveal(values[field], share, self.truncate_at)
        # An optional field without a value is not there: `is defined` is all that a template has to ask.
        return {k: v for k, v in values.items() if k not in self.blocks.optional_fields or not is_empty(v)}

    def bridged(self, prefill: str, side: PromptRenderer) -> str:
        """Return the prefill behind an open thinking block, if that is asked for and none is open yet.

        Raises:
            ConfigError: the chat template has closed a block already.
        """
        if not self.bridge_thinking:
            return prefill
        begun = side.opening + prefill
        if begun.rfind(THINK) > begun.rfind("</think>"):
            return prefill
        if "</think>" in begun:
            raise ConfigError(
                f"bridge_thinking opens the teacher's thinking block, and its chat template has closed one: {begun!r}. "
                "Switch thinking on for the teacher: chat_template_kwargs={'enable_thinking': True}."
            )
        return f"{THINK}\n{prefill}"

    def _as_text(self, prompt: str, parts: Mapping[str, str], prefill: str) -> str:
        if parts["system"].strip() or prefill:
            raise DataError(
                f"template {self.name!r} writes a system turn or begins the assistant's, and this row's prompt is "
                "plain text, which has neither.\nWhat the template says there would be lost.\n"
                "Say it in the block user, or give prompts as messages."
            )
        return retold(prompt, prompt, parts["user"])

    def _shortened(
        self,
        row: Mapping[str, Any],
        rollout_fields: Mapping[str, Any] | None,
        side: PromptRenderer,
        size: int,
        limit: int,
    ) -> list[int]:
        """Return the ids with the most tokens of the `truncate` field that the limit allows."""
        problem = f"the teacher's prompt has {size} tokens with template {self.name!r}; max_prompt_tokens is {limit}"
        if self.truncate is None:
            fields = ", ".join(sorted(self.fields | self.optional_fields)) or "this template has none"
            raise DataError(
                f"{problem}.\nCut off at the limit, it would lose the question or what the teacher is to know.\n"
                f"Raise max_prompt_tokens, or name a field that may be shortened: truncate= ({fields})."
            )
        values, field = self._values(row, rollout_fields, side), self.truncate

        def ids(value: Any) -> list[int]:
            prompt, prefill = self._told(row, {**values, field: value}, side)
            return side.ids(prompt, self.bridged(prefill, side))

        value = values.get(field)
        short = longest_that_fits(
            value, self.truncate_side, self.truncate_at, side.tokenizer, lambda cut: len(ids(cut)) <= limit
        )
        if short is None and not isinstance(value, str | list):
            raise DataError(f"{problem}, and {field!r}, to be shortened, holds no text here: {value!r:.60}.")
        if short is None:
            raise DataError(
                f"{problem}, which it exceeds even with one token of {field!r}.\n"
                "The question is never shortened. Raise max_prompt_tokens, or drop this row."
            )
        return ids(short)


def fitting_templates(columns: Iterable[str]) -> list[str]:
    """Return the names of the shipped templates that a dataset with these columns can fill."""
    columns = list(columns)
    # base shows nothing by itself: it is what the others extend.
    names = [name for name in sources.names("templates") if name != "base"]
    return [name for name in names if not PrivilegedContext(name).missing(columns)]


def _columns(groups: Iterable[tuple[str, ...]]) -> str:
    return " and ".join("the column " + " or ".join(repr(name) for name in group) for group in groups)


def _row_numbers(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:5]))
    more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    return f"{len(numbers)} row{'s' * (len(numbers) > 1)}: {shown}{more}"


def positions_of(turns: list[dict[str, Any]]) -> dict[str, int]:
    """Return where the last user turn stands and, if there is one, the first system turn.

    Raises:
        DataError: nobody asks anything.
    """
    users = [index for index, turn in enumerate(turns) if turn["role"] == "user"]
    systems = [index for index, turn in enumerate(turns) if turn["role"] == "system"]
    if not users:
        raise DataError(
            f"a prompt needs a user turn; this row has: {', '.join(turn['role'] for turn in turns) or 'no turns'}.\n"
            "A template speaks in the last user turn. Add one, or drop the row."
        )
    return {"user": users[-1], "system": systems[0]} if systems else {"user": users[-1]}


def retold(content: Any, own: str, told: str) -> Any:
    """Return what a block says in place of a turn's content, untouched where it says nothing new."""
    return content if told.strip() in ("", own.strip()) else told.strip()
