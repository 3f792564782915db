"""What several test files need: a small run, and the states it can begin from."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from conftest import make_llama, make_rows, make_tokenizer
from datasets import Dataset
from fault_server import FaultServer
from peft import LoraConfig, get_peft_model

from opsd import (
    EMATeacher,
    LiveTeacher,
    MixtureTeacher,
    OPSDConfig,
    OPSDTrainer,
    PastCheckpointTeacher,
    PrivilegedContext,
    RoutedTeacher,
    SameCheckpointTeacher,
    ServedTeacher,
    SiblingTeacher,
    SnapshotTeacher,
)
from opsd.contexts.renderer import PromptRenderer
from opsd.rollouts import Rollouts
from opsd.teachers import StudentHandle, Teacher

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
STUDENTS = ("full", "lora", "arriving adapter")

# One of each strategy, with contexts of several kinds, for tests of whole runs.
MAKE_TEACHER = {
    "same_checkpoint": lambda: SameCheckpointTeacher(context="answer_only"),
    "live": lambda: LiveTeacher(context="worked_solution"),
    "ema": lambda: EMATeacher(0.8, context="answer_only"),
    "sibling": lambda: SiblingTeacher(make_llama(5), tokenizer=make_tokenizer(), context="answer_only"),
    "past_checkpoint": lambda: PastCheckpointTeacher("checkpoint-3", context="answer_only"),
    "snapshot": lambda: SnapshotTeacher(
        2, gate={"metric": "entropy", "bounds": {"completions/mean_length": [0.9, 1.1]}}, context="answer_only"
    ),
    "mixture": lambda: MixtureTeacher(
        EMATeacher(0.8), [0.5, 0.5], contexts=["answer_only", "worked_solution"], kind="geometric"
    ),
    "routed": lambda: RoutedTeacher(
        "domain", {"even": EMATeacher(0.8, context="answer_only"), "odd": SnapshotTeacher(3)}, context="worked_solution"
    ),
    "served": lambda: ServedTeacher(address_of_a_model(), top_k=50, context="answer_only"),
}


@cache
def address_of_a_model() -> str:
    """Of a server of this process, which has the sibling's weights."""
    return FaultServer(make_llama(5), make_tokenizer()).start().url


# The last lines of a script of several processes: a thread of gloo can abort an interpreter that is being torn down, as
# was seen once in some hundred runs ("terminate called without an active exception").
LEAVE = """
import os, sys
sys.stdout.flush(), sys.stderr.flush()
os._exit(0)
"""

RUNS = [(t, s) for t in MAKE_TEACHER for s in STUDENTS]


def make_student(kind: str, seed: int = 0) -> torch.nn.Module:
    """A student as users bring it: a full model, a fresh adapter, or an adapter that training has moved already."""
    model = make_llama(seed)
    if kind == "full":
        return model
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(**LORA))
    if kind == "arriving adapter":
        move(model)
    return model


def move(model: torch.nn.Module, by: float = 0.05) -> None:
    """Change every trainable parameter, as a training step does."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(by * torch.randn(p.shape, generator=generator))


def make_args(folder: Path | str, **changes: Any) -> OPSDConfig:
    """Settings of a run of a few steps on two cores."""
    settings: dict[str, Any] = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    return OPSDConfig(str(folder), **{**settings, **changes})


def make_trainer(
    folder: Path | str,
    teacher: Any = None,
    student: Any = "full",
    rows: Any = None,
    reward_funcs: Any = None,
    eval_rows: Any = None,
    evaluation: Any = None,
    **changes: Any,
) -> OPSDTrainer:
    """A trainer on a tiny model; `student` is one of STUDENTS or a model."""
    if isinstance(teacher, Teacher) and teacher.lists is not None:
        changes = {"support": "teacher_top_k", "support_k": teacher.lists, **changes}
    return OPSDTrainer(
        make_student(student) if isinstance(student, str) and student in STUDENTS else student,
        teacher,
        args=make_args(folder, **changes),
        train_dataset=Dataset.from_list(make_rows()) if rows is None else rows,
        eval_dataset=eval_rows,
        processing_class=make_tokenizer(),
        reward_funcs=reward_funcs,
        evaluation=evaluation,
    )


def prepared(teacher: Teacher, model: torch.nn.Module) -> Teacher:
    """The teacher, ready to score without a trainer."""
    teacher.prepare(StudentHandle(model, PromptRenderer(make_tokenizer())))
    return teacher


def make_rollouts(count: int = 5, context: PrivilegedContext | None = None) -> Rollouts:
    """Rollouts of uneven lengths, with one unscored token inside the longest completion."""
    tokenizer, rows = make_tokenizer(), make_rows(count)
    prompts = [PromptRenderer(tokenizer).ids(row["prompt"]) for row in rows]
    generator = torch.Generator().manual_seed(3)
    completions = [torch.randint(3, 300, (1 + 3 * i % 7,), generator=generator).tolist() for i in range(count)]
    mask = [[1] * len(ids) for ids in completions]
    mask[max(range(count), key=lambda i: len(completions[i]))][1] = 0
    return Rollouts(rows, prompts, completions, mask)


def returns(rewards: list[float | None], feedback: list[str | None] | None = None) -> Any:
    """A reward function that says the same whatever it is asked."""

    def fixed(*, log_extra: Any, **columns: Any) -> list[float | None]:
        if feedback is not None:
            log_extra("feedback", feedback)
        return rewards

    return fixed


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def logged(trainer: OPSDTrainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def changed(trainer: OPSDTrainer, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
