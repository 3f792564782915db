"""The experiments: each writes its rows and returns the run file that `opsd sweep` trains and compares.

Every arm gets the same learning rates, a decade of them, and is compared at its own best one, which the selection split
chooses with the first seed. The test split is read once, after training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.learning import tasks
from benchmarks.learning.graders import json_form
from opsd import PrivilegedContext
from opsd.commands.demo_tasks import packaged_model, write_rows
from opsd.contexts.renderer import PromptRenderer
from opsd.evaluation.compare import read_runs
from opsd.evaluation.pareto import tradeoff_of
from opsd.models.generation import generate

ROLLOUTS = 16  # per step
SENTENCE = "benchmarks.learning.graders:sentence"
JSON_REPLY = "benchmarks.learning.graders:json_reply"
ROOM = 40  # tokens for an answer in JSON
RULE = 'Write every reply as JSON of the form {"answer": "..."} and nothing else.'
EXAMPLES = (
    ("What is the chemical symbol of iron?", "The chemical symbol of iron is Fe."),
    ("What is a lamp?", "A lamp is a device that gives light."),
    ('Write a sentence with the word "desk".', "The old desk stands by the wall."),
)
Arms = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    Args:
        asks: the question that it answers.
        prepare: (folder, seeds) -> the run file, with its `sweep:`; writes rows into the folder.
        keep: "all" where other experiments need its models.
        form: whether an answer has the form that was asked for, counted on every split.
    """

    asks: str
    prepare: Callable[[Path, Sequence[int]], dict[str, Any]]
    keep: str = "none"
    form: Callable[[str], bool] | None = None


# ---- parts of run files -----------------------------------------------------------------------------------------


def run_file(folder: Path, seeds: Sequence[int], rates: Sequence[float], arms: Arms, **settings: Any) -> dict[str, Any]:
    """Return a run file with what all experiments have in common."""
    return {
        "model_name_or_path": packaged_model(),
        "dataset_name": str(folder / "train-{seed}.jsonl"),
        "output_dir": str(folder / "sweep"),
        "per_device_train_batch_size": ROLLOUTS,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 2,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        **settings,
        "sweep": {"learning_rate": list(rates), "seed": list(seeds), "arms": arms},
    }


def evaluation(folder: Path, steps: int, selection: Any, test: Any, grader: str, **retention: Any) -> dict[str, Any]:
    """Write the splits of an experiment and return its `evaluation:`; retention is name=(rows, grader).

    The selection split is evaluated after the last step only: it chooses learning rates, not checkpoints.
    """
    write_rows(folder / "selection.jsonl", selection)
    write_rows(folder / "test.jsonl", test)
    others = {}
    for name, (rows, its_grader) in retention.items():
        write_rows(folder / f"{name}.jsonl", rows)
        others[name] = {"rows": str(folder / f"{name}.jsonl"), "grader": its_grader}
    return {
        "test": str(folder / "test.jsonl"),
        "selection": str(folder / "selection.jsonl"),
        "every": steps,
        "grader": grader,
        "retention": others,
        "batch_size": 100,
    }


def write_training(folder: Path, seeds: Sequence[int], rows_of: Callable[[int], list[tasks.Row]]) -> None:
    """Write the training rows of every seed."""
    for seed in seeds:
        write_rows(folder / f"train-{seed}.jsonl", rows_of(seed))


def models_of(folder: Path, experiment: str, arm: str) -> str:
    """Return the path of an arm's models at its best learning rate, {seed} for the seed."""
    runs = read_runs([str(folder.parent / experiment / "sweep")])
    best = next(point for point in tradeoff_of(runs).points if point.arm == arm and point.is_best)
    return best.task.runs[0].folder.removesuffix(f"seed{best.task.runs[0].seed}") + "seed{seed}"


# ---- what fine-tuning costs -------------------------------------------------------------------------------------


def fine_tuning(folder: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Fine-tune on sums: on bare numbers, and on the same numbers in a sentence."""
    steps, rows_of = 48, {seed: tasks.training_sums(48 * ROLLOUTS, seed) for seed in seeds}
    for seed, rows in rows_of.items():
        write_rows(folder / f"bare-{seed}.jsonl", rows)
        in_sentences = [{**row, "completion": f"The answer is {row['answer']}."} for row in rows]
        write_rows(folder / f"sentence-{seed}.jsonl", in_sentences)
    arms = {name: {"control": "sft", "dataset_name": str(folder / f"{name}-{{seed}}.jsonl")} for name in FINE_TUNED}
    plan = evaluation(
        folder, steps, tasks.sums("selection", 100), tasks.sums("test", 200), "last_number",
        general=(tasks.general("test"), "contains"), sentences=(tasks.sentences(), SENTENCE),
    )  # fmt: skip
    return run_file(
        folder, seeds, (1e-5, 3e-5, 1e-4), arms, context="answer_only", teacher={"strategy": "same_checkpoint"},
        max_steps=steps, max_completion_length=24, evaluation={**plan, "samples": 4},
    )  # fmt: skip


FINE_TUNED = ("bare", "sentence")  # arms: answers as a number, and as a sentence


# ---- B: what fine-tuning cost comes back ------------------------------------------------------------------------


def recover(folder: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Give a model back what fine-tuning on bare answers cost it; the teacher is the model before."""
    steps = 24
    write_training(folder, seeds, lambda seed: tasks.neutral(steps * ROLLOUTS, seed))
    # A rate is good that brings back the one and keeps the other.
    selection = [*tasks.general("selection"), *tasks.sums("selection", 100)]
    plan = evaluation(
        folder, steps, selection, tasks.general("test"), "contains",
        sums=(tasks.sums("test", 200), "last_number"), sentences=(tasks.sentences(), SENTENCE),
    )  # fmt: skip
    return run_file(
        folder, seeds, (6e-6, 2e-5, 6e-5), with_controls("off-policy", "seq-kd"),
        model_name_or_path=models_of(folder, "fine_tuning", "bare"),
        teacher={"strategy": "past_checkpoint", "model": packaged_model()},
        max_steps=steps, max_completion_length=24, evaluation=plan,
    )  # fmt: skip


def with_controls(*names: str) -> Arms:
    """Return the method's arm and controls."""
    return {"method": {}, **{name: {"control": name} for name in names}}


# ---- A and C: a rule, folded in ---------------------------------------------------------------------------------


def rule(folder: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Fold a rule and its examples into the weights; tested without them, on domains that were not trained on."""
    return _fold_in(folder, seeds, {"model_name_or_path": packaged_model()})


def two_tasks(folder: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Fold the same rule into a model that was fine-tuned on sums before."""
    return _fold_in(folder, seeds, {"model_name_or_path": models_of(folder, "fine_tuning", "sentence")})


def _fold_in(folder: Path, seeds: Sequence[int], model: dict[str, Any]) -> dict[str, Any]:
    steps, context = 16, rule_context()
    write_training(folder, seeds, lambda seed: tasks.neutral(steps * ROLLOUTS, seed))
    for seed in seeds:
        path = folder / f"texts-{seed}.jsonl"
        if not path.exists():  # minutes; the same for a model and a seed
            texts = teacher_texts(model["model_name_or_path"].format(seed=seed), context, tasks.neutral(256, seed))
            write_rows(path, texts)
    plan = evaluation(
        folder, steps, tasks.general("selection"), tasks.general("test"), JSON_REPLY,
        sums=(tasks.sums("test", 100), "last_number"), sentences=(tasks.sentences(), SENTENCE),
    )  # fmt: skip
    arms = {
        "method": {"beta": 0.0},
        "reverse KL": {"beta": 1.0},
        "off-policy": {"control": "off-policy", "beta": 0.0},
        "sft": {"control": "sft", "dataset_name": str(folder / "texts-{seed}.jsonl")},
    }
    return run_file(
        folder, seeds, (1e-5, 3e-5, 1e-4), arms, **model, context=context,
        teacher={"strategy": "same_checkpoint"}, max_steps=steps, max_completion_length=ROOM,
        evaluation={**plan, "max_new_tokens": ROOM},
    )  # fmt: skip


def rule_context() -> dict[str, Any]:
    """Return the context with the rule and three worked examples, which the student does not see."""
    turns = [
        turn
        for text, reply in EXAMPLES
        for turn in ({"role": "user", "content": text}, {"role": "assistant", "content": json.dumps({"answer": reply})})
    ]
    return {"template": "system_rule", "values": {"rule": RULE}, "examples": turns}


def teacher_texts(model: str, context: dict[str, Any], rows: list[tasks.Row]) -> list[tasks.Row]:
    """Return rows with the model's greedy answer under the context as `completion`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    weights = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    shown = PrivilegedContext(context["template"], values=context["values"], examples=context["examples"])
    prompts = [shown.render(row, renderer=PromptRenderer(tokenizer)) for row in rows]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answers = generate(weights, prompts, tokenizer, max_new_tokens=ROOM, batch_size=64)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [{**row, "completion": text} for row, text in zip(rows, texts, strict=True)]


EXPERIMENTS: Mapping[str, Experiment] = {
    "fine_tuning": Experiment("What does fine-tuning on answers cost elsewhere?", fine_tuning, keep="all"),
    "rule": Experiment(
        "Does a rule that is folded in hold on other domains, and what does it cost?", rule, form=json_form
    ),
    "two_tasks": Experiment("What is left of a first task after a second one?", two_tasks, form=json_form),
    "recover": Experiment("Does what fine-tuning cost come back, and does the task stay?", recover),
}
