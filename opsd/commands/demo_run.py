"""What the demos share: run files with comments, and a trainer as `opsd train` builds it that prints its steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from opsd.errors import OPSDError

RUN_FILE = "run.yaml"
Say = Callable[[str], None]


def common_settings(folder: Path, rows: Path, steps: int, rollouts: int, longest: int, seed: int) -> dict[str, Any]:
    """Return the settings that the runs of all demos share.

    Args:
        folder: output folder.
        rows: file with the training rows.
        steps: optimizer steps.
        rollouts: rows per step.
        longest: tokens of the longest completion.
        seed: of training.
    """
    return {
        "dataset_name": str(rows),
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": rollouts,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 2,
        "max_completion_length": longest,
        "seed": seed,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
    }


def write_run_file(folder: Path, settings: Mapping[str, Any], comments: Mapping[str, str]) -> Path:
    """Write settings into a folder as a run file, with a comment behind each setting that has one; returns its path."""
    path = folder / RUN_FILE
    path.write_text("\n".join(_lines(settings, comments, path)) + "\n", "utf-8")
    return path


def _lines(settings: Mapping[str, Any], comments: Mapping[str, str], path: Path) -> Iterator[str]:
    yield f"# A run of `opsd demo`. Change it and run: opsd train {path} --output_dir runs/mine"
    for key, value in settings.items():
        first, *rest = yaml.safe_dump({key: value}, sort_keys=False).rstrip().splitlines()
        yield f"{first:<48}  # {comments[key]}" if key in comments else first
        yield from rest


def free_folder(wanted: str) -> str:
    """Return `wanted`, or the first of wanted-2, wanted-3, … that does not exist, so that no run overwrites another."""
    names = [wanted, *(f"{wanted}-{i}" for i in range(2, 1000))]
    for name in names:
        if not Path(name).exists():
            return name
    raise OPSDError(f"{wanted} to {names[-1]} all exist. Remove some.")


@dataclass
class Clock:
    """Seconds by part; each call of `stop` ends a part and begins the next.

    >>> clock = Clock()
    >>> clock.stop("model")
    >>> list(clock.seconds)
    ['model']
    """

    seconds: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    def stop(self, part: str) -> None:
        """End a part."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.began
        self.began = now


def train_printing(
    run_file: Path, overrides: Sequence[str], clock: Clock, say: Say, examined: bool = False
) -> dict[str, Any]:
    """Do what `opsd train` does with a run file, printing a line per step; returns the doctor's findings."""
    from transformers import TrainerCallback

    from opsd.commands.build import build_trainer
    from opsd.commands.report import write_after_training
    from opsd.commands.run_file import read_run
    from opsd.training.display import Display

    class Steps(TrainerCallback):
        """Stands behind the evaluation in the order of callbacks: what it times is training alone."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.stop("before")

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if logs and "divergence" in logs:
                step, name = f"step {state.global_step:>2} of {state.max_steps}", "loss" if args.control else "KL"
                length = logs.get("completions/mean_length")
                tokens = "" if length is None else f", {length:.1f} tokens per answer"
                say(f"{step}  {name} {logs['divergence']:.3f} nats{tokens}")

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.stop("train")

    run = read_run(run_file, overrides)
    run.args.disable_tqdm = True
    trainer = build_trainer(run)
    trainer.remove_callback(Display)  # a demo says less
    trainer.add_callback(Steps())
    clock.stop("model")
    if examined:
        trainer.files.examination = _examine(trainer, say)
        clock.stop("doctor")
    trainer.train()
    if trainer.stopped_by is not None:
        raise KeyboardInterrupt
    trainer.save_model()
    write_after_training(trainer.args.output_dir, say)
    clock.stop("after")
    return trainer.files.examination.as_dict() if trainer.files.examination else {}


def _examine(trainer: Any, say: Say) -> Any:
    """Let the doctor examine the run, and print its verdict and its warnings."""
    from opsd.doctor import examine

    examination = examine(trainer)
    notable = [f for f in examination.findings if f.check == "lift" or f.status in ("warn", "fail")]
    say("\n".join([f"doctor      {examination.verdict}", *(f"            {f.saw}" for f in notable)]))
    return examination
