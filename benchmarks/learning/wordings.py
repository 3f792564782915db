"""The sums of `opsd demo math`: ten wordings of the context, the settings of the method, and its controls.

Does what the doctor measures in seconds predict what training with a wording gives?
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.learning import tasks
from benchmarks.learning.parts import ROLLOUTS, SENTENCE, Arms, evaluation, in_sentences, run_file, write_training
from opsd.cli import main as opsd
from opsd.commands.demo_tasks import question, worked_examples, write_rows
from opsd.evaluation.pareto import Tradeoff

RATE, RATES, STEPS = 3e-5, (1e-5, 3e-5, 1e-4), 24
ROWS = 32  # that the doctor looks at
PARENTHESIS = "{{ prompt }}\n\n(The answer is {{ answer }}.)"
COMMAND = "{{ prompt }}\n\nThe correct answer is {{ answer }}. Answer with it."
# name -> (block of the template, its text, whether two worked examples stand before the question)
WORDINGS: Mapping[str, tuple[str, str, bool]] = {
    "command": ("user", COMMAND, False),
    "command, examples": ("user", COMMAND, True),
    "parenthesis": ("user", PARENTHESIS, False),
    "parenthesis, examples": ("user", PARENTHESIS, True),
    "hint": ("user", "{{ prompt }}\n\nHint: the answer is {{ answer }}.", False),
    "before": ("user", "You know that the answer is {{ answer }}.\n\n{{ prompt }}", False),
    "sentence": ("user", "{{ prompt }}\n\nThe answer is {{ answer }}. State the answer in one short sentence.", False),
    "reference": (
        "user",
        "{{ prompt }}\n\nReference answer: {{ answer }}\n\nSolve the question and finish with the reference answer.",
        False,
    ),
    "own words": (
        "user",
        "{{ prompt }}\n\nA correct solution, for your eyes only:\n{{ answer }}\n\n"
        "Now answer the question in your own words.",
        False,
    ),
    "system": ("system", "The answer to the user's question is {{ answer }}.", False),
}
FIGURES = {
    "lift": "lift, points",
    "first_kl": "KL at the first token, nats",
    "answer_share": "KL on answers / elsewhere",
    "first_token": "p of the teacher's first token",
    "nll": "NLL per token of the teacher's answers",
}


def wordings(folder: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Train with each wording, at one learning rate; the questions are those that settings are chosen on."""
    steps = 24
    write_training(folder, seeds, lambda seed: tasks.training_sums(steps * ROLLOUTS, seed))
    # No test question of another experiment is read here.
    plan = evaluation(folder, steps, None, tasks.sums("selection", 150), "last_number")
    arms = {name: {"context": context_of(folder, name)} for name in WORDINGS}
    return run_file(
        folder, seeds, (RATE,), arms, teacher={"strategy": "same_checkpoint"}, max_steps=steps,
        max_completion_length=20, evaluation=plan,
    )  # fmt: skip


def sums(folder: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Teach sums from their bare answers: with two worked examples, as the demo did, off-policy, and by fine-tuning."""
    shown = {"context": context_of(folder, "parenthesis, examples")}
    arms: Arms = {
        "examples": shown,
        "as before": {"context": context_of(folder, "command")},
        "off-policy": {**shown, "control": "off-policy"},
        "lmbda 0": {**shown, "lmbda": 0.0, "beta": 0.0},  # on the rows' completions
        "sft": {"control": "sft"},
        "sft, bare": {"control": "sft", "dataset_name": str(folder / "bare-{seed}.jsonl")},
    }
    return _on_sums(folder, seeds, RATES, arms, evaluation=_all_splits(folder))


def levers(folder: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Teach sums as `sums` does with worked examples, and change one setting at a time."""
    arms: Arms = {
        "examples": {},
        "off-policy first": {"lmbda_schedule": {0: 0.0, 8: 1.0}},
        "forward KL": {"beta": 0.0},
        "JSD": {"beta": 0.5},
        "token clip": {"token_clip": 1.0},
        "temperature 0.7": {"temperature": 0.7},
        "short first": {"completion_length_schedule": {0: 8, 12: 20}},
        "wrong only": {"distill_on": "wrong", "reward_funcs": ["last_number"]},
        "decay": {"lr_scheduler_type": "linear"},
    }
    context = context_of(folder, "parenthesis, examples")
    return _on_sums(folder, seeds, RATES, arms, context=context, evaluation=_all_splits(folder))


def sampled_ahead(folder: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Teach sums as `levers` does, and sample the rollouts of 1, 2, 4 or 8 optimizer steps at once.

    Two arms more weigh older samples by their importance ratio. The learning rate is the one that was the best of three
    for each of the first five arms of `levers`.
    """
    arms: Arms = {f"{steps} at once": {"steps_per_generation": steps} for steps in (1, 2, 4, 8)}
    for steps in (4, 8):
        arms |= {f"{steps} at once, weighed": {"steps_per_generation": steps, "importance_clip": 2.0}}
    plan = evaluation(folder, STEPS, None, tasks.sums("test", 200), "last_number")
    context = context_of(folder, "parenthesis, examples")
    return _on_sums(folder, seeds, (RATE,), arms, context=context, evaluation=plan)


def _on_sums(folder: Path, seeds: Sequence[int], rates: Sequence[float], arms: Arms, **settings: Any) -> dict[str, Any]:
    for seed in seeds:
        rows = tasks.training_sums(STEPS * ROLLOUTS, seed)
        write_rows(folder / f"bare-{seed}.jsonl", rows)
        write_rows(folder / f"train-{seed}.jsonl", in_sentences(rows))
    return run_file(
        folder, seeds, rates, arms, **settings, teacher={"strategy": "same_checkpoint"}, max_steps=STEPS,
        max_completion_length=20,
    )  # fmt: skip


def _all_splits(folder: Path) -> dict[str, Any]:
    """Return an evaluation of sums, general knowledge and sentences, and of the drift on the last."""
    plan = evaluation(
        folder, STEPS, tasks.sums("selection", 150), tasks.sums("test", 200), "last_number",
        general=(tasks.general("test"), "contains"), sentences=(tasks.sentences(), SENTENCE),
    )  # fmt: skip
    return {**plan, "neutral": str(folder / "sentences.jsonl")}


def context_of(folder: Path, name: str) -> dict[str, Any]:
    """Write the template of a wording and return its `context:`."""
    block, text, has_examples = WORDINGS[name]
    path = folder / f"{name.replace(', ', '_').replace(' ', '_')}.jinja"
    path.write_text(f'{{% extends "base.jinja" %}}\n{{% block {block} %}}\n{text}\n{{% endblock %}}\n')
    return {"template": str(path), **({"examples": examples(text)} if has_examples else {})}


def examples(text: str) -> list[dict[str, str]]:
    """Return worked examples as turns, whose questions have their answers in a wording's form."""
    return worked_examples(
        lambda row: text.replace("{{ prompt }}", question(row)).replace("{{ answer }}", row["answer"])
    )


# ---- what the doctor measures -----------------------------------------------------------------------------------


def examined(folder: Path, settings: Mapping[str, Any], seed: int) -> dict[str, dict[str, Any]]:
    """Return what the doctor measures of each arm of a sweep, on training rows of a seed."""
    measured = {}
    for name, changes in settings["sweep"]["arms"].items():
        run = {key: value for key, value in settings.items() if key not in {"sweep", "evaluation"}} | changes
        run |= {"dataset_name": settings["dataset_name"].format(seed=seed), "output_dir": str(folder / "doctor")}
        path, report = folder / "doctor.yaml", folder / "doctor.json"
        path.write_text(yaml.safe_dump(run))
        opsd(["doctor", str(path), "--only", "lift,reach,divergence", "--rows", str(ROWS), "--json", str(report)])
        figures = {each["check"]: each["figures"] for each in json.loads(report.read_text())["findings"]}
        measured[name] = _figures_of(figures["lift"], figures["reach"], figures["divergence"])
    return measured


def _figures_of(lift: Mapping[str, Any], reach: Mapping[str, Any], divergence: Mapping[str, Any]) -> dict[str, Any]:
    right = {who: 100 * lift[who]["right"] / lift[who]["of"] for who in ("student", "teacher")}
    share = lift["kl_answer"] / lift["kl_rest"] if lift["kl_answer"] is not None else None
    values = {"lift": right["teacher"] - right["student"], "answer_share": share, **reach}
    values["first_kl"] = divergence["first_tokens"][0]
    return {name: None if values[name] is None else round(values[name], 4) for name in FIGURES}


def measures_table(measured: Mapping[str, Mapping[str, Any]], tradeoff: Tradeoff) -> Iterator[str]:
    """Yield what the doctor measured beside what training gave, best first, and how well the one ranks the other."""
    gained = {point.arm: 100 * point.task.after.value for point in tradeoff.points if point.is_best}
    order = sorted(gained, key=gained.__getitem__, reverse=True)
    yield f"\nWhat `opsd doctor` measures on {ROWS} rows before training, and what training gives, % right:\n\n"
    yield f"|  | {' | '.join(FIGURES.values())} | after training |\n|{'---|' * (len(FIGURES) + 2)}\n"
    for arm in order:
        cells = ["?" if measured[arm][name] is None else f"{measured[arm][name]:.3g}" for name in FIGURES]
        yield f"| {arm} | {' | '.join(cells)} | {gained[arm]:.1f} |\n"
    ranks = [
        _rank_correlation([measured[arm][name] for arm in order], [gained[arm] for arm in order]) for name in FIGURES
    ]
    yield f"| rank correlation | {' | '.join('?' if rank is None else f'{rank:+.2f}' for rank in ranks)} |  |\n\n"
    yield "Spearman's rank correlation with the accuracy after training; of ten, 0.65 is beyond chance (95 %).\n"


def _rank_correlation(values: Sequence[Any], others: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation, with mean ranks for ties; None where a value is missing or all are equal."""
    if None in values or len(set(values)) == 1:
        return None
    ranks = [_ranks(np.asarray(each, float)) for each in (values, others)]
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    return ((values[:, None] > values).sum(1) + (values[:, None] >= values).sum(1)) / 2
