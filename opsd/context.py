"""What the teacher is shown: one dataset row in, the ids of the teacher's prompt out.

A template is a set of Jinja blocks (`system`, `user`, `assistant`), each rendered by itself (blocks.py), so that
a prompt is made of parts and no text is parsed back into turns.
Knows nothing of models, teachers, completions or training.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Iterable, Mapping, Sized
from typing import TYPE_CHECKING, Any, Literal, get_args

from opsd import shipped
from opsd.blocks import TemplateBlocks, TemplateText, find_template
from opsd.errors import ConfigError, DataError, TemplateError, did_you_mean
from opsd.prompts import Prompt, PromptRenderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Side = Literal["head", "tail", "middle"]

ELLIPSIS = " … "


@dataclasses.dataclass
class ContextCounts:
    """What happened to the teacher's prompts so far."""

    rendered: int = 0
    # prompts in which the template added nothing to the student's own: no optional field had a value
    bare: int = 0
    # prompts whose `truncate` field was shortened, and the tokens that this saved
    shortened: int = 0
    tokens_cut: int = 0


class PrivilegedContext:
    """A template and its keywords: what one teacher is shown of a row.

    Args:
        template: a shipped template's name, or a path (anything with a separator, or ending in .jinja).
        chat_template_kwargs: keywords for the chat template, over those of the renderer.
        truncate: the field to shorten where a prompt is too long. Nothing else is ever shortened.
        truncate_side: the part of that field that is cut away.
        max_prompt_tokens: the longest prompt, in tokens; None = no limit here.

    Raises:
        TemplateError: no such template, it does not parse, or it shows the teacher nothing.
        ConfigError: a setting that cannot work.
    """

    def __init__(
        self,
        template: str | os.PathLike[str] | TemplateText,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        truncate: str | None = None,
        truncate_side: Side = "tail",
        max_prompt_tokens: int | None = None,
    ) -> None:
        self._blocks = TemplateBlocks(template if isinstance(template, TemplateText) else find_template(template))
        self.name = self._blocks.name
        self.fields = self._blocks.fields
        self.optional_fields = self._blocks.optional_fields
        self.digest = self._blocks.digest
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.truncate = truncate
        self.truncate_side = truncate_side
        self.max_prompt_tokens = max_prompt_tokens
        self.counts = ContextCounts()
        self._check_settings()
        # Of each group, a row must have at least one.
        self._needs: list[tuple[str, ...]] = [(field,) for field in sorted(self.fields)]
        if self.fields or self._blocks.speak_without_fields():
            return
        if self.optional_fields:
            self._needs.append(tuple(sorted(self.optional_fields)))
        elif not self.chat_template_kwargs:
            raise TemplateError(
                f"template {self.name!r} shows the teacher nothing: it uses no column but the prompt and says "
                "nothing of its own.\nA teacher that sees what the student sees needs no template.\n"
                "Use a column in the block user, such as {{ answer }}, or leave the context out."
            )

    @classmethod
    def of(cls, value: Any) -> PrivilegedContext | None:
        """Return the context that a user meant by a name, a path, a mapping of arguments, a context or None.

        Raises:
            ConfigError: another type, an unknown key, or a mapping without "template".
        """
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, (str, os.PathLike)):
            return cls(value)
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"a context is a template's name, a path, a mapping or a PrivilegedContext, not {type(value).__name__}."
            )
        known = list(inspect.signature(cls).parameters)
        for key in value:
            if key not in known:
                hint = did_you_mean(str(key), known)
                raise ConfigError(f"a context has no setting {key!r}.{hint} It has: {', '.join(known)}.")
        if "template" not in value:
            raise ConfigError(
                "a context needs the key 'template': the name of one of opsd's own, or a path to a .jinja file."
            )
        return cls(**value)

    @classmethod
    def from_string(cls, source: str, *, name: str = "<string>", **settings: Any) -> PrivilegedContext:
        """Return the context of a template given as text; the settings are those of the class."""
        return cls(TemplateText(name, source), **settings)

    def messages(self, row: Mapping[str, Any], produced: Mapping[str, Any] | None = None) -> tuple[Prompt, str]:
        """Return the teacher's messages (text, if the row's prompt is text) and what the assistant has begun to say.

        Args:
            row: a dataset row.
            produced: what training made for this row; it wins over a column of the same name.

        Raises:
            DataError: the row's prompt cannot be used.
            TemplateError: a field is missing or empty, or the template fails on this row.
        """
        turns = _turns(row.get("prompt"))
        at = _positions(turns)
        own = {role: _text(turns[index]) for role, index in at.items()}
        names = {"prompt": own["user"], "messages": turns, "system": own.get("system", "")}
        parts = self._blocks.render({**self._values(row, produced), **names})
        prefill = parts["assistant"].removeprefix("\n")
        if isinstance(row["prompt"], str):
            return self._as_text(row["prompt"], parts, prefill), ""
        for role, index in at.items():
            turns[index]["content"] = _retold(turns[index].get("content"), own[role], parts[role])
        if "system" not in at and parts["system"].strip():
            turns.insert(0, {"role": "system", "content": parts["system"].strip()})
        return turns, prefill

    def render(
        self, row: Mapping[str, Any], produced: Mapping[str, Any] | None = None, *, side: PromptRenderer
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
        side = dataclasses.replace(
            side, chat_template_kwargs={**side.chat_template_kwargs, **self.chat_template_kwargs}
        )
        prompt, prefill = self.messages(row, produced)
        ids = side.ids(prompt, prefill)
        if self.max_prompt_tokens is not None and len(ids) > self.max_prompt_tokens:
            short = self._shortened(row, produced, side, len(ids), self.max_prompt_tokens)
            self.counts.shortened += 1
            self.counts.tokens_cut += len(ids) - len(short)
            ids = short
        self.counts.rendered += 1
        self.counts.bare += not prefill and prompt == row["prompt"]
        return ids

    def check_columns(self, columns: Iterable[str], produced: Iterable[str] = ()) -> None:
        """Check that a dataset with these columns, and what training produces, has every field the template needs.

        Raises:
            TemplateError: it has not; the message names the shipped templates that would do.
        """
        columns = list(columns)
        missing = self.missing([*columns, *produced])
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
        return [group for group in self._needs if not have.intersection(group)]

    def check_rows(self, rows: Iterable[Mapping[str, Any]], produced: Iterable[str] = ()) -> None:
        """Check that no row leaves a needed field empty: None, a blank string or an empty list.

        Raises:
            TemplateError: some do; the message gives their numbers, counted from 0.
        """
        groups = self.missing(produced)
        empty: dict[tuple[str, ...], list[int]] = {group: [] for group in groups}
        for number, row in enumerate(rows):
            for group in groups:
                if all(is_empty(row.get(field)) for field in group):
                    empty[group].append(number)
        found = [f"{_columns([group])}, empty in {_row_numbers(n)}" for group, n in empty.items() if n]
        if found:
            raise TemplateError(
                f"template {self.name!r} needs {'; and '.join(found)}.\n"
                "There the teacher would know no more than the student and grade at random.\n"
                "Fill these rows or drop them."
            )

    def _check_settings(self) -> None:
        usable = sorted(self.fields | self.optional_fields)
        if self.truncate is not None and self.truncate not in usable:
            raise ConfigError(
                f"truncate={self.truncate!r} is not a field of template {self.name!r}, so nothing could be shortened."
                f"{did_you_mean(self.truncate, usable)} Its fields: {', '.join(usable) or 'none'}."
            )
        if self.truncate_side not in get_args(Side):
            raise ConfigError(f"truncate_side is one of {', '.join(get_args(Side))}, not {self.truncate_side!r}.")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise ConfigError(f"max_prompt_tokens is at least 1 or None (no limit), not {self.max_prompt_tokens!r}.")

    def _values(self, row: Mapping[str, Any], produced: Mapping[str, Any] | None) -> dict[str, Any]:
        values = {**row, **(produced or {})}
        for field in sorted(self.fields):
            if is_empty(values.get(field)):
                has = f"not among this row's: {', '.join(values)}.{did_you_mean(field, values)}"
                raise TemplateError(
                    f"template {self.name!r} needs {field!r}, which is {'empty here.' if field in values else has}\n"
                    "Without it the teacher would know no more than the student and grade at random.\n"
                    f"Fill it, drop the row, or make it optional: {{% if {field} is defined %}}."
                )
        # An optional field without a value is not there: `is defined` is all that a template has to ask.
        return {k: v for k, v in values.items() if k not in self.optional_fields or not is_empty(v)}

    def _as_text(self, prompt: str, parts: Mapping[str, str], prefill: str) -> str:
        if parts["system"].strip() or prefill:
            raise DataError(
                f"template {self.name!r} writes a system turn or begins the assistant's, and this row's prompt is "
                "plain text, which has neither.\nWhat the template says there would be lost.\n"
                "Say it in the block user, or give prompts as messages."
            )
        return _retold(prompt, prompt, parts["user"])

    def _shortened(
        self, row: Mapping[str, Any], produced: Mapping[str, Any] | None, side: PromptRenderer, size: int, limit: int
    ) -> list[int]:
        """Return the ids with the most tokens of the `truncate` field that the limit allows."""
        problem = f"the teacher's prompt has {size} tokens with template {self.name!r}; max_prompt_tokens is {limit}"
        if self.truncate is None:
            fields = ", ".join(sorted(self.fields | self.optional_fields)) or "this template has none"
            raise DataError(
                f"{problem}.\nCut off at the limit, it would lose the question or what the teacher is to know.\n"
                f"Raise max_prompt_tokens, or name a field that may be shortened: truncate= ({fields})."
            )
        given = dict(produced or {})
        text = {**row, **given}.get(self.truncate)
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{problem}, and {self.truncate!r}, to be shortened, holds no text here: {text!r:.60}.")
        spans = _token_spans(side.tokenizer, text)
        best, fits, exceeds = None, 0, len(spans)
        while exceeds - fits > 1:
            keep = (fits + exceeds) // 2
            short = _cut(text, spans, keep, self.truncate_side)
            ids = side.ids(*self.messages(row, {**given, self.truncate: short}))
            if len(ids) <= limit:
                best, fits = ids, keep
            else:
                exceeds = keep
        if best is None:
            raise DataError(
                f"{problem}, which it exceeds even with one token of {self.truncate!r}.\n"
                "The question is never shortened. Raise max_prompt_tokens, or drop this row."
            )
        return best


def fitting_templates(columns: Iterable[str]) -> list[str]:
    """Return the names of the shipped templates that a dataset with these columns can fill."""
    columns = list(columns)
    # base shows nothing by itself: it is what the others extend.
    names = [name for name in shipped.names("templates") if name != "base"]
    return [name for name in names if not PrivilegedContext(name).missing(columns)]


def _turns(prompt: Any) -> list[dict[str, Any]]:
    """Return a row's prompt as turns of text; the turns are copies, which the caller may change."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not all(isinstance(turn, Mapping) and "role" in turn for turn in prompt):
        raise DataError(
            f"a prompt is text, or a list of messages with role and content; this row's is {prompt!r:.80}.\n"
            "Without it there is nothing to answer. Fill the column 'prompt', or drop the row."
        )
    turns = [dict(turn) for turn in prompt]
    for turn in turns:
        _text(turn)
    return turns


def _text(turn: Mapping[str, Any]) -> str:
    content = turn.get("content")
    if content is None:  # an assistant turn that only calls a tool
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        return "".join(part["text"] for part in content)
    raise DataError(
        f"a message's content is text, or a list of text parts; this one is {content!r:.80}.\n"
        "opsd trains on text only so far. Drop rows with images, audio or video."
    )


def _positions(turns: list[dict[str, Any]]) -> dict[str, int]:
    """Return where the last user turn stands and, if there is one, the first system turn."""
    users = [index for index, turn in enumerate(turns) if turn["role"] == "user"]
    systems = [index for index, turn in enumerate(turns) if turn["role"] == "system"]
    if not users:
        raise DataError(
            f"a prompt needs a user turn; this row has: {', '.join(turn['role'] for turn in turns) or 'no turns'}.\n"
            "A template speaks in the last user turn. Add one, or drop the row."
        )
    return {"user": users[-1], "system": systems[0]} if systems else {"user": users[-1]}


def _retold(content: Any, own: str, told: str) -> Any:
    """Return what a block says in place of a turn's content, untouched where it says nothing new."""
    return content if told.strip() in ("", own.strip()) else told.strip()


def is_empty(value: Any) -> bool:
    """Tell whether a field holds nothing that could be shown: None, blank text, an empty list."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, Sized) and len(value) == 0)


def _columns(groups: Iterable[tuple[str, ...]]) -> str:
    return " and ".join("the column " + " or ".join(repr(name) for name in group) for group in groups)


def _row_numbers(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:5]))
    more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    return f"{len(numbers)} row{'s' * (len(numbers) > 1)}: {shown}{more}"


def _token_spans(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, int]]:
    """Return where each token stands in the text. Cutting there, not in the ids, keeps every character whole."""
    if not tokenizer.is_fast:  # only fast tokenizers know; characters are the next best grain
        return [(start, start + 1) for start in range(len(text))]
    return tokenizer(text=text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]


def _cut(text: str, spans: list[tuple[int, int]], keep: int, side: Side) -> str:
    """Return `text` with `keep` of its tokens, the rest cut away from one side or from the middle."""
    first, last = {"tail": (keep, 0), "head": (0, keep), "middle": (keep - keep // 2, keep // 2)}[side]
    start = text[: spans[first - 1][1]] if first else ""
    end = text[spans[-last][0] :] if last else ""
    return (start.rstrip() + ELLIPSIS + end.lstrip()).strip()
