"""With LoRA, the average of the product B·A or of the two factors: how far are they apart, and what does each cost?

One run of the demo's task with LoRA; along the very same steps of the student both averages are kept, and an exact one
(every step stacked, nothing re-factored). At the end they are compared as matrices and as teachers: KL on held-out
rollouts.

    python benchmarks/ema_average.py [--steps 40]   -> benchmarks/results/ema_average.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from demo import hardware
from peft import LoraConfig
from transformers import TrainerCallback

from opsd import EMATeacher, LiveTeacher, OPSDConfig, OPSDTrainer, Rollouts
from opsd.commands.demo_run import CONTEXT, MAX_NEW_TOKENS, arithmetic, packaged_model
from opsd.losses import Divergence, Objective, Tokens
from opsd.models.loading import load_model
from opsd.teachers import Teacher
from opsd.teachers.products import A, B

RESULT = Path(__file__).parent / "results" / "ema_average.json"
DECAYS = (0.9, 0.99)
RANK = 16


class Observers(TrainerCallback):
    """Lets teachers follow the student beside the one that trains it."""

    def __init__(self, teachers: dict[str, EMATeacher]):
        self.teachers = teachers
        self.seconds: dict[str, list[float]] = {name: [] for name in teachers}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Follow the student."""
        for name, teacher in self.teachers.items():
            start = time.perf_counter()
            teacher.after_step(state.global_step)
            self.seconds[name].append(time.perf_counter() - start)


def apart(teacher: EMATeacher, exact: EMATeacher) -> tuple[float, float]:
    """Return |average - exact| / |exact| (Frobenius, of B·A) over all layers together, and of the worst layer."""
    gaps, norms = [], []
    for name in (name for name in exact.weights.values if A in name):
        mine, true = (
            values[name.replace(A, B)].double() @ values[name].double()
            for values in (teacher.weights.values, exact.weights.values)
        )
        gaps.append(float((mine - true).square().sum()))
        norms.append(float(true.square().sum()))
    return (sum(gaps) / sum(norms)) ** 0.5, max(gap / norm for gap, norm in zip(gaps, norms, strict=True)) ** 0.5


def divergence(a: Teacher, b: Teacher, rollouts: Rollouts) -> list[float]:
    """Return KL(a ‖ b) in nats of each token."""
    shown = b.render_prompts(a.render_prompts(rollouts))
    first, second = a.score(shown), b.score(shown)
    with torch.no_grad():
        record = Objective(Divergence(1.0))(first.hidden_ND, first.head, second, Tokens(torch.ones(len(second))))
    return record.divergence_N.tolist()


def interval(values: list[float]) -> list[float]:
    """Return mean and 95 % interval of the mean over tokens (normal approximation)."""
    half = 1.96 * statistics.stdev(values) / len(values) ** 0.5
    return [statistics.fmean(values), statistics.fmean(values) - half, statistics.fmean(values) + half]


def main() -> None:
    """Train, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    options = parser.parse_args()
    model, tokenizer = load_model(packaged_model())
    args = OPSDConfig(
        tempfile.mkdtemp(), max_steps=options.steps, per_device_train_batch_size=8, learning_rate=options.learning_rate,
        lr_scheduler_type="constant_with_warmup", warmup_steps=2, max_completion_length=MAX_NEW_TOKENS, seed=0,
        logging_steps=1, save_strategy="no", report_to="none", gradient_checkpointing=False, use_cpu=True, bf16=False,
    )  # fmt: skip
    rows = arithmetic(options.steps * 8 + 64, seed=0)
    trainer = OPSDTrainer(
        model,
        EMATeacher(0.9, context=CONTEXT),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    watched: dict[str, EMATeacher] = {}
    for decay in DECAYS:
        watched[f"factors {decay}"] = EMATeacher(decay)
        watched[f"product {decay}"] = EMATeacher(decay, average="product")
        watched[f"exact {decay}"] = EMATeacher(decay, average="product", rank=RANK * (options.steps + 1))
    for teacher in watched.values():
        teacher.prepare(trainer.student)
    observers = Observers(watched)
    trainer.add_callback(observers)
    trainer.train()

    held_out = rows[-64:]
    prompts = [trainer.student.renderer.ids(row["prompt"]) for row in held_out]
    live = LiveTeacher()
    live.prepare(trainer.student)
    sampled = live.sample(held_out, max_new_tokens=MAX_NEW_TOKENS, do_sample=True, temperature=1.0, batch_size=64)
    rollouts = Rollouts(held_out, prompts, sampled)
    found = []
    for decay in DECAYS:
        factors, product = watched[f"factors {decay}"], watched[f"product {decay}"]
        found.append(
            {
                "decay": decay,
                "relative gap of factors, all layers and worst": apart(factors, watched[f"exact {decay}"]),
                "relative gap of product, all layers and worst": apart(product, watched[f"exact {decay}"]),
                "KL(factors ‖ product) per token, nats": interval(divergence(factors, product, rollouts)),
                "KL(student ‖ product) per token, nats": interval(divergence(live, product, rollouts)),
                "seconds per update, median": {
                    kind: statistics.median(observers.seconds[f"{kind} {decay}"]) for kind in ("factors", "product")
                },
                "megabytes": {"factors": factors.cost.megabytes, "product": product.cost.megabytes},
                "largest share left out by a re-factorisation": product.weights.lost,
            }
        )
    result = {
        "model": f"SmolLM2-135M-Instruct, LoRA r {RANK} on all linear layers",
        "steps": options.steps,
        "learning_rate": options.learning_rate,
        "tokens": rollouts.num_scorable,
        "hardware": hardware(),
        "decays": found,
    }
    RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
