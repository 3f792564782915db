"""Eleven ways to make the demo's run fail, and five healthy runs.

Each is a run file: the demo's sums with another teacher, template or rows. `expected` are the monitors of which one
must speak. Those that are `apart` were set apart before thresholds were chosen, and are reported separately.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.learning import tasks
from benchmarks.learning.parts import ROLLOUTS, common_settings
from opsd.commands.demo_sums import SumsSettings, sums_settings
from opsd.commands.demo_tasks import Row, arithmetic, question, write_rows

STEPS, SHORT, EVERY, QUESTIONS = 50, 30, 5, 400  # a run that is made to fail has failed by step SHORT
TESTED = 20  # questions of the test split, which says nothing here
LOOKS_SEED = 4242  # of the questions that every run is asked every EVERY steps

# A model of this size follows examples where it does not follow an instruction: with these four the teacher answers
# nearly every question in their way.
SUMS = {"12 + 7": 19, "45 - 18": 27, "331 + 52": 383, "80 - 26": 54}
ROLES = ("user", "assistant")
PLAIN = '{% extends "base.jinja" %}\n{% block user %}\n{{ prompt }}\n{% endblock %}\n'


@dataclass(frozen=True)
class Provoked:
    """A run that is made to fail, or a healthy one.

    Args:
        about: what is done to it.
        expected: monitors of which one must say act; none of any for a healthy run.
        settings: of its run file, beside the common ones; {folder} stands for its folder.
        rows: (seed) -> its training rows.
        seed: of training.
        apart: whether it was set apart before thresholds were chosen.
        context: of its teacher.
        answers: (sum, its answer) -> what the teacher's examples answer, in place of a context.
    """

    about: str
    expected: tuple[str, ...]
    settings: Mapping[str, Any]
    rows: Callable[[int], list[Row]] = lambda seed: tasks.training_sums(STEPS * ROLLOUTS, seed)
    seed: int = 0
    apart: bool = False
    context: Any = None
    answers: Callable[[str, int], str] | None = None


FAST = {"learning_rate": 3e-5}
SLOW = {"learning_rate": 1e-5}
FORWARD = {
    "learning_rate": 1e-5,
    "beta": 0.0,
    "max_steps": SHORT,
}  # what the teacher does, however unlikely the student finds it
TAUGHT = sums_settings(SumsSettings(), "", Path())["context"]  # the demo's: the answer, and two worked examples
RUNS: dict[str, Provoked] = {
    "live teacher": Provoked(
        "the teacher is the student as it is now, without a gate",
        ("entropy", "diversity", "repetition", "length", "truncation", "task"),
        {"teacher": {"strategy": "live"}, "learning_rate": 3e-6, "max_steps": SHORT}, context="answer_only",
    ),
    "leak": Provoked(
        "the teacher's examples name the reference solution", ("leak",), FORWARD,
        answers=lambda sum_, answer: f"According to the reference solution, the answer is {answer}.",
    ),
    "style": Provoked(
        "the teacher's examples have a style, and it is told nothing", ("style", "opening"), FORWARD, apart=True,
        answers=lambda sum_, answer: f"WELL --- THE ANSWER, MY FRIEND, IS --- {answer} !!!",
    ),
    "zero gradient": Provoked(
        "the teacher is the student, without a context", ("gradient",), {**FAST, "max_steps": SHORT}
    ),
    "length collapse": Provoked(
        "the teacher's examples are one word", ("length", "diversity", "entropy", "opening"), FORWARD,
        answers=lambda sum_, answer: "ok",
    ),
    "repetition": Provoked(
        "the teacher's examples repeat themselves", ("repetition", "truncation"),
        {**FORWARD, "max_completion_length": 48}, answers=lambda sum_, answer: " ".join([str(answer)] * 24),
    ),
    "no lift": Provoked(
        "the teacher is told the answers of other rows", ("lift", "task"), {**FAST, "max_steps": SHORT},
        context={**TAUGHT, "fields": {"answer": "other_answer"}},
    ),
    "overfit": Provoked(
        "sixteen rows, again and again", ("overfit", "task"), {"learning_rate": 1e-4, "max_steps": SHORT},
        context=TAUGHT, rows=lambda seed: tasks.training_sums(ROLLOUTS, seed),
    ),
    "diversity collapse": Provoked(
        "the teacher's examples have one and the same answer", ("diversity", "entropy", "siblings"), FORWARD,
        answers=lambda sum_, answer: "The answer is 7.",
    ),
    "thinking mode": Provoked(
        "the teacher thinks aloud, and the student does not", ("opening", "style", "truncation"), FORWARD, apart=True,
        answers=lambda sum_, answer: f"<think>\nOkay, let me think about it. First, I consider {sum_}. Hmm, wait, "
        "perhaps I should check it again.",
    ),
    # Meant to be healthy: a failure that nobody provoked.
    "fast average": Provoked(
        "the teacher is the average of the student over some twenty steps", ("task", "entropy", "diversity"),
        {"teacher": {"strategy": "ema", "decay": 0.95}, **FAST}, context=TAUGHT,
    ),
    **{
        f"healthy {seed}": Provoked("the demo's run", (), FAST, seed=seed, context=TAUGHT, apart=seed == 2)
        for seed in range(3)
    },
    **{
        f"healthy ema {seed}": Provoked(
            "the demo's run with an averaged teacher", (), {"teacher": {"strategy": "ema", "decay": 0.99}, **SLOW},
            seed=seed, context=TAUGHT, apart=seed == 1,
        )
        for seed in range(2)
    },
}  # fmt: skip


def questions() -> list[Row]:
    """Return the fixed questions that every run is asked."""
    rows = [
        *tasks.sums("test", TESTED),
        *(row for seed in range(3) for row in tasks.training_sums(STEPS * ROLLOUTS, seed)),
    ]
    without = [question(row) for row in rows]
    return arithmetic(QUESTIONS, LOOKS_SEED, without=without)


def examples(answers: Callable[[str, int], str]) -> list[dict[str, str]]:
    """Return the turns of the teacher's examples."""
    asked = "State the final answer to the following arithmetic problem: {} ="
    turns = [(asked.format(sum_), answers(sum_, answer)) for sum_, answer in SUMS.items()]
    return [{"role": role, "content": text} for turn in turns for role, text in zip(ROLES, turn, strict=True)]


def prepare(name: str, folder: Path) -> dict[str, Any]:
    """Write rows and template of a run into its folder, and return its run file."""
    run, context = RUNS[name], RUNS[name].context
    folder.mkdir(parents=True, exist_ok=True)
    if run.answers is not None:
        (folder / "plain.jinja").write_text(PLAIN)
        context = {"template": str(folder / "plain.jinja"), "examples": examples(run.answers)}
    write_rows(folder / "train.jsonl", run.rows(run.seed))
    write_rows(folder / "questions.jsonl", questions())
    write_rows(folder / "test.jsonl", tasks.sums("test", TESTED))
    plan = {
        "test": str(folder / "test.jsonl"), "selection": str(folder / "questions.jsonl"), "every": EVERY,
        "grader": "last_number", "batch_size": 100,
    }  # fmt: skip
    settings = {
        "teacher": {"strategy": "same_checkpoint"}, "max_steps": STEPS, "max_completion_length": 24, "seed": run.seed,
        **run.settings,
    }  # fmt: skip
    shown = {} if context is None else {"context": context}
    common = {**common_settings(folder), "dataset_name": str(folder / "train.jsonl"), "output_dir": str(folder / "run")}
    return {**common, **settings, **shown, "evaluation": plan}
