"""The experiments: each writes its rows and returns the run file that `opsd sweep` trains and compares.

Every arm gets the same learning rates, a decade of them, and is compared at its own best one, which the selection split
chooses with the first seed. No run is chosen on test questions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.learning import tasks
from benchmarks.learning.graders import json_form
from benchmarks.learning.parts import (
    ROLLOUTS,
    SENTENCE,
    Experiment,
    common_settings,
    evaluation,
    in_sentences,
    models_of,
    run_file,
    with_controls,
    write_training,
)
from benchmarks.learning.wordings import examined, levers, sampled_ahead, sums, wordings
from opsd import PrivilegedContext
from opsd.cli import main as opsd
from opsd.commands.demo_tasks import EVERYDAY, SUM, both_kinds, of_kind, packaged_model, question, write_rows
from opsd.contexts.renderer import PromptRenderer
from opsd.models.generation import generate

JSON_REPLY = "benchmarks.learning.graders:json_reply"
ROOM = 40  # tokens for an answer in JSON
RULE = 'Write every reply as JSON of the form {"answer": "..."} and nothing else.'
EXAMPLES = (
    ("What is the chemical symbol of iron?", "The chemical symbol of iron is Fe."),
    ("What is a lamp?", "A lamp is a device that gives light."),
    ('Write a sentence with the word "desk".', "The old desk stands by the wall."),
)


# ---- what fine-tuning costs -------------------------------------------------------------------------------------


def fine_tuning(folder: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Fine-tune on sums: on bare numbers, and on the same numbers in a sentence."""
    steps, rows_of = 48, {seed: tasks.training_sums(48 * ROLLOUTS, seed) for seed in seeds}
    for seed, rows in rows_of.items():
        write_rows(folder / f"bare-{seed}.jsonl", rows)
        write_rows(folder / f"sentence-{seed}.jsonl", in_sentences(rows))
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
    return run_file(
        folder, seeds, (6e-6, 2e-5, 6e-5), with_controls("off-policy", "seq-kd"),
        model_name_or_path=models_of(folder, "fine_tuning", "bare"),
        teacher={"strategy": "past_checkpoint", "model": packaged_model()},
        max_steps=steps, max_completion_length=24, evaluation=_recovered(folder, steps),
    )  # fmt: skip


def _recovered(folder: Path, steps: int) -> dict[str, Any]:
    """Return the `evaluation:` of a model that is to get back general knowledge and sentences, and to keep sums."""
    # A rate is good that brings back the one and keeps the other.
    selection = [*of_kind(EVERYDAY, tasks.general("selection")), *of_kind(SUM, tasks.sums("selection", 100))]
    return evaluation(
        folder, steps, selection, of_kind(EVERYDAY, tasks.general("test")), "contains",
        sums=(tasks.sums("test", 200), "last_number"), sentences=(tasks.sentences(), SENTENCE),
    )  # fmt: skip


def keep_both(folder: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Give back what fine-tuning cost, and hold the task: each kind of prompt has the teacher that is best at it."""
    steps, fine_tuned = 24, models_of(folder, "fine_tuning", "bare")
    write_training(
        folder, seeds, lambda seed: both_kinds(steps * ROLLOUTS, seed, lambda n: tasks.training_sums(n, seed))
    )
    teachers = {
        EVERYDAY: {"strategy": "past_checkpoint", "model": packaged_model()},
        SUM: {"strategy": "same_checkpoint"},  # the fine-tuned model, at step 0
    }
    return run_file(
        folder, seeds, (6e-6, 2e-5, 6e-5), with_controls("off-policy", "seq-kd"), model_name_or_path=fine_tuned,
        teacher={"strategy": "routed", "column": "kind", "teachers": teachers},
        max_steps=steps, max_completion_length=24, evaluation=_recovered(folder, steps),
    )  # fmt: skip


def drifted_teacher(folder: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Teach the model sums; its teacher is the model that learnt them and lost much else."""
    steps = 24
    write_training(
        folder, seeds, lambda seed: [{"prompt": row["prompt"]} for row in tasks.training_sums(steps * ROLLOUTS, seed)]
    )
    plan = evaluation(
        folder, steps, tasks.sums("selection", 150), tasks.sums("test", 200), "last_number",
        general=(tasks.general("test"), "contains"), sentences=(tasks.sentences(), SENTENCE),
    )  # fmt: skip
    return run_file(
        folder, seeds, (1e-5, 3e-5, 1e-4), with_controls("off-policy", "seq-kd"),
        teacher={"strategy": "past_checkpoint", "model": models_of(folder, "fine_tuning", "bare")},
        max_steps=steps, max_completion_length=24, evaluation=plan,
    )  # fmt: skip


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
        evaluation={**plan, "max_new_tokens": ROOM, "neutral": str(folder / "sentences.jsonl")},
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


# ---- D: the length of answers -----------------------------------------------------------------------------------


def answer_length(folder: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Teach scratch pads of growing length; the student was begun on them, as in GKD, and the teacher saw many."""
    steps, room = 16, 72
    held_out = {terms: tasks.pads(100, tasks.SELECTION_SEED, terms) for terms in tasks.LENGTHS}
    selection = tasks.pads(60, tasks.SELECTION_SEED, without=_questions(*held_out.values()))
    unseen = _questions(selection, *held_out.values())
    pads = tasks.pads(TEACHER_STEPS * ROLLOUTS, TEACHER_SEED, without=unseen)
    unseen += _questions(pads)  # what the teacher learnt is not asked again
    write_training(folder, seeds, lambda seed: _prompts_of(tasks.pads(steps * ROLLOUTS, seed, without=unseen)))
    teacher = _writer_of_pads(folder / "teacher", TEACHER_STEPS, room, pads)
    short, middle, long = tasks.LENGTHS
    plan = evaluation(
        folder, steps, selection, held_out[long], "last_number", general=(tasks.general("test"), "contains"),
        **{f"sums_of_{terms}": (held_out[terms], "last_number") for terms in (short, middle)},
    )  # fmt: skip
    return run_file(
        folder, seeds, (1e-5, 3e-5, 1e-4), with_controls("off-policy", "seq-kd"),
        model_name_or_path=_writer_of_pads(folder / "student", STUDENT_STEPS, room, pads),
        teacher={"strategy": "past_checkpoint", "model": teacher},
        max_steps=steps, max_completion_length=room, evaluation=plan,
    )  # fmt: skip


TEACHER_SEED, TEACHER_STEPS, STUDENT_STEPS = 555, 96, 12  # of fine-tuning on pads


def _questions(*splits: Sequence[tasks.Row]) -> list[str]:
    return [question(row) for rows in splits for row in rows]


def _prompts_of(rows: Sequence[tasks.Row]) -> list[tasks.Row]:
    return [{"prompt": row["prompt"]} for row in rows]


def _writer_of_pads(model: Path, steps: int, room: int, rows: Sequence[tasks.Row]) -> str:
    """Fine-tune a model on scratch pads, once; returns its folder."""
    path, pads = (model.with_suffix(suffix) for suffix in (".yaml", ".jsonl"))
    if not (model / "model.safetensors").exists():
        write_rows(pads, rows[: steps * ROLLOUTS])
        settings = common_settings(
            model, dataset_name=str(pads), output_dir=str(model), control="sft", learning_rate=5e-5,
            teacher={"strategy": "same_checkpoint"}, max_steps=steps, max_completion_length=room,
        )  # fmt: skip
        path.write_text(yaml.safe_dump(settings))
        if status := opsd(["train", str(path)]):
            raise SystemExit(status)
    return str(model)


EXPERIMENTS: Mapping[str, Experiment] = {
    "fine_tuning": Experiment("What does fine-tuning on answers cost elsewhere?", fine_tuning, keep="all"),
    "rule": Experiment(
        "Does a rule that is folded in hold on other domains, and what does it cost?", rule, form=json_form
    ),
    "two_tasks": Experiment("What is left of a first task after a second one?", two_tasks, form=json_form),
    "recover": Experiment("Does what fine-tuning cost come back, and does the task stay?", recover),
    "keep_both": Experiment("And if each kind of prompt has the teacher that is best at it?", keep_both),
    "drifted_teacher": Experiment("Can a model that lost much teach what it learnt, and only that?", drifted_teacher),
    "answer_length": Experiment("Does it matter whose rollouts they are when answers are long?", answer_length),
    "sums": Experiment("What does best where each row's own short answer is the context?", sums),
    "levers": Experiment("And which settings of the method do better there?", levers),
    "sampled_ahead": Experiment("And how many steps' rollouts may be sampled at once?", sampled_ahead),
    "wordings": Experiment(
        "Does the doctor tell good wordings of a context from bad ones?", wordings, measure=examined
    ),
}
