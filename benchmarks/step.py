"""A training step against TRL's trainers on the same work: seconds for rollouts, seconds for the rest, peak memory.

Measures  whole steps of SmolLM2-135M-Instruct, full fine-tuning, reverse KL over the whole vocabulary, on the same
          rows, prompts, batch, number format and seed. Every round runs each contender once, in a process of its
          own, in turn; the first step of a process is left out. Ratios are those of medians over rounds.
          A round in which other processes took more than a tenth of a core is thrown away and counted.
Does not  compare what is learnt. DistillationTrainer shows its teacher no context, which is less work.
Run:      python benchmarks/step.py [--rounds 5] [--only short long group] [--formats bf16 float32] [--device cuda]
Writes:   benchmarks/results/step.json, on a GPU step_gpu.json, and prints its table
Takes:    about five minutes a round on two cores; forty with the default
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "benchmarks" / "results"
WORDS = ROOT / "benchmarks" / "learning" / "words.txt"
BUSY = 0.1  # of a core, which other processes may take
PLAIN = '{% extends "base.jinja" %}\n{% block user %}\n{{ prompt }}\n\n{{ privileged_context }}\n{% endblock %}\n'


@dataclass(frozen=True)
class Regime:
    """Work of a step.

    Args:
        about: in words.
        rows: prompts of a step.
        copies: rollouts of each.
        micro_batches: into which they are cut.
        new: tokens of a rollout at most.
        row: (its number) -> prompt and context.
        steps: measured in each process.
    """

    about: str
    rows: int
    copies: int
    micro_batches: int
    new: int
    row: Callable[[int], tuple[str, str]]
    steps: int


def _words(draw: random.Random, low: int, high: int) -> str:
    vocabulary = WORDS.read_text().split()
    return " ".join(draw.choices(vocabulary, k=draw.randint(low, high)))


def _sum(number: int) -> tuple[str, str]:
    draw = random.Random(number)
    a, b = draw.randint(1, 99), draw.randint(1, 99)
    return f"State the final answer to the following arithmetic problem: {a} + {b} =", f"The answer is {a + b}."


def _text(number: int) -> tuple[str, str]:
    draw = random.Random(number)
    return f"Write about this: {_words(draw, 20, 160)}", _words(draw, 80, 320)


def _trace(number: int) -> tuple[str, str]:
    draw = random.Random(number)
    return f"Explain this: {_words(draw, 20, 40)}", f"A solution: {_words(draw, 1100, 1100)}"


REGIMES = {
    "short": Regime("16 sums, 20 new tokens, the answer as context", 16, 1, 1, 20, _sum, 3),
    "long": Regime("4 x 4 prompts of up to 200 tokens, 192 new ones, contexts of up to 400", 16, 1, 4, 192, _text, 1),
    "group": Regime("8 rollouts of a prompt, 64 new tokens, a trace of some 1,500 as context", 1, 8, 1, 64, _trace, 1),
    "large": Regime("2 x 64 prompts of up to 200 tokens, 512 new ones: for a GPU", 128, 1, 2, 512, _text, 2),
}


# ---- contenders: each returns a trainer and the name of the method that samples -------------------------------------


def settings_of(regime: Regime, number_format: str, device: str, folder: str) -> dict[str, Any]:
    """Return what all trainers are told."""
    return {
        "output_dir": folder, "max_steps": 1 + regime.steps, "learning_rate": 1e-6,
        "bf16": number_format == "bf16", "use_cpu": device == "cpu",
        "per_device_train_batch_size": regime.rows * regime.copies // regime.micro_batches,
        "gradient_accumulation_steps": regime.micro_batches, "gradient_checkpointing": False, "report_to": "none",
        "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "max_completion_length": regime.new,
        "temperature": 1.0, "seed": 0,
    }  # fmt: skip


def rows_of(regime: Regime) -> list[dict[str, Any]]:
    """Return rows for all steps of a process."""
    pairs = map(regime.row, range(regime.rows * (1 + regime.steps)))
    return [
        {"prompt": [{"role": "user", "content": prompt}], "privileged_context": context} for prompt, context in pairs
    ]


def opsd(regime: Regime, settings: dict[str, Any]) -> tuple[Any, str]:
    """Return our trainer."""
    from datasets import Dataset

    from opsd import OPSDConfig, OPSDTrainer, SameCheckpointTeacher
    from opsd.commands.demo_tasks import packaged_model

    template = Path(settings["output_dir"]) / "plain.jinja"
    template.write_text(PLAIN)
    args = OPSDConfig(**settings, num_generations=regime.copies)
    teacher = SameCheckpointTeacher(context=str(template))
    data = Dataset.from_list(rows_of(regime))
    return OPSDTrainer(packaged_model(), teacher, args=args, train_dataset=data), "_generate_single_turn"


def opsd_one_pass(regime: Regime, settings: dict[str, Any]) -> tuple[Any, str]:
    """Return our trainer without shared beginnings and rows that leave."""
    from opsd.models import generation, passes

    passes.plan_passes = lambda prompts, *a, **k: [passes.Family(0, (tuple(range(len(prompts))),))]  # type: ignore[assignment]
    generation.can_share_prefixes = lambda model: False  # type: ignore[assignment]
    return opsd(regime, settings)


def sdft(regime: Regime, settings: dict[str, Any]) -> tuple[Any, str]:
    """Return TRL's SDFTTrainer."""
    from datasets import Dataset
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    from opsd.commands.demo_tasks import packaged_model

    args = SDFTConfig(
        **settings, num_generations=regime.copies, distillation_mode="full_logits", distillation_alpha=1.0,
        distillation_is_clip=None,
    )  # fmt: skip
    data = Dataset.from_list(rows_of(regime))
    model = packaged_model()
    return SDFTTrainer(model, args, data, processing_class=_tokenizer(model)), "_generate_transformers"


def distillation(regime: Regime, settings: dict[str, Any]) -> tuple[Any, str]:
    """Return TRL's DistillationTrainer, whose teacher gets no context."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    from opsd.commands.demo_tasks import packaged_model

    args = DistillationConfig(**settings, beta=1.0)
    rows = [{"prompt": row["prompt"]} for row in rows_of(regime) for _ in range(regime.copies)]
    model = packaged_model()
    trainer = DistillationTrainer(model, model, args, Dataset.from_list(rows), processing_class=_tokenizer(model))
    return trainer, "_generate_single_turn"


def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


CONTENDERS = {"opsd": opsd, "opsd, one pass": opsd_one_pass, "SDFT": sdft, "Distillation": distillation}


# ---- one process ----------------------------------------------------------------------------------------------------


def measure(contender: str, regime: Regime, number_format: str, device: str) -> dict[str, Any]:
    """Train a few steps; return seconds of each part, and how busy others kept the machine."""
    import torch
    from transformers import TrainerCallback

    warnings.simplefilter("ignore")
    clock = clock_of(device)
    with tempfile.TemporaryDirectory() as folder:
        trainer, sampling = CONTENDERS[contender](regime, settings_of(regime, number_format, device, folder))
        sample, steps = getattr(trainer, sampling), list[dict[str, float]]()
        tokens = 0

        def timed(*args: Any, **kwargs: Any) -> Any:
            nonlocal tokens
            start = clock()
            found = sample(*args, **kwargs)
            steps[-1]["rollouts"] += clock() - start
            tokens += sum(map(len, found[1] if isinstance(found, tuple) else found))
            return found

        class Clock(TrainerCallback):
            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                steps.append({"rollouts": 0.0, "start": clock(), "busy": busy(), "own": time.process_time()})

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                step = steps[-1]
                step["seconds"] = clock() - step.pop("start")
                own = time.process_time() - step.pop("own")
                step["others"] = (busy() - step.pop("busy") - own) / step["seconds"]

        setattr(trainer, sampling, timed)
        trainer.add_callback(Clock())
        trainer.train()
    kept = steps[1:]
    return {
        "rollouts": statistics.median(step["rollouts"] for step in kept),
        "rest": statistics.median(step["seconds"] - step["rollouts"] for step in kept),
        "others": max(step["others"] for step in kept),
        "tokens": tokens / len(steps), "megabytes": peak(device), "threads": torch.get_num_threads(),
    }  # fmt: skip


def clock_of(device: str) -> Callable[[], float]:
    """Return a clock that waits for what a device still computes."""
    import torch

    def seconds() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    return seconds


def peak(device: str) -> float:
    """Return the largest memory of this process, in MB: resident, or allocated on a GPU."""
    import torch

    from opsd.training.machine import peak_megabytes

    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else peak_megabytes()


def busy() -> float:
    """Return the seconds that all cores together have worked since the machine started."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _wait, irq, soft = map(int, fields[:7])
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


# ---- rounds ---------------------------------------------------------------------------------------------------------


def in_process(contender: str, regime: str, number_format: str, device: str) -> Any:
    """Run a contender in a process of its own."""
    work = ["--only", regime, "--formats", number_format, "--device", device]
    return last_json([__file__, "--child", contender, *work])


def last_json(command: Sequence[str]) -> Any:
    """Return what a Python script, run in a process of its own, printed as JSON in its last line."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compared(regime: str, number_format: str, device: str, rounds: int) -> dict[str, Any]:
    """Run all rounds of a regime and format; returns medians and ratios to ours."""
    kept: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    thrown = 0
    while min(map(len, kept.values())) < rounds and thrown < 3 * rounds:
        of_round = {name: in_process(name, regime, number_format, device) for name in CONTENDERS}
        if max(found["others"] for found in of_round.values()) > BUSY:
            thrown += 1
            continue
        for name, found in of_round.items():
            kept[name].append(found)
            print(f"{regime} {number_format} {name:16} {found['rollouts']:.2f} + {found['rest']:.2f} s", flush=True)
    return {"rounds": kept, "thrown_away": thrown, **summary(kept)}


def summary(kept: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Return medians over rounds, and how many times as long, or as much, the others take."""
    if not all(kept.values()):
        return {"medians": {}, "ratios": {}}
    parts = ("rollouts", "rest", "megabytes")
    medians = {
        name: {part: statistics.median(each[part] for each in rounds) for part in parts}
        for name, rounds in kept.items()
    }
    for values in medians.values():
        values["step"] = values["rollouts"] + values["rest"]
    ours = medians["opsd"]
    ratios = {name: {part: values[part] / ours[part] for part in values} for name, values in medians.items()}
    return {"medians": medians, "ratios": ratios}


def table(results: Mapping[str, Any]) -> str:
    """Return the results as a Markdown table."""
    lines = ["| work | " + " | ".join(CONTENDERS) + " | rounds |", "|---" * (len(CONTENDERS) + 2) + "|"]
    for name, found in results.items():
        cells = [
            f"{found['medians'][each]['rollouts']:.2f} + {found['medians'][each]['rest']:.2f} s "
            f"({found['ratios'][each]['step']:.2f})"
            for each in CONTENDERS
            if found["medians"]
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {len(found['rounds']['opsd'])} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is asked for, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=REGIMES, default=["short", "long", "group"])
    parser.add_argument("--formats", nargs="+", choices=["bf16", "float32"], default=["bf16", "float32"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--child", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        found = measure(options.child, REGIMES[options.only[0]], options.formats[0], options.device)
        print(json.dumps(found))
        return
    from opsd.training.machine import hardware

    path = RESULTS / ("step.json" if options.device == "cpu" else "step_gpu.json")
    record = json.loads(path.read_text()) if path.exists() else {"results": {}}
    for regime in options.only:
        for number_format in options.formats:
            found = compared(regime, number_format, options.device, options.rounds)
            about = {"about": REGIMES[regime].about, "hardware": hardware()}
            record["results"][f"{regime}, {number_format}"] = {**about, **found}
            path.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record["results"]))


if __name__ == "__main__":
    main()
