"""Set-ups that are broken as users broke them, each with its healthy twin; `test_gallery.py` shows them to the doctor.

Small real models and tokenizers. The source of each is an entry of the field's bug trackers or papers.
"""

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

from opsd import EMATeacher, LiveTeacher, OPSDTrainer, PrivilegedContext, SameCheckpointTeacher, SiblingTeacher

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


def with_begin(adds: bool) -> Callable[[], Any]:
    """A tokenizer that begins every text with its first token, as Llama's does, or one that does not."""

    def make() -> PreTrainedTokenizerFast:
        from tokenizers.processors import TemplateProcessing

        tokenizer = make_tokenizer()
        if adds:
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
            )
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


def long_word(row: dict[str, Any]) -> str:
    return "thermodynamics" + question(row)[8:11].replace(" ", "x")


def nested(row: dict[str, Any]) -> dict[str, Any]:
    return {"ground_truth": row["answer"]}


def question(row: dict[str, Any]) -> str:
    return row["prompt"][-1]["content"]


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
LONG = rows(solution=lambda row: "First one thing, then another. " * 9)
USUAL = Setup()

GALLERY: dict[str, Case] = {
    "thinking on one side only": Case(
        "siyan-zhao/OPSD #3, #10; tinker-cookbook #796",
        Setup(context(chat_template_kwargs={"enable_thinking": True})),
        Setup(
            context(chat_template_kwargs={"enable_thinking": True}),
            settings={"chat_template_kwargs": {"enable_thinking": True}},
        ),
        "tokenizers",
        "one answers at once|one thinks and the other does not|thinks and the other",
    ),
    "a thinking teacher grades plain answers": Case(
        "tinker-cookbook #796: teacher bias at the first tokens; siyan-zhao/OPSD #10, #16, #18",
        Setup(
            context(chat_template_kwargs={"enable_thinking": True}),
            model=taught,
            settings={"max_completion_length": 9},
        ),
        Setup(context(), model=taught, settings={"max_completion_length": 9}),
        "divergence",
        "disagree about how an answer begins",
    ),
    "teacher prompt cut from the left": Case(
        "TRL PR 5862, 5883: the SDFT teacher's prompt cut to the student's limit",
        Setup(tokenizer=cutting(40, "left")),
        Setup(tokenizer=cutting(400, "left")),
        "prompts",
        "user turn was cut from the left",
        "fail",
    ),
    "assistant's header cut from the right": Case(
        "siyan-zhao/OPSD: right truncation at max_length; lasgroup/SDPO: max_reprompt_len",
        Setup(tokenizer=cutting(40, "right")),
        Setup(tokenizer=cutting(400, "right")),
        "prompts",
        "the assistant's header was cut",
        "fail",
    ),
    "a chat template that shortens turns": Case(
        "TRL SDFT: the question or the head of the template vanishes silently",
        Setup(tokenizer=with_template(SHORTENING)),
        USUAL,
        "prompts",
        "was cut from the left",
        "fail",
    ),
    "a chat template without a generation prompt": Case(
        "verl #6833: the solution lands inside the assistant's turn",
        Setup(tokenizer=with_template(HEADLESS)),
        USUAL,
        "tokenizers",
        "writes no generation prompt",
        "fail",
    ),
    "two first tokens": Case(
        "prime-rl's opsd: a second BOS for tokenizers that add one",
        Setup(context(), with_begin(True), rows=rows(prompt=lambda row: "<|im_start|>" + question(row))),
        Setup(context(), with_begin(True), rows=rows(prompt=question)),
        "tokenizers",
        "begin with '<|im_start|>' twice",
        "fail",
    ),
    "system turn merged into the user's": Case(
        "prime-rl's opsd: templates that allow only one system message; Gemma has none",
        Setup(RULED.teacher, with_template(MERGING), rows=RULE),
        RULED,
        "prompts",
        "merges the system turn into the user's",
    ),
    "system turn dropped": Case(
        "the same, where the template ignores the role",
        Setup(RULED.teacher, with_template(DROPPING), rows=RULE),
        RULED,
        "prompts",
        "system turn is missing",
        "fail",
    ),
    "a system turn that only the student has": Case(
        "Qwen2.5 and SmolLM2: a default system turn, which a rule for the teacher takes the place of",
        Setup(RULED.teacher, with_template(DEFAULT), rows=RULE),
        Setup(RULED.teacher, with_template(DEFAULT), rows=RULE, settings={"student_system_prompt": "You help."}),
        "prompts",
        "writes a system turn where a prompt has none.*You help",
    ),
    "turns end where sampling does not stop": Case(
        "modelscope/ms-swift #9526; a base model with a chat template of its own",
        Setup(tokenizer=with_template(OTHER_END)),
        USUAL,
        "tokenizers",
        "ends an assistant's turn with '<|pad|>', and sampling stops at <|im_end|> only",
    ),
    "the two models end their answers differently": Case(
        "modelscope/ms-swift #9526; arXiv 2609.20511: EOS disagreement",
        Setup(sibling(eos=0)),
        Setup(sibling()),
        "tokenizers",
        "the teacher ends its answers with <|pad|>",
    ),
    "a padded head that samples its padding": Case(
        "huggingface/trl #2215, #3028: 151,936 and 152,064",
        Setup(model=resized(448, lively=1.0)),
        Setup(model=make_llama),
        "tokenizers",
        "padded by 48 rows.*ids that mean nothing will be sampled",
    ),
    "a head smaller than the vocabulary": Case(
        "huggingface/trl PR 6252: verify ids, not just sizes; tokens added after training",
        Setup(model=resized(380), rows=make_rows(ROWS)),
        USUAL,
        "settings",
        "the model embeds 380",
        "fail",
    ),
    "another vocabulary of the same size": Case(
        "huggingface/trl #2215, #3028; LMOps PR 331; torchtune #2119",
        Setup(sibling(tokenizer=lambda: _shifted(make_tokenizer()))),
        Setup(sibling()),
        "settings",
        "TokenizerMismatchError.*must share a tokenizer",
        "fail",
    ),
    "another chat template": Case(
        "Thinking-Space/Rethinking-OPD #23: format errors rise after distillation with another template",
        Setup(sibling(tokenizer=with_template(CHATML.replace("'\n' + message", "': ' + message")))),
        Setup(sibling()),
        "settings|tokenizers",
        "differ(ent)? in their chat templates|different chat templates",
    ),
    "a teacher out of its depth": Case(
        "arXiv 2604.13016: needs compatible thinking patterns; a broken alignment looks the same",
        Setup(sibling(near=False)),
        Setup(sibling()),
        "divergence",
        "disagree about ordinary tokens",
    ),
    "the solution in the student's prompt": Case(
        "the small-scale repository study of answer leaks; RLSD, arXiv 2604.03128",
        Setup(
            context("{{ prompt }} {{ solution }}"), rows=rows(prompt=lambda r: asked(f"{question(r)} {r['solution']}"))
        ),
        Setup(context("{{ prompt }} {{ solution }}")),
        "leaks",
        "holds all of 'solution' in 16 of 16 rows",
        "fail",
    ),
    "the answer in the question": Case(
        "the same, with an answer too short to look for as text",
        Setup(
            rows=rows(prompt=lambda r: asked(f"{question(r)} (reference {r['answer']})"), answer=lambda r: r["answer"])
        ),
        USUAL,
        "leaks",
        "gives its answer away",
    ),
    "the solution in other words' spacing": Case(
        "the same, where a prompt was wrapped or put in capitals",
        Setup(
            context("{{ prompt }} {{ solution }}"),
            rows=rows(prompt=lambda r: asked(f"{question(r)}\n{r['solution'].upper().replace(' ', '  ')}")),
        ),
        Setup(context("{{ prompt }} {{ solution }}")),
        "leaks",
        "holds all of 'solution' in 16 of 16 rows",
        "fail",
    ),
    "a word of an answer in the question": Case(
        "the same, where an answer is one long word: it may be a choice to pick from",
        Setup(rows=rows(answer=long_word, prompt=lambda r: asked(f"{question(r)} {long_word(r)}"))),
        Setup(rows=rows(answer=long_word)),
        "leaks",
        "gives its answer away",
    ),
    "a nested answer in the question": Case(
        "verl's rows: the answer stands in reward_model.ground_truth",
        Setup(
            lambda: SameCheckpointTeacher(context=VERL),
            rows=rows(reward_model=nested, prompt=lambda r: asked(f"{r['answer']}?")),
        ),
        Setup(lambda: SameCheckpointTeacher(context=VERL), rows=rows(reward_model=nested)),
        "leaks",
        "'reward_model.ground_truth' stands in the prompt in",
    ),
    "the answer in the system turn": Case(
        "a system turn per row, made from the row's own columns",
        Setup(rows=rows(prompt=lambda r: asked(question(r), system=f"The reference answer is {r['answer']}."))),
        Setup(rows=rows(prompt=lambda r: asked(question(r), system="Be kind."))),
        "leaks",
        "gives its answer away",
    ),
    "the answer in the assistant's mouth": Case(
        "verl #6833: the solution lands inside the assistant turn by default",
        Setup(context(more="{% block assistant %}The answer is {{ answer }}. {% endblock %}")),
        Setup(context(more="{% block system %}The answer is {{ answer }}.{% endblock %}")),
        "leaks",
        "lets the assistant itself say answer",
    ),
    "a context that is always empty": Case(
        "NousResearch/atropos #456: teacher data dropped is a no-op; TRL PR 5573",
        Setup(context("{{ prompt }}{% if answer | length > 99 %} It is {{ answer }}.{% endif %}")),
        Setup(context("{{ prompt }}{% if answer | length < 99 %} It is {{ answer }}.{% endif %}")),
        "prompts",
        "its context is always empty",
        "fail",
    ),
    "a context that is empty in some rows": Case(
        "TRL SDFT: rows without context; ms-swift: batches where some rows have a teacher_prompt",
        Setup(context("{{ prompt }}{% if domain == 'odd' %} It is {{ answer }}.{% endif %}")),
        Setup(context("{{ prompt }}{% if domain != 'x' %} It is {{ answer }}.{% endif %}")),
        "prompts",
        "just what the student sees in 8 of 16 prompts",
    ),
    "an average the wrong way round": Case(
        "TRL PR 4935: the EMA's rate inverted; PR 5862: an update rate of 0.6 by default",
        Setup(lambda: EMATeacher(0.01, context="answer_only")),
        Setup(lambda: EMATeacher(0.99, context="answer_only")),
        "environment",
        "what SDPO and TRL call an update rate|What SDPO and TRL call an update rate",
    ),
    "a live teacher": Case(
        "siyan-zhao/OPSD #21: very unstable",
        Setup(lambda: LiveTeacher(context="answer_only")),
        USUAL,
        "environment",
        "drifts with its student",
    ),
    "messages printed as Python prints them": Case(
        "TRL PR 5990: conversational contexts stringified",
        Setup(context("{{ prompt }} {{ talk }}"), rows=rows(talk=lambda r: str(asked(r["solution"])))),
        Setup(context("{{ prompt }} {{ talk }}"), rows=rows(talk=lambda r: asked(r["solution"]))),
        "prompts",
        "as Python prints them",
        "fail",
    ),
    "a template without the question": Case(
        "TRL SDFT: the question cut away; a template written from memory",
        Setup(context("The answer is {{ answer }}. Say it.")),
        Setup(context("{{ prompt }} The answer is {{ answer }}. Say it.")),
        "prompts",
        "does not show the question in 16 rows",
    ),
    "a placeholder that nobody filled": Case(
        "str.format templates of TRL, SDPO and prime-rl: a field that is no field",
        Setup(rows=rows(prompt=lambda r: asked(question(r) + " Use {{ hint }}."))),
        USUAL,
        "prompts",
        "to the letter",
    ),
    "most contexts shortened": Case(
        "modelscope/ms-swift #6956; SDPO's reprompts at max_reprompt_len",
        Setup(context("{{ prompt }} {{ solution }}", truncate="solution", max_prompt_tokens=70), rows=LONG),
        Setup(context("{{ prompt }} {{ solution }}", truncate="solution", max_prompt_tokens=400), rows=LONG),
        "prompts",
        "shortened in",
    ),
    "a prompt longer than the model": Case(
        "siyan-zhao/OPSD #22, #30; a completion behind a prompt that fills the context",
        Setup(rows=rows(solution=lambda r: "word " * 600), teacher=context("{{ prompt }} {{ solution }}")),
        Setup(rows=rows(solution=lambda r: "word " * 60), teacher=context("{{ prompt }} {{ solution }}")),
        "settings",
        "together more than the 512 tokens",
        "fail",
    ),
    "a keyword that no template reads": Case(
        "QwenLM's enable_thinking on a model that has none; a misspelt keyword",
        Setup(settings={"chat_template_kwargs": {"enable_thinkng": True}}),
        Setup(settings={"chat_template_kwargs": {"enable_thinking": True}}),
        "tokenizers",
        "does not read enable_thinkng",
    ),
    "a column that the template needs and nobody has": Case(
        "huggingface/trl #5741: a privileged column under another name",
        Setup(lambda: SameCheckpointTeacher(context="hint")),
        Setup(lambda: SameCheckpointTeacher(context="hint"), rows=rows(hint=lambda r: "Count on.")),
        "settings",
        "needs the column 'hint'",
        "fail",
    ),
    "dropout in training": Case(
        "TRL leaves dropout on; two passes of one LoRA model moved by half a nat",
        Setup(model=lambda: make_llama(attention_dropout=0.3).eval(), settings={"disable_dropout": False}),
        Setup(model=lambda: make_llama(attention_dropout=0.3)),
        "alignment",
        "without a context the teacher is the student, and they differ",
    ),
    "a forward pass that is never the same twice": Case(
        "noise in a layer of one's own that eval mode does not switch off",
        Setup(model=lambda: _restless(make_llama(0))),
        USUAL,
        "settings",
        "UnsupportedModelError",
        "fail",
    ),
}


# Chat templates and rows as they are in the wild, which the doctor must not complain of.
MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
)
PHI = CHATML.replace("{% endif %}{% endif %}", "{% endif %}{% else %}{{ eos_token }}{% endif %}")
JSON_TOOLS = CHATML.replace(
    "message['content'] +", "(message['content'] | tojson if message['role'] == 'tool' else message['content']) +"
)
FORGETTING = CHATML.replace("message['content'] +", "message['content'].split('</think>')[-1] +")
TEXT_TURNS = (
    "{% for message in messages %}{{ message['role'].title() + ': ' + message['content'] + '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
PLAIN = rows(prompt=question)
TOOLS = rows(
    prompt=lambda r: [
        *asked("Use the clock."),
        {"role": "assistant", "content": "<think>Which?</think>I ask it."},
        {"role": "tool", "content": '{"time": "noon"}\nend'},
        *r["prompt"],
    ]
)
PROCESSES = ("photosynthesis", "thermodynamics", "crystallisation", "electromagnetism")
CHOICES = rows(
    prompt=lambda r: asked(f"{question(r)} Choose: {', '.join(PROCESSES)}."),
    answer=lambda r: PROCESSES[int(r["answer"]) % 4],
)
LATEX = r" Write \frac{{x}}{2} and \text{{abc}}."
PLACES = ("Westphalia in Osnabrueck", "Vienna on the Danube", "Utrecht at the Rhine")
EXTRACT = rows(answer=lambda r: PLACES[int(r["answer"]) % 3])
HEALTHY: dict[str, Setup] = {
    "turns between [INST] marks": Setup(tokenizer=with_template(MISTRAL)),
    "an end of text where nothing is generated": Setup(tokenizer=with_template(PHI)),
    "tools as JSON": Setup(tokenizer=with_template(JSON_TOOLS), rows=TOOLS),
    "history without thoughts": Setup(tokenizer=with_template(FORGETTING), rows=TOOLS),
    "turns in plain words": Setup(RULED.teacher, with_template(TEXT_TURNS), rows=RULE),
    "plain text": Setup(context(), rows=PLAIN),
    "plain text, no chat template": Setup(context(), with_template(None), rows=PLAIN),  # type: ignore[arg-type]
    "choices to pick from": Setup(rows=CHOICES),
    "an answer to be found in one question": Setup(
        rows=[{**r, "prompt": asked(f"{question(r)} {r['answer']}")} if i == 3 else r for i, r in enumerate(EXTRACT)]
    ),
    "fractions in LaTeX": Setup(rows=rows(prompt=lambda r: asked(question(r) + LATEX))),
    "thinking bridged on request": Setup(context(bridge_thinking=True)),
    "checkpointed gradients": Setup(settings={"gradient_checkpointing": True}),
}


def _shifted(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
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


class _Restless(torch.nn.Module):
    """Noise in the forward pass that eval mode does not switch off, as of a layer written by hand."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(self.inner(hidden), 0.3, training=True)


def _restless(model: Any) -> Any:
    for layer in model.model.layers:
        layer.mlp = _Restless(layer.mlp)
    return model
