"""Tokenizers, models, teachers and rows that the set-ups of `gallery.py` are made of: small and real."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from conftest import CHATML, make_llama, make_rows, make_tokenizer
from datasets import Dataset
from helpers import make_args
from transformers import PreTrainedTokenizerFast

from opsd import OPSDTrainer, PrivilegedContext, SameCheckpointTeacher, SiblingTeacher

ROWS = 16


@dataclass
class Setup:
    """What a run is made of.

    Args:
        teacher: makes the teacher.
        tokenizer: the student's.
        model: the student.
        rows: its dataset.
        settings: of OPSDConfig, where they are not the usual ones.
    """

    teacher: Callable[[], Any] = lambda: SameCheckpointTeacher(context="answer_only")
    tokenizer: Callable[[], Any] = make_tokenizer
    model: Callable[[], Any] = make_llama
    rows: list[dict[str, Any]] = field(default_factory=lambda: make_rows(ROWS))
    settings: dict[str, Any] = field(default_factory=dict)

    def trainer(self, folder: Path) -> OPSDTrainer:
        """Build it."""
        return OPSDTrainer(
            self.model(),
            self.teacher(),
            args=make_args(folder, **self.settings),
            train_dataset=Dataset.from_list(self.rows),
            processing_class=self.tokenizer(),
        )


@dataclass
class Case:
    """A broken set-up and its healthy twin.

    Args:
        source: where it was met.
        broken: the set-up.
        healthy: the same without the mistake.
        check: the check that has to name it; "settings" where it is refused before a model is ready.
        words: a pattern that what it says has to match.
        status: how bad it is.
    """

    source: str
    broken: Setup
    healthy: Setup
    check: str
    words: str
    status: str = "warn"


class CuttingTokenizer(PreTrainedTokenizerFast):
    """Cuts whatever it is given at a number of tokens, without a word, as a `max_prompt_length` does."""

    limit, side = 10**9, "left"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = super().__call__(*args, **kwargs)
        if found["input_ids"] and isinstance(found["input_ids"][0], int):
            for name in found:
                found[name] = found[name][-self.limit :] if self.side == "left" else found[name][: self.limit]
        return found


def cutting(limit: int, side: str) -> Callable[[], Any]:
    def make() -> CuttingTokenizer:
        plain = make_tokenizer()
        tokenizer = CuttingTokenizer(
            tokenizer_object=plain.backend_tokenizer,
            bos_token="<|im_start|>",
            eos_token="<|im_end|>",
            pad_token="<|pad|>",
        )
        tokenizer.chat_template = CHATML
        tokenizer.limit, tokenizer.side = limit, side
        return tokenizer

    return make


def with_template(chat_template: str, **tokens: str) -> Callable[[], Any]:
    def make() -> PreTrainedTokenizerFast:
        tokenizer = make_tokenizer()
        tokenizer.chat_template = chat_template
        for name, value in tokens.items():
            setattr(tokenizer, name, value)
        return tokenizer

    return make


def writing(form: str) -> Callable[[], Any]:
    """A tokenizer that writes tokens around every text, "$A": "<|im_start|> $A" as Llama's, "$A <|im_end|>" as T5's."""

    def make() -> PreTrainedTokenizerFast:
        from tokenizers.processors import TemplateProcessing

        tokenizer = make_tokenizer()
        ends = [("<|im_start|>", tokenizer.bos_token_id), ("<|im_end|>", tokenizer.eos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=form, special_tokens=ends)
        return tokenizer

    return make


def context(user: str = "{{ prompt }} {{ answer }}", **settings: Any) -> Callable[[], Any]:
    source = "{% extends 'base.jinja' %}{% block user %}" + user + "{% endblock %}" + settings.pop("more", "")
    return lambda: SameCheckpointTeacher(context=PrivilegedContext.from_string(source, **settings))


def sibling(
    seed: int = 0, near: bool = True, vocab_size: int = 400, tokenizer: Callable[[], Any] = make_tokenizer, eos: int = 2
) -> Callable[[], Any]:
    """A teacher that is another model: a little moved, as a larger sibling's distribution is, or unrelated."""

    def make() -> SiblingTeacher:
        model = make_llama(seed if near else seed + 5, vocab_size)
        if near:
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.02 * torch.randn(p.shape, generator=generator))
        else:
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.6)
        model.generation_config.eos_token_id = eos
        return SiblingTeacher(model, tokenizer=tokenizer(), context="answer_only")

    return make


def resized(size: int, lively: float = 0.0) -> Callable[[], Any]:
    """A student whose head has another number of rows than its tokenizer has words."""

    def make() -> Any:
        model = make_llama(vocab_size=size, tie=False)
        if size > 400:
            with torch.no_grad():  # padding rows are as training leaves them: far below every word
                model.lm_head.weight[400:] = 0.0
                model.model.norm.weight.fill_(1.0)
        if lively:
            with torch.no_grad():
                model.lm_head.weight[400:] = lively * model.lm_head.weight[:400].mean(0)
                model.lm_head.weight[400:] += torch.randn(size - 400, 32, generator=torch.Generator().manual_seed(0))
        return model

    return make


def picky() -> Any:
    """A checkpoint with generation settings of its own, as most on the hub have."""
    model = make_llama()
    model.generation_config.update(min_p=0.3, repetition_penalty=3.0, suppress_tokens=list(range(50, 300)))
    return model


def colder() -> Any:
    """A model whose `generate` samples from sharper logits than its forward pass gives."""
    model = make_llama()
    original = model.generate

    def generate(*args: Any, generation_config: Any, **kwargs: Any) -> Any:
        generation_config.temperature = 0.3
        return original(*args, generation_config=generation_config, **kwargs)

    model.generate = generate
    return model


@functools.cache
def _taught() -> dict[str, torch.Tensor]:
    """Weights of a model that has learned to think where it is asked to: a few seconds of real training."""
    tokenizer, model = make_tokenizer(), make_llama(3)
    texts = [
        tokenizer.apply_chat_template(
            row["prompt"],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinks,  # type: ignore[arg-type]
        )
        + (
            "hint hint hint 7 - 7 = 0 the sum of the ones"
            if thinks
            else "The correct answer is nineteen. The correct answer"
        )
        for row in make_rows(ROWS)
        for thinks in (False, True)
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(80):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def taught() -> Any:
    model = make_llama(3)
    model.load_state_dict(_taught())
    return model


def rows(**changes: Callable[[dict[str, Any]], Any]) -> list[dict[str, Any]]:
    return [{**row, **{name: change(row) for name, change in changes.items()}} for row in make_rows(ROWS)]


def asked(text: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": text}]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def as_chat(text: str, header: str = "<|im_start|>assistant\n") -> str:
    """A user's turn as a chat template writes it."""
    return f"<|im_start|>user\n{text}<|im_end|>\n{header}"


def long_word(row: dict[str, Any]) -> str:
    return "thermodynamics" + question(row)[8:11].replace(" ", "x")


def nested(row: dict[str, Any]) -> dict[str, Any]:
    return {"ground_truth": row["answer"]}


def question(row: dict[str, Any]) -> str:
    return row["prompt"][-1]["content"]


def shifted(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same words under other ids."""
    import json

    from tokenizers import Tokenizer

    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    words = raw["model"]["vocab"]
    raw["model"]["vocab"] = {
        word: (i if i < 10 else 10 + (i - 10 + 1) % (len(words) - 10)) for word, i in words.items()
    }
    changed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(raw)),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
    )
    changed.chat_template = tokenizer.chat_template
    return changed


class Restless(torch.nn.Module):
    """Noise in the forward pass that eval mode does not switch off, as of a layer written by hand."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(self.inner(hidden), 0.3, training=True)


def restless(model: Any) -> Any:
    for layer in model.model.layers:
        layer.mlp = Restless(layer.mlp)
    return model


VERL = {"template": "answer_only", "fields": {"answer": "reward_model.ground_truth"}}
MERGING = (  # Gemma's way: no system turn, its words go into the user's
    "{% set first = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' %}"
    "{% for message in messages if message['role'] != 'system' %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{{ first if loop.first }}{{ message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}" + CHATML
)
DROPPING = MERGING.replace("{{ first if loop.first }}", "")
HEADLESS = CHATML.replace("{% if add_generation_prompt %}", "{% if false %}")
SHORTENING = CHATML.replace("message['content'] +", "message['content'][-40:] +")
RULE = rows(rule=lambda row: "Answer with a number and nothing else.")
RULED = Setup(teacher=lambda: SameCheckpointTeacher(context="system_rule"), rows=RULE)
OTHER_END = CHATML.replace("<|im_end|>", "<|pad|>")
LONG = rows(solution=lambda row: f"First {question(row)} then another. " * 6)
USUAL = Setup()
