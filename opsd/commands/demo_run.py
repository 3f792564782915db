"""The demo as a run like any user's: rows, a run file with `evaluation:`, and the trainer that `opsd train` builds.

The model is SmolLM2-135M-Instruct, which a package of the Python index carries, so that the demo needs no hub. The task
is arithmetic from reasoning-gym. `opsd.commands.demo` prints what this module runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from opsd.commands.demo_tasks import TEST_SEED, arithmetic, packaged_model, question, write_rows
from opsd.errors import OPSDError

CONTEXT = "answer_only"
GRADER = "last_number"  # the model answers in a sentence; reasoning-gym's scorer wants the bare number
CONTROL = "wrong-context"
RUN_FILE, TRAIN, HELD_OUT = "run.yaml", "train.jsonl", "held_out.jsonl"
MAX_NEW_TOKENS = 20  # "The final answer to this arithmetic problem is 123." and the end of turn
# What the run file says beside its settings.
COMMENTS = {
    "dataset_name": "sums and differences of two numbers, each with its answer",
    "context": "the teacher's prompt contains the right answer; the student's does not",
    "teacher": "the model at step 0, frozen",
    "per_device_train_batch_size": "rollouts per step",
    "max_completion_length": "tokens",
    "evaluation": "measured before and after training, for student and teacher",
    "gradient_checkpointing": "saves memory, which a model of this size does not need",
}
Say = Callable[[str], None]


@dataclass(frozen=True)
class DemoSettings:
    """Settings of the demo; `benchmarks/results/demo.json` has the results with these defaults.

    Args:
        model: a folder or a hub id; None takes the packaged SmolLM2-135M-Instruct.
        steps: optimizer steps.
        rollouts: rollouts per step.
        learning_rate: constant after two steps of warm-up.
        questions: held-out questions.
        seed: of training questions, order and sampling; the held-out questions are always the same.
        output: folder of the run; None takes the first free `runs/demo…`.

    Example:
        >>> DemoSettings(steps=2, rollouts=4).questions
        200
    """

    model: str | None = None
    steps: int = 24
    rollouts: int = 16
    learning_rate: float = 1.5e-5
    questions: int = 200
    seed: int = 0
    output: str | None = None


@dataclass(frozen=True)
class DemoResult:
    """Where the demo's runs are, and what they cost.

    Args:
        folder: output folder of the run, with its model, its results and its run file.
        doctor: the doctor's findings before training, in plain values.
        seconds: wall time by part.
        peak_megabytes: largest resident memory of the process.
        control: output folder of the run with wrong answers in the context, if it was asked for.

    Example:
        >>> result = run_demo(DemoSettings(), print)  # doctest: +SKIP
        >>> result.folder  # doctest: +SKIP
        'runs/demo'
    """

    folder: str
    doctor: Mapping[str, Any]
    seconds: dict[str, float]
    peak_megabytes: float
    control: str | None = None


# ---- the run file -----------------------------------------------------------------------------------------------


def run_settings(settings: DemoSettings, model: str, folder: Path) -> dict[str, Any]:
    """Return the settings of the demo's run file."""
    return {
        "model_name_or_path": model,
        "dataset_name": str(folder / TRAIN),
        "context": CONTEXT,
        "teacher": {"strategy": "same_checkpoint"},
        "output_dir": str(folder),
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.rollouts,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 2,
        "max_completion_length": MAX_NEW_TOKENS,
        "seed": settings.seed,
        "evaluation": {"test": str(folder / HELD_OUT), "grader": GRADER, "batch_size": 100},
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }


def write_run(settings: DemoSettings, model: str, folder: Path) -> Path:
    """Write training rows, held-out rows and the run file into a folder; returns the path of the run file."""
    held_out = arithmetic(settings.questions, TEST_SEED)
    train = arithmetic(settings.steps * settings.rollouts, settings.seed + 1, without=map(question, held_out))
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / HELD_OUT, held_out)
    write_rows(folder / TRAIN, train)
    path = folder / RUN_FILE
    path.write_text("\n".join(_yaml_lines(run_settings(settings, model, folder), path)) + "\n", "utf-8")
    return path


def _yaml_lines(values: Mapping[str, Any], path: Path) -> Iterator[str]:
    yield f"# The run of `opsd demo`. Change it and run: opsd train {path} --output_dir runs/mine"
    for key, value in values.items():
        first, *rest = yaml.safe_dump({key: value}, sort_keys=False).rstrip().splitlines()
        yield f"{first:<48}  # {COMMENTS[key]}" if key in COMMENTS else first
        yield from rest


def _free_folder(wanted: str) -> str:
    """Return `wanted`, or the first of wanted-2, wanted-3, … that does not exist, so that no run overwrites another."""
    names = [wanted, *(f"{wanted}-{i}" for i in range(2, 1000))]
    for name in names:
        if not Path(name).exists():
            return name
    raise OPSDError(f"{wanted} to {names[-1]} all exist. Remove some.")


# ---- the run ----------------------------------------------------------------------------------------------------


@dataclass
class _Clock:
    """Seconds by part; each call of `stop` ends a part and begins the next."""

    seconds: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    def stop(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.began
        self.began = now


def run_demo(settings: DemoSettings, say: Say, control: bool = False) -> DemoResult:
    """Write the run file, train, and measure before and after.

    Args:
        settings: what to run.
        say: called with each line to print.
        control: train once more with wrong answers in the context.
    """
    from opsd.training.machine import peak_megabytes

    clock = _Clock()
    model = settings.model or packaged_model()
    folder = Path(settings.output or _free_folder("runs/demo"))
    run_file = write_run(settings, model, folder)
    say(f"run file    {run_file}: change it and run `opsd train` on it\n")
    doctor = _train(run_file, [], clock, say, examined=True)
    control_folder = f"{folder}-control" if control else None
    if control_folder:
        say(f"\ncontrol     the same run with wrong answers in the teacher's prompt: --control {CONTROL}\n")
        rest = _Clock()
        _train(run_file, ["--control", CONTROL, "--output_dir", control_folder], rest, say)
        clock.seconds["control"] = sum(rest.seconds.values())
    return DemoResult(str(folder), doctor, clock.seconds, peak_megabytes(), control_folder)


def _train(run_file: Path, overrides: Sequence[str], clock: _Clock, say: Say, examined: bool = False) -> dict[str, Any]:
    """Do what `opsd train` does with a run file, printing a line per step; returns the doctor's findings."""
    from transformers import PrinterCallback, TrainerCallback

    from opsd.commands.build import build_trainer
    from opsd.commands.run_file import read_run

    class Steps(TrainerCallback):
        """Stands behind the evaluation in the order of callbacks: what it times is training alone."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.stop("before")

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if logs and "divergence" in logs:
                step = f"step {state.global_step:>2} of {state.max_steps}"
                tokens = f"{logs['completions/mean_length']:.1f} tokens per answer"
                say(f"{step}  KL {logs['divergence']:.3f} nats, {tokens}")

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.stop("train")

    run = read_run(run_file, overrides)
    run.args.disable_tqdm = True
    trainer = build_trainer(run)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Steps())
    clock.stop("model")
    if examined:
        trainer.files.examination = _examine(trainer, say)
        clock.stop("doctor")
    trainer.train()
    if trainer.stopped_by is not None:
        raise KeyboardInterrupt
    trainer.save_model()
    clock.stop("after")
    return trainer.files.examination.as_dict() if trainer.files.examination else {}


def _examine(trainer: Any, say: Say) -> Any:
    """Let the doctor examine the run, and print its verdict and its warnings."""
    from opsd.doctor import examine

    examination = examine(trainer)
    notable = [f for f in examination.findings if f.check == "lift" or f.status in ("warn", "fail")]
    say("\n".join([f"doctor      {examination.verdict}", *(f"            {f.saw}" for f in notable)]))
    return examination
