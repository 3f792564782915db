"""What do traces and monitors cost? The processor's seconds that they take, over those of the whole step.

Run:     python benchmarks/health.py
Writes:  benchmarks/results/health.json
Takes:   three minutes on one core

Two runs on the demo's model, one with short answers and one with long ones, 16 rollouts a step of which 8 are traced,
as by default. What is timed: the likeliest tokens of both sides, taking and writing rollouts, the monitors at each log
entry, and the log's file.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402

from benchmarks.learning import tasks  # noqa: E402
from opsd import OPSDConfig, OPSDTrainer, SameCheckpointTeacher  # noqa: E402
from opsd.commands.demo_tasks import packaged_model  # noqa: E402
from opsd.losses.rule import TrainingRule  # noqa: E402
from opsd.training.log_file import LogFile  # noqa: E402
from opsd.training.machine import hardware  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "health.json"
STEPS, SKIPPED = 6, 2  # steps, of which the first warm up


class Clock:
    """Adds up the processor's seconds inside some calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a call whose time is counted."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - begin

        return timed


def measure(length: int) -> dict[str, float]:
    """Return seconds of a step, and of health within it, with rollouts of up to `length` tokens."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = OPSDConfig(
            folder, max_steps=STEPS, per_device_train_batch_size=16, max_completion_length=length, logging_steps=1,
            report_to="none", save_strategy="no", gradient_checkpointing=False, disable_tqdm=True,
        )  # fmt: skip
        trainer = OPSDTrainer(
            packaged_model(), SameCheckpointTeacher(context="answer_only"), args=args,
            train_dataset=Dataset.from_list(tasks.training_sums(16 * STEPS, 0)),
        )  # fmt: skip
        (log_file,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, LogFile))
        for owner, name in ((trainer.tracer, "take"), (trainer.health, "on_log"), (log_file, "on_log")):
            setattr(owner, name, clock.around(getattr(owner, name)))
        alternatives = TrainingRule.alternatives
        TrainingRule.alternatives = clock.around(alternatives)
        at: list[tuple[float, float]] = []
        log = trainer.log

        def log_and_note(*given: Any, **named: Any) -> None:
            log(*given, **named)
            at.append((time.process_time(), clock.seconds))

        trainer.log = log_and_note
        trainer.train()
        TrainingRule.alternatives = alternatives
    steps = at[:STEPS]
    whole, health = (steps[-1][part] - steps[SKIPPED - 1][part] for part in (0, 1))
    count = STEPS - SKIPPED
    return {"longest": length, "step": whole / count, "health": health / count, "share": health / whole}


def main() -> None:
    """Measure, print and write."""
    torch.set_num_threads(1)
    runs = [measure(length) for length in (20, 96)]
    for run in runs:
        print(f"{run['longest']:>4} tokens: {run['health'] * 1e3:.1f} ms of {run['step']:.2f} s: {run['share']:.2%}")
    RESULT.write_text(json.dumps({"hardware": hardware(), "threads": 1, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
