"""Ten ways to make the demo's run fail, and five healthy runs.

Each is a run file: the demo's sums with another teacher, template or rows. `expected` are the monitors of which one
must speak. Those that are `apart` were set apart before thresholds were chosen, and are reported separately.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.learning import tasks
from benchmarks.learning.parts import ROLLOUTS, common_settings
from opsd.commands.demo_sums import SumsSettings, sums_settings
from opsd.commands.demo_tasks import Row, arithmetic, question, write_rows

STEPS, EVERY, QUESTIONS = 50, 5, 400
TESTED = 20  # questions of the test split, which says nothing here
LOOKS_SEED = 4242  # of the questions that every run is asked every EVERY steps

HEAD = '{% extends "base.jinja" %}\n{% block user %}\n{{ prompt }}\n\n'
TAIL = "\n{% endblock %}\n"
TEMPLATES = {
    "leak": "The reference solution gives {{ answer }}. Begin with: According to the reference solution,",
    "style": "Answer in one short sentence IN CAPITAL LETTERS, with a dash between the words, and end it with !!!",
    "short": "Reply with the word ok and with nothing else.",
    "repeat": "Write the question again and again, without ever stopping.",
    "same": "Whatever the question is, reply: The answer is 7.",
}
THINKING = '{% extends "base.jinja" %}\n{% block assistant %}\n<think>\nFirst, I consider\n{% endblock %}\n'


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
    """

    about: str
    expected: tuple[str, ...]
    settings: Mapping[str, Any]
    rows: Callable[[int], list[Row]] = lambda seed: tasks.training_sums(STEPS * ROLLOUTS, seed)
    seed: int = 0
    apart: bool = False
    context: Any = field(default="answer_only")


def _template(name: str) -> str:
    return "{folder}/" + f"{name}.jinja"


FAST = {"learning_rate": 3e-5}
TAUGHT = sums_settings(SumsSettings(), "", Path())["context"]  # the demo's: the answer, and two worked examples
RUNS: dict[str, Provoked] = {
    "live teacher": Provoked(
        "the teacher is the student as it is now, without a gate",
        ("entropy", "diversity", "repetition", "length", "task"),
        {"teacher": {"strategy": "live"}, "learning_rate": 1e-5},
        context="answer_only",
    ),
    "leak": Provoked("the template tells the teacher to name the reference solution", ("leak",), {**FAST, "beta": 0.0},
                     context=_template("leak")),
    "style": Provoked("the context asks for a style and tells nothing", ("style", "opening"), FAST,
                      context=_template("style"), apart=True),
    "zero gradient": Provoked("the teacher is the student, without a context", ("gradient",), FAST, context=None),
    "length collapse": Provoked("the context asks for one word", ("length", "diversity", "entropy"), FAST,
                                context=_template("short")),
    "repetition": Provoked("the context asks for repetition", ("repetition", "truncation"),
                           {**FAST, "max_completion_length": 48}, context=_template("repeat")),
    "no lift": Provoked("the teacher is told the answers of other rows", ("task",), FAST,
                        context={"template": "answer_only", "fields": {"answer": "other_answer"}}),
    "overfit": Provoked("sixteen rows, again and again", ("task",), {"learning_rate": 1e-4}, context=TAUGHT,
                        rows=lambda seed: tasks.training_sums(ROLLOUTS, seed)),
    "diversity collapse": Provoked("the context asks for one and the same answer", ("diversity", "entropy"), FAST,
                                   context=_template("same")),
    "thinking mode": Provoked("the teacher thinks aloud, and the student does not", ("opening", "style"), FAST,
                              context=_template("thinking"), apart=True),
    **{
        f"healthy {seed}": Provoked("the demo's run", (), {"learning_rate": 3e-5}, seed=seed, context=TAUGHT,
                                    apart=seed == 2)
        for seed in range(3)
    },
    **{
        f"healthy ema {seed}": Provoked("the demo's run with an averaged teacher", (),
                                        {"teacher": {"strategy": "ema", "decay": 0.95}, "learning_rate": 3e-5},
                                        seed=seed, context=TAUGHT, apart=seed == 1)
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


def prepare(name: str, folder: Path) -> dict[str, Any]:
    """Write rows and templates of a run into its folder, and return its run file."""
    run = RUNS[name]
    folder.mkdir(parents=True, exist_ok=True)
    for template, text in TEMPLATES.items():
        (folder / f"{template}.jinja").write_text(HEAD + text + TAIL)
    (folder / "thinking.jinja").write_text(THINKING)
    write_rows(folder / "train.jsonl", run.rows(run.seed))
    write_rows(folder / "questions.jsonl", questions())
    write_rows(folder / "test.jsonl", tasks.sums("test", TESTED))
    context = run.context.format(folder=folder) if isinstance(run.context, str) else run.context
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
