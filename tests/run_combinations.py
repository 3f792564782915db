"""Random combinations of teacher, context, loss, sampling, precision and student, and the tiny runs they make.

A new self-teacher, context, loss or setting joins every combination with one line in a table. `run_twin` recomputes
what such a run must log.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import make_gpt2, make_llama, make_rows, make_tokenizer
from datasets import Dataset
from helpers import LORA, make_args, move
from peft import LoraConfig, get_peft_model
from torch import Tensor

from opsd import (
    EMATeacher,
    LiveTeacher,
    MixtureTeacher,
    OPSDTrainer,
    PastCheckpointTeacher,
    PrivilegedContext,
    RoutedTeacher,
    SameCheckpointTeacher,
    SiblingTeacher,
    SnapshotTeacher,
)

VOCABULARY = 300
STEPS = 3
EVAL_ROWS, EVAL_BATCHES = 5, 3  # in batches of 2
Weights = Mapping[str, Tensor]  # the trainable parameters by name, float64
Row = Mapping[str, Any]

# ---- the tables ------------------------------------------------------------------------------------------------------

TEMPLATE = "{{% extends 'base.jinja' %}}{{% block user %}}{user}{{% endblock %}}"


@dataclass(frozen=True)
class TwinContext:
    """A context, and the turns of its prompt for a row and the fields of its rollout; None where it has none."""

    make: Callable[[], Any]
    turns: Callable[[Row, Row], list[tuple[str, str]] | None]


def _in_text(user: str, expected: Callable[[Row, Row], str | None], **settings: Any) -> TwinContext:
    source = TEMPLATE.format(user=user)

    def turns(row: Row, fields: Row) -> list[tuple[str, str]] | None:
        text = expected(row, fields)
        system = [("system", settings["system"])] if "system" in settings else []
        return None if text is None else [*system, ("user", text)]

    return TwinContext(lambda: PrivilegedContext.from_string(source, **settings), turns)


def question(row: Row) -> str:
    return row["prompt"][-1]["content"]


CONTEXTS = {
    "none": TwinContext(lambda: None, lambda row, fields: [("user", question(row))]),
    "answer": _in_text("{{ prompt }} It is {{ answer }}.", lambda row, f: f"{question(row)} It is {row['answer']}."),
    "shipped": TwinContext(
        lambda: "answer_only",
        lambda row, f: [("user", f"{question(row)}\n\nThe correct answer is {row['answer']}. Answer with it.")],
    ),
    "solution and system": _in_text(
        "{{ solution }} So: {{ prompt }}", lambda row, f: f"{row['solution']} So: {question(row)}", system="Be brief."
    ),
    "sibling": _in_text(
        "{{ prompt }} One was ({{ sibling }}).",
        lambda row, f: f"{question(row)} One was ({f['sibling']})." if f.get("sibling") else None,
    ),
}

# name -> (its constructor, given a context or None; (steps done, the last step that has begun, the student's weights
# after each number of steps) -> the teacher's)
SELF_TEACHERS: dict[str, tuple[Callable[[Any], Any], Callable[[int, int, Mapping[int, Weights]], Weights]]] = {
    "same checkpoint": (lambda c: SameCheckpointTeacher(context=c), lambda k, begun, past: past[0]),
    "live": (lambda c: LiveTeacher(context=c), lambda k, begun, past: past[k]),
    "ema": (
        lambda c: EMATeacher(0.7, context=c),
        lambda k, begun, past: averaged([past[n] for n in range(k + 1)], 0.7),
    ),
    "snapshot": (lambda c: SnapshotTeacher(2, context=c), lambda k, begun, past: past[begun - begun % 2]),
    "checkpoint 1": (
        lambda c: PastCheckpointTeacher("checkpoint-1", context=c),
        lambda k, begun, past: past[min(k, 1)],
    ),
}
COMPOSITES = ("sibling model", "two weights", "two contexts", "pushed away", "route")
TEACHERS = (*SELF_TEACHERS, *COMPOSITES)
STUDENTS = ("full", "untied", "gpt2", "lora", "arriving adapter", "lora and biases", "lora on bfloat16")

LOSSES: dict[str, dict[str, Any]] = {
    "reverse KL": {},
    "forward KL": {"beta": 0.0},
    "JSD": {"beta": 0.3},
    "teacher's top k": {"support": "teacher_top_k", "support_k": 5},
    "student's top k": {"support": "student_top_k", "support_k": 5, "tail": "renormalise", "beta": 0.0},
    "union": {"support": "union", "support_k": 4, "beta": 0.5},
    "sampled": {"support": "sampled"},
    "sampled, no baseline": {"support": "sampled", "baseline": "none", "token_clip": 2.0},
    "entry clip": {"entry_clip": 0.05},
    "entropy gate": {"entropy_gate": 4.0},
}
TERMS: dict[str, dict[str, Any]] = {
    "none": {},
    "reference": {"ref_kl_coef": 0.3},
    "kept by entropy": {"keep_fraction": 0.5},
    "kept by disagreement": {"keep_fraction": 0.6, "keep_by": "disagreement"},
    "by drift": {"prefix_weight": 1.5},
    "discounted": {"reward_to_go": "discounted", "discount": 0.9},
    "mean reward to go and reference": {"reward_to_go": "mean", "ref_kl_coef": 0.1},
    "contrast": {"contrast_context": "answer_only"},
}
SELECTIONS: dict[str, dict[str, Any]] = {
    "all": {},
    "not the first": {"skip_first_tokens": 1},
    "the first only": {"first_tokens_only": 3},
    "ended": {"mask_truncated_completions": True},
    "without a token": {"mask_tokens": ["<|im_end|>", "e"]},
    "by pass rate": {"pass_rate_column": "rate"},
}
GROUPS: dict[str, dict[str, Any]] = {
    "single": {},
    "of two, graded": {"num_generations": 2},
    "wrong ones": {"num_generations": 2, "distill_on": "wrong"},
    "reinforced": {"num_generations": 4, "grpo_coef": 0.5, "grpo_on": "all"},
    "right reinforced": {"num_generations": 2, "distill_on": "wrong", "grpo_coef": 1.0, "grpo_on": "undistilled"},
}
SAMPLING: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.6},
    "hot": {"temperature": 1.4},
    "half off-policy": {"lmbda": 0.5},
    "off-policy": {"lmbda": 0.0},
    "the teacher's samples": {"lmbda": 0.5, "seq_kd": True},
    "off-policy first": {"lmbda_schedule": {0: 0.0, 1: 0.5, 2: 1.0}},
    "short first": {"completion_length_schedule": {0: 2, 2: 5}},
    "top p": {"top_p": 0.9},
    "top k": {"top_k": 20},
}
BATCHES = ({}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
           {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4})  # fmt: skip

LOGS: dict[str, dict[str, Any]] = {
    "every step": {},
    "once": {"logging_steps": STEPS},
    "once, with an evaluation before": {"logging_steps": STEPS, "eval_strategy": "steps", "eval_steps": 2},
}


@dataclass(frozen=True)
class Combination:
    """One random combination; equal seeds give equal ones."""

    seed: int
    student: str
    teacher: str
    parts: tuple[str, ...]
    context: str
    loss: str
    terms: str
    selection: str
    groups: str
    sampling: str
    batch: int
    log: str
    precision: str

    @property
    def rounding(self) -> str:
        """What rounds its values: the row of `run_twin.BOUNDS`."""
        if self.precision == "float32" and self.student != "lora on bfloat16":
            return "float32"
        chooses = "top k" in self.loss or self.loss in ("union", "entropy gate", "entry clip") or "kept" in self.terms
        return "bfloat16, tokens or entries chosen" if chooses else "bfloat16"

    @property
    def settings(self) -> dict[str, Any]:
        tables = ((LOSSES, self.loss), (TERMS, self.terms), (SELECTIONS, self.selection), (GROUPS, self.groups))
        chosen = [table[name] for table, name in (*tables, (SAMPLING, self.sampling))]
        together = {
            "max_steps": STEPS,
            "max_completion_length": 5,
            "seed": self.seed,
            "learning_rate": 3e-2,
            "per_device_eval_batch_size": 2,
        }
        for each in (*chosen, BATCHES[self.batch], LOGS[self.log], {"bf16": self.precision == "bfloat16"}):
            together |= each
        return together

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in vars(self).items())


def draw(seed: int) -> Combination:
    """Return the combination of a seed; seeds in a row have every teacher and student. opsd refuses some of them."""
    rng = random.Random(seed)

    def mostly(first: str, table: Sequence[str] | Mapping[str, Any]) -> str:
        return first if rng.random() < 0.5 else rng.choice(list(table))

    return Combination(
        seed,
        STUDENTS[seed % len(STUDENTS)],
        TEACHERS[seed % len(TEACHERS)],
        tuple(rng.choice(list(SELF_TEACHERS)) for _ in range(2)),
        rng.choice(list(CONTEXTS)),
        mostly("reverse KL", LOSSES),
        mostly("none", TERMS),
        mostly("all", SELECTIONS),
        mostly("single", GROUPS),
        mostly("plain", SAMPLING),
        rng.randrange(len(BATCHES)),
        rng.choice(list(LOGS)),
        rng.choice(("float32", "float32", "bfloat16")),
    )


# ---- the run ---------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """The rows and completions of one step, or of one batch of evaluation, and the student's weights at that time."""

    rows: list[Row]
    completions: list[list[int]]
    on_policy: int
    step: int
    weights: Weights


class Recorder(OPSDTrainer):
    """An OPSDTrainer that keeps what was sampled, and with which weights."""

    batches: list[Batch]
    eval_batches: list[Batch]

    def _sample(self, rows: Any, count: int) -> Any:
        rollouts = super()._sample(rows, count)
        record = Batch(
            [dict(row) for row in rows],
            copy.deepcopy(list(rollouts.completion_ids)),
            count,
            self.state.global_step,
            weights_of(self.student.model),
        )
        (self.batches if self.model.training else self.eval_batches).append(record)
        return rollouts


def weights_of(model: torch.nn.Module) -> Weights:
    return {name: p.detach().double().clone() for name, p in model.named_parameters() if p.requires_grad}


def averaged(past: Sequence[Weights], decay: float) -> Weights:
    """An exponential moving average that starts as the first weights."""
    mean = dict(past[0])
    for weights in past[1:]:
        mean = {name: decay * mean[name] + (1 - decay) * weights[name] for name in mean}
    return mean


def make_student(kind: str, seed: int) -> torch.nn.Module:
    if kind == "gpt2":
        return make_gpt2(seed, VOCABULARY)
    if kind in ("full", "untied"):
        return make_llama(seed, VOCABULARY, tie=kind == "full")
    model = make_llama(seed, VOCABULARY, attention_bias=kind == "lora and biases")
    if kind == "lora on bfloat16":
        model = model.to(torch.bfloat16)
    torch.manual_seed(seed)
    peft = get_peft_model(model, LoraConfig(**LORA, bias="all" if kind == "lora and biases" else "none"))
    if kind == "arriving adapter":
        move(peft)
    return peft


def sibling_model(seed: int) -> torch.nn.Module:
    return make_llama(seed + 1000, VOCABULARY, tie=False, hidden_size=48, num_attention_heads=4)


def make_teacher(combination: Combination) -> Any:
    def context(name: str = combination.context) -> Any:
        return CONTEXTS[name].make()

    first, second = (SELF_TEACHERS[part][0] for part in combination.parts)
    if combination.teacher == "sibling model":
        model = sibling_model(combination.seed)
        return SiblingTeacher(model, tokenizer=make_tokenizer(VOCABULARY), context=context())
    if combination.teacher == "two weights":
        return MixtureTeacher([first(context()), second(context("answer"))], [0.4, 0.6])
    if combination.teacher == "two contexts":
        return MixtureTeacher(first(None), [0.3, 0.7], contexts=[context(), context("answer")], kind="geometric")
    if combination.teacher == "pushed away":
        return MixtureTeacher([first(context()), second(context("none"))], [1.5, -0.5], kind="geometric")
    if combination.teacher == "route":
        return RoutedTeacher("domain", {"even": first(context()), "odd": second(context("answer"))})
    return SELF_TEACHERS[combination.teacher][0](context())


def reward(completion_ids: Sequence[Sequence[int]], **kwargs: Any) -> list[float]:
    """1 for a completion whose ids add up to an even number, else 0."""
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]


def build(combination: Combination, folder: Path) -> Recorder:
    """Make the run.

    Raises:
        OPSDError: opsd refuses the combination.
    """
    rows = [
        {**row, "rate": (number % 5) / 4, "completion": [{"role": "assistant", "content": f"It is {row['answer']}."}]}
        for number, row in enumerate(make_rows(12 + EVAL_ROWS))
    ]
    trainer = Recorder(
        make_student(combination.student, combination.seed),
        make_teacher(combination),
        args=make_args(folder, **combination.settings),
        train_dataset=Dataset.from_list(rows[:12]),
        eval_dataset=Dataset.from_list(rows[12:]),
        processing_class=make_tokenizer(VOCABULARY),
        reward_funcs=None if combination.groups == "single" else reward,
    )
    trainer.batches, trainer.eval_batches = [], []
    return trainer
