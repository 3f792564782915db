"""The doctor on the demo's model: what it takes, what it predicts, and what it says of a teacher told wrong answers.

Run:     python benchmarks/doctor.py [--seeds 0 1 2] [--steps 4]
Writes:  benchmarks/results/doctor.json, with the hardware it ran on
Takes:   about six minutes on two cores
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from datasets import Dataset

from opsd import OPSDConfig, OPSDTrainer, SameCheckpointTeacher
from opsd.commands.demo_sums import MAX_NEW_TOKENS, SumsSettings
from opsd.commands.demo_tasks import arithmetic, packaged_model
from opsd.doctor import ROWS, examine
from opsd.training.machine import hardware

RESULTS = Path(__file__).parent / "results" / "doctor.json"
CONTEXTS = {
    "answer": "answer_only",
    "other rows' answers (control)": {"template": "answer_only", "fields": {"answer": "other_answer"}},
}


def make_trainer(context: Any, seed: int, steps: int, folder: str) -> OPSDTrainer:
    """The demo's run, with another number of steps."""
    demo = SumsSettings()
    args = OPSDConfig(
        folder,
        max_steps=steps,
        per_device_train_batch_size=demo.rollouts,
        learning_rate=demo.learning_rate,
        max_completion_length=MAX_NEW_TOKENS,
        seed=seed,
        save_strategy="no",
        report_to="none",
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    rows = Dataset.from_list(arithmetic(demo.steps * demo.rollouts, seed + 1))
    return OPSDTrainer(packaged_model(), SameCheckpointTeacher(context=context), args=args, train_dataset=rows)


def measure(context: Any, seed: int, steps: int) -> dict[str, Any]:
    """Examine a run, then train some steps of it; the first step, which warms up, does not count."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(context, seed, steps + 1, folder)
        examination = examine(trainer)
        found = {finding.check: finding for finding in reversed(examination.findings)}
        times: list[float] = []
        training_step = trainer.training_step

        def timed(*args: Any, **kwargs: Any) -> Any:
            times.append(time.perf_counter())
            return training_step(*args, **kwargs)

        trainer.training_step = timed  # type: ignore[method-assign]
        trainer.train()
        times.append(time.perf_counter())
    measured = median(b - a for a, b in itertools.pairwise(times[1:]))
    predicted = found["cost"].figures["seconds_per_step"]
    return {
        "seed": seed,
        "doctor_seconds": examination.seconds,
        "verdict": examination.verdict,
        "lift": found["lift"].saw,
        "predicted_seconds_per_step": predicted,
        "measured_seconds_per_step": measured,
        "predicted_over_measured": predicted / measured,
        "precision": "bfloat16" if trainer.args.bf16 else "float32",
    }


def main() -> None:
    """Run all seeds and contexts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    runs = {
        name: [measure(context, seed, options.steps) for seed in options.seeds] for name, context in CONTEXTS.items()
    }
    record = {"hardware": hardware(), "rows": ROWS, "steps_measured": options.steps, "runs": runs}
    RESULTS.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(json.dumps(record, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
