"""The loss against TRL's kernel, full logits and bare matrix products: seconds, peak memory, agreement.

Measures  forward and backward of one loss from the same last hidden states, in one run. Every round runs each contender
          once, in an order that rotates, so that noise affects all alike; ratios are taken within a round.
          Peak memory is that of one forward and backward over the inputs, with the gradients that are returned: in a
          fresh process each on a CPU, by torch's allocator on a GPU.
Does not  measure a training step: no model runs, and no optimizer. Inputs are random (logits of deviation 2), every
          token weighs the same, and "products alone" is no loss but a bound: the 4 products (3 where the head is
          frozen) that every loss needs, each into fresh memory, with nothing computed between them.
Run:      python benchmarks/losses.py [--only cpu|cuda] [--rounds 12] [--quick] [--output FOLDER]
Writes:   losses.json and losses.svg in benchmarks/results; what was measured on a device not run now is kept
Takes:    most of an hour on two slow cores; some seconds with --quick, whose sizes are too small for speeds

The contenders and their cases: losses_contenders.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from losses_contenders import CONTENDERS, LOSSES, Case, Inputs, contenders, make
from torch import Tensor

from opsd import __version__

RESULTS = Path(__file__).parent / "results"
SIZES = {"cpu": [(512, 576, 49152), (256, 1024, 151936)], "cuda": [(8192, 2048, 151936)]}
QUICK_SIZES = [(12, 16, 199), (8, 24, 501)]
DTYPES = {"cpu": ["float32", "bfloat16"], "cuda": ["bfloat16"]}
# Largest difference from ours, relative to the largest value: float32 sums of 1,000 terms in different orders; bfloat16
# has 8 bits, and contenders round logits, gradients or both to them.
TOLERANCE = {"float32": 2e-4, "bfloat16": 0.1}
MEBIBYTE = 2**20
OUT_OF_MEMORY = "out of memory"
RATIO = "ratio to ours, with 95 % interval"


# ---- measuring ------------------------------------------------------------------------------------------------------


def step(case: Case, x: Inputs, name: str) -> tuple[float, Tensor | None]:
    """Run forward and backward; return seconds and loss. The inputs hold the gradients afterwards."""
    x.hidden_ND.grad = x.weight_VD.grad = None
    wait = torch.cuda.synchronize if case.device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    loss = CONTENDERS[name](x, case.loss)
    if loss is not None:
        loss.backward()
    wait()
    return time.perf_counter() - start, loss


def gradients(x: Inputs) -> dict[str, Tensor]:
    """The gradients after a step, by name."""
    return {k: v.grad for k, v in {"hidden": x.hidden_ND, "head": x.weight_VD}.items() if v.grad is not None}


def agree(case: Case, x: Inputs, names: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the largest differences from ours, and the contenders that fit in memory; refuse wrong ones."""
    differences: dict[str, Any] = {}
    reference: dict[str, Tensor] = {}
    for name in names:
        try:
            _, loss = step(case, x, name)
        except torch.OutOfMemoryError:
            differences[name] = OUT_OF_MEMORY
            continue
        if loss is not None:
            result = {"loss": loss.detach(), **gradients(x)}
            reference = reference or {key: value.clone() for key, value in result.items()}
            pairs = {key: (result[key].float(), value.float()) for key, value in reference.items()}
            differences[name] = {key: float((a - b).abs().max() / b.abs().max()) for key, (a, b) in pairs.items()}
    for name, largest in differences.items():
        close = name == "Liger" or isinstance(largest, str) or max(largest.values()) < TOLERANCE[case.dtype]
        assert close, f"{case}: {name} differs from ours by {largest}"
    fits = [name for name in names if differences.get(name) != OUT_OF_MEMORY]
    return {name: largest for name, largest in differences.items() if name != "ours"}, fits


def peak(case: Case, name: str) -> float:
    """Return the growth of this process's peak memory over one step, in MiB."""
    step(tiny := Case(case.device, case.dtype, 2, 8, 128, case.head, case.loss), make(tiny), name)  # one-time costs
    x = make(case)
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(case, x, name)
        highest = torch.cuda.max_memory_allocated()
    else:
        before = resident("VmRSS")
        if Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        step(case, x, name)
        highest = resident("VmHWM")
    return (highest - before) / MEBIBYTE


def resident(field: str) -> int:
    """Return resident memory in bytes: a field of Linux's status file, elsewhere the peak since the start."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(field))


def peak_in_child(case: Case, name: str) -> float:
    """Return `peak` of a fresh process, whose allocator returns large blocks at once."""
    command = [sys.executable, __file__, "--child", json.dumps({"case": asdict(case), "name": name})]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MEBIBYTE)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def median_interval(values: list[float]) -> list[float]:
    """Return the median with its 95 % bootstrap interval over rounds."""
    draws = np.random.default_rng(0).choice(values, (2000, len(values)))
    return [float(np.median(values)), *np.percentile(np.median(draws, 1), [2.5, 97.5]).tolist()]


def measure(case: Case, rounds: int, children: int) -> dict[str, Any]:
    """Return the record of one case."""
    x = make(case)
    differences, names = agree(case, x, contenders(case))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(step(case, x, name)[0])
    warm = {name: values[1:] for name, values in seconds.items()}
    ratios = {n: [a / b for a, b in zip(v, warm["ours"], strict=True)] for n, v in warm.items() if n != "ours"}
    del x
    where = peak if case.device == "cuda" else peak_in_child
    peaks = {name: [where(case, name) for _ in range(children)] for name in names} if children else {}
    return {
        **asdict(case),
        "seconds": {name: float(np.median(values)) for name, values in warm.items()},
        RATIO: {name: median_interval(values) for name, values in ratios.items()},
        "peak MiB": {name: float(np.median(values)) for name, values in peaks.items()},
        "largest relative difference from ours": differences,
    }


# ---- output ------------------------------------------------------------------------------------------------


def hardware(device: str) -> dict[str, object]:
    """The hardware and packages of the measurement."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    liger = version("liger_kernel") if find_spec("liger_kernel") else "not installed"
    return {
        "cpu": next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
        ),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(0) if device == "cuda" else None,
        "packages": {**{name: version(name) for name in ("torch", "trl")}, "opsd": __version__, "liger_kernel": liger},
        "date": date.today().isoformat(),
    }


def targets(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return each target, the value that was reached, and whether it meets the target."""
    whole = [r for r in records if r["loss"] == "reverse KL" and "full logits" in r["seconds"]]
    if not whole:
        return {}
    geometric = float(np.exp(np.mean([np.log(r[RATIO]["TRL"][0]) for r in whole])))
    bounds = [1 / r[RATIO]["products alone"][0] for r in whole]
    full = [r[RATIO]["full logits"][0] for r in whole]
    # Where the head is trained its gradient, which all contenders return, is most of the peak.
    frozen = [r["peak MiB"] for r in whole if r["peak MiB"] and r["head"] == "frozen"]
    memory = [peaks["ours"] / peaks["full logits"] for peaks in frozen]
    reached = {
        "TRL / ours, geometric mean, at least 3": (geometric, geometric >= 3),
        "ours / products alone, worst case, at most 1.3": (max(bounds), max(bounds) <= 1.3),
        "full logits / ours, worst case, at least 1": (min(full), min(full) >= 1),
    }
    if memory:
        reached["peak memory of ours / full logits, head frozen, worst case, at most 0.2"] = (
            max(memory),
            max(memory) <= 0.2,
        )
    return {name: {"reached": value, "met": bool(met)} for name, (value, met) in reached.items()}


def plot(sections: dict[str, Any], path: Path) -> None:
    """Plot the seconds of the reverse KL, one panel per case with all contenders."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "opsd", "font.size": 9})
    import matplotlib.pyplot as plt

    drawn = [r for s in sections.values() for r in s["cases"] if r["loss"] == "reverse KL" and len(r["seconds"]) > 2]
    rows = -(-len(drawn) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(10, 2.1 * rows), squeeze=False, facecolor="white")
    for axis in axes.flat[len(drawn) :]:
        axis.set_visible(False)
    for axis, record in zip(axes.flat, drawn, strict=False):
        names, seconds = zip(*reversed(record["seconds"].items()), strict=True)
        # Blue, light blue and grey of Okabe and Ito's palette, which colour-blind readers can tell apart.
        colours = [{"ours": "#0072B2", "ours, two-pass": "#56B4E9"}.get(name, "#999999") for name in names]
        bars = axis.barh(names, seconds, color=colours)
        axis.bar_label(bars, [f"{value:.3g} s" for value in seconds], padding=3)
        axis.margins(x=0.15)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0, labelbottom=False)
        shape = f"{record['tokens']:,} tokens × {record['vocab']:,} entries, width {record['width']:,}"
        axis.set_title(f"{shape}\n{record['device']} {record['dtype']}, head {record['head']}", loc="left", fontsize=9)
    figure.suptitle("Reverse KL, seconds forward and backward (shorter is better)", x=0.01, ha="left", weight="bold")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def show(section: dict[str, Any]) -> None:
    """Print a table of the measurements."""
    from rich.console import Console
    from rich.table import Table

    table = Table("contender", "seconds", "× ours", "95 % interval", "peak MiB")
    for record in section["cases"]:
        fields = {name: record[name] for name in Case.__dataclass_fields__}
        table.add_section()
        table.add_row(f"[bold]{Case(**fields)}")
        for name, seconds in record["seconds"].items():
            middle, low, high = record[RATIO].get(name, (1.0, 1.0, 1.0))
            memory = f"{record['peak MiB'][name]:,.0f}" if name in record["peak MiB"] else ""
            table.add_row(f"  {name}", f"{seconds:.4g}", f"{middle:.2f}", f"{low:.2f} to {high:.2f}", memory)
    console = Console(width=120)
    console.print(table)
    for name, target in section["targets"].items():
        console.print(f"{'met' if target['met'] else 'MISSED':>6}  {name}: {target['reached']:.2f}")


# ---- the command ----------------------------------------------------------------------------------------------------


def cases(device: str, quick: bool) -> list[Case]:
    """The reverse KL at every size and dtype, head trained and frozen; on a CPU the other losses at the first size."""
    sizes = QUICK_SIZES if quick else SIZES[device]
    every = [Case(device, t, *size, head) for t in DTYPES[device] for size in sizes for head in ("trained", "frozen")]
    if device == "cpu":
        every += [Case(device, "float32", *sizes[0], "trained", loss) for loss in LOSSES if loss != "reverse KL"]
    return every


def run(device: str, rounds: int, quick: bool) -> dict[str, Any]:
    """Measure the cases of one device; a quick run measures peak memory of one case only."""
    records = []
    for number, case in enumerate(cases(device, quick)):
        print(f"{time.strftime('%H:%M:%S')} {case}", flush=True)
        children = 3 if not quick else int(number == 1)
        records.append(measure(case, rounds, children if case.loss == "reverse KL" else 0))
    about = {"hardware": hardware(device), "rounds": rounds - 1, "quick": quick}
    return {**about, "targets": targets(records), "cases": records}


def main() -> None:
    """Measure on the devices of this machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(SIZES), help="leave the other device out")
    parser.add_argument("--rounds", type=int, help="12, or 2 with --quick; the first warms up and is not counted")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to test that it runs")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(os.cpu_count() or 1)
    if options.child:
        print(peak(Case(**options.child["case"]), options.child["name"]))
        return
    if options.quick and options.output == RESULTS:
        parser.error("--quick measures no useful speeds and would overwrite the results. Name another --output folder.")
    devices = [options.only] if options.only else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rounds = options.rounds or (2 if options.quick else 12)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "losses.json"
    sections = json.loads(path.read_text()) if path.exists() else {}
    for device in devices:
        sections[device] = run(device, rounds, options.quick)
        path.write_text(json.dumps(sections, indent=1) + "\n")
        show(sections[device])
    plot(sections, path.with_suffix(".svg"))


if __name__ == "__main__":
    main()
