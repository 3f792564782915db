"""What grows with the work: seconds with the tokens of a step, memory of the loss with none of them, and processes.

Measures  1. the training part of a step (teacher, forward, loss, backward, optimizer) on replayed rollouts of 4 to 64
             sums, in float32 and, where the CPU has instructions for it, in bfloat16;
          2. the peak memory of one forward and backward of the loss over its inputs, for 256 to 4,096 tokens, against
             TRL's kernel and full logits;
          3. a step of 16 sums in one process and in two, each with one thread and its own half of the rows.
Does not  measure sampling in 1. SmolLM2-135M-Instruct, reverse KL over the whole vocabulary; the head is trained in 2.
Run:      python benchmarks/growth.py [--only time memory processes]
Writes:   benchmarks/results/growth.json and growth.svg
Takes:    ten minutes on two cores
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

RESULT = ROOT / "benchmarks" / "results" / "growth.json"
ROWS = (4, 8, 16, 32, 64)
TOKENS = (256, 512, 1024, 2048, 4096)
WIDTH, VOCABULARY = 576, 49152
STEPS, WARM_UP = 7, 2


def seconds_of(rows: int, number_format: str) -> dict[str, float]:
    """Return the seconds of a training part, and the operations of its products."""
    from benchmarks.step import REGIMES, clock_of, opsd, settings_of
    from benchmarks.where_time_goes import flops_of, replayed_step

    regime = replace(REGIMES["short"], rows=rows)
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = opsd(regime, settings_of(regime, number_format, "cpu", folder))
        step = replayed_step(trainer, clock_of("cpu"))
        step()
        seconds = statistics.median(sum(step().values()) for _ in range(5))
        return {"rows": rows, "seconds": seconds, "gflop": flops_of(step) / 1e9}


def time() -> dict[str, Any]:
    """Return the seconds of steps of five sizes by number format, and the power of the tokens that they follow."""
    from benchmarks.step import last_json
    from opsd.training.machine import cpu_has_bf16

    found: dict[str, Any] = {}
    for number_format in ("bf16", "float32") if cpu_has_bf16() else ("float32",):
        sizes = [last_json([__file__, "--child", str(rows), number_format]) for rows in ROWS]
        logs = np.log([[size["gflop"], size["seconds"]] for size in sizes[1:]]).T
        found[number_format] = {"sizes": sizes, "power": float(np.polyfit(*logs, 1)[0])}
    return found


def memory() -> dict[str, Any]:
    """Return the peaks of the loss, in MiB over its inputs, for five numbers of tokens."""
    from losses import peak_in_child
    from losses_contenders import Case

    cases = [Case("cpu", "float32", tokens, WIDTH, VOCABULARY, "trained") for tokens in TOKENS]
    return {name: [peak_in_child(case, name) for case in cases] for name in ("ours", "TRL", "full logits")}


def processes() -> dict[str, Any]:
    """Return the seconds of a step by the number of processes, in turn, three times."""
    found: dict[str, list[float]] = {"1": [], "2": []}
    for _ in range(3):
        for count in (1, 2):
            found[str(count)].append(step_of(count))
    medians = [statistics.median(found[count]) for count in ("1", "2")]
    return {"seconds": found, "speedup": medians[0] / medians[1]}


def step_of(count: int) -> float:
    """Return the median seconds of a step over the last steps of a run in so many processes."""
    from benchmarks.learning import tasks
    from opsd.commands.demo_tasks import packaged_model, write_rows

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", tasks.training_sums(16 * STEPS, 0))
        settings = {
            "model_name_or_path": packaged_model(), "dataset_name": str(folder / "rows.jsonl"),
            "output_dir": str(folder / "run"), "context": "answer_only", "max_steps": STEPS,
            "max_completion_length": 20, "per_device_train_batch_size": 16 // count, "logging_steps": 1,
            "save_strategy": "no", "report_to": "none", "gradient_checkpointing": False,
        }  # fmt: skip
        (folder / "run.yaml").write_text(json.dumps(settings))
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        command = [*start, "-m", "opsd", "train", str(folder / "run.yaml"), "--skip-doctor"]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        lines = (folder / "run" / "log.jsonl").read_text().splitlines()
    steps = [entry["step_time"] for entry in map(json.loads, lines) if "step_time" in entry]
    return statistics.median(steps[WARM_UP:STEPS])


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Plot what was measured of seconds and memory, both against straight lines."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "opsd", "font.size": 9})
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), facecolor="white")
    for (name, of_format), colour in zip(found.get("time", {}).items(), ("#0072B2", "#D55E00"), strict=False):
        x, y = ([size[key] for size in of_format["sizes"]] for key in ("gflop", "seconds"))
        left.loglog(x, y, "o-", color=colour, label=f"{name}: power {of_format['power']:.2f}")
    left.set(xlabel="operations of its products, GFLOP", ylabel="seconds", title="Training part of 4 to 64 rows")
    for (name, peaks), colour in zip(found.get("memory", {}).items(), ("#0072B2", "#999999", "#D55E00"), strict=False):
        right.loglog(TOKENS, peaks, "o-", color=colour, label=name)
    right.set(xlabel="tokens", ylabel="MiB over the inputs", title="Peak memory of the loss")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.minorticks_off()
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
            scale.set_major_formatter("{x:,g}")
        if axis.lines:
            axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def report(found: Mapping[str, Any]) -> list[str]:
    """Return what was found, a line each."""
    lines = []
    for name, of_format in found.get("time", {}).items():
        seconds: Sequence[float] = [size["seconds"] for size in of_format["sizes"]]
        lines.append(f"training part, {name}: {seconds} s for {ROWS} rows, power {of_format['power']:.2f}")
    for name, peaks in found.get("memory", {}).items():
        lines.append(f"loss, {name}: {[round(peak) for peak in peaks]} MiB for {TOKENS} tokens")
    if "processes" in found:
        lines.append(f"two processes: {found['processes']['speedup']:.2f} times one")
    return lines


def main() -> None:
    """Measure what is asked for, print and write."""
    parts = {"time": time, "memory": memory, "processes": processes}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--child", nargs=2, metavar=("ROWS", "FORMAT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(seconds_of(int(options.child[0]), options.child[1])))
        return
    from opsd.training.machine import hardware

    found = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for name in options.only:
        found[name] = parts[name]()
        found["hardware"] = hardware()
        RESULT.write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(report(found)))
    plot(found, RESULT.with_suffix(".svg"))


if __name__ == "__main__":
    main()
