"""Where a training step's time goes, and how far it is from the time of its own products.

Measures  the training part of a step (teacher, forward, loss, backward, optimizer) on replayed rollouts of the work of
          step.py. A profile lists its operations; every matrix product and attention in it is then timed alone, with
          the same shapes, strides and number formats: their sum is what this machine needs for the step's products.
          Beside it: the rate of a large product and of a copy, measured on the spot.
          Utilisation: operations of the products per second, over those of the large product.
Does not  count the time of sampling (step.py does), and cannot undo that products timed alone find their weights in
          the cache more often than in a step: the floor is a little too low, the ratio a little too high. On a GPU
          attention is not timed alone.
Run:      python benchmarks/where_time_goes.py [--only short long group] [--formats bf16 float32] [--repeats 5]
          [--device cuda]
Writes:   benchmarks/results/profile.json, on a GPU profile_gpu.json, and prints its table; PROFILE.md discusses it
Takes:    two minutes a regime and format on two cores
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.step import REGIMES, RESULTS, Regime, clock_of, last_json, opsd, settings_of  # noqa: E402

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
BACKWARD = f"{ATTENTION}_backward"
FORMATS = {"float": "float32", "c10::BFloat16": "bfloat16", "bool": "bool"}
# Terms of the table, by the beginning of an operation's name; the first that fits.
TERMS = {
    "products": PRODUCTS,
    "attention": ("aten::_scaled_dot_product", "aten::_flash_attention", "aten::_efficient_attention"),
    "optimizer": ("Optimizer", "aten::_fused_adamw", "aten::_foreach"),
    "casts and copies": ("aten::copy_", "aten::_to_copy", "aten::clone", "aten::contiguous", "aten::cat"),
    "loss without its products": ("triton", "Torch-Compiled", "aten::logsumexp", "aten::_log_softmax", "aten::exp"),
}


# ---- one process ----------------------------------------------------------------------------------------------------


def measure(regime: Regime, number_format: str, device: str, repeats: int) -> dict[str, Any]:
    """Return the seconds of a regime's training part, of its operations, and of its products alone."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    warnings.simplefilter("ignore")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    clock = clock_of(device)
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = opsd(regime, settings_of(regime, number_format, device, folder))
        step = replayed_step(trainer, clock)
        step()  # compiles, and fills caches
        timed = [step() for _ in range(repeats)]
        flops = flops_of(step)
        with profile(activities=activities, record_shapes=True) as recorded:
            step()
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = [each for each in json.loads(trace.read_text())["traceEvents"] if each.get("cat") == "cpu_op"]
        # On a GPU kernels are listed too, whose time the operation that started them has already.
        averages = [each for each in recorded.key_averages() if each.device_type.name == "CPU"]
        own = {each.key: own_seconds(each, device) for each in averages}
    products = Counter(call for call in map(call_of, events) if call is not None)
    alone = {call: time_alone(call, device, clock) for call in products}
    terms = by_term(own)
    names = list(timed[0])
    return {
        "seconds": {name: statistics.median(each[name] for each in timed) for name in names},
        "training": statistics.median(sum(each.values()) for each in timed),
        "terms": terms,
        "products_alone": sum(alone[call] * count for call, count in products.items() if call[0] in PRODUCTS),
        "attention_alone": sum(alone[call] * count for call, count in products.items() if call[0] not in PRODUCTS),
        "calls": sum(products.values()), "flops": flops,
        "machine": machine(number_format, device, clock), "threads": torch.get_num_threads(),
    }  # fmt: skip


def flops_of(run: Callable[[], Any]) -> int:
    """Run once; return the floating-point operations of matrix products, without those of attention."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in counts.items() if str(operation).replace(".", "::") in PRODUCTS)


def own_seconds(average: Any, device: str) -> float:
    """Return the seconds that an operation itself took: of the CPU, or of the GPU's kernels that it started."""
    return (average.self_device_time_total if device == "cuda" else average.self_cpu_time_total) / 1e6


def replayed_step(trainer: Any, clock: Callable[[], float]) -> Callable[[], dict[str, float]]:
    """Train one step, and return a function that trains on its rollouts again; it returns the seconds of its parts."""
    import torch

    kept: list[Any] = []
    made = trainer._generate_and_score_completions

    def keeping(inputs: Any) -> Any:
        kept.append(made(inputs))
        return kept[-1]

    trainer._generate_and_score_completions = keeping
    trainer.args.max_steps = 1
    trainer.train()
    model, args = trainer.model, trainer.args
    parts = args.gradient_accumulation_steps
    rollouts = kept[0].with_num_loss_tokens(kept[0].num_scorable)

    def step() -> dict[str, float]:
        model.train()
        seconds = Counter[str]()

        def lap(name: str, since: float) -> float:
            now = clock()
            seconds[name] += now - since
            return now

        start = clock()
        for part in trainer.scorer.in_order(rollouts, parts).split(parts):
            inputs = trainer._scored(part)
            start = lap("teacher", start)
            with trainer.autocast_smart_context_manager():
                loss = trainer.compute_loss(model, inputs)
            start = lap("forward and loss", start)
            trainer.accelerator.backward(loss)
            start = lap("backward", start)
        trainer.accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        lap("clipping and optimizer", start)
        return dict(seconds)

    assert not torch.is_grad_enabled() or rollouts.num_scorable
    return step


Call = tuple[str, tuple[Any, ...]]  # an operation's name, and (shape, strides, number format) of its tensors


def call_of(event: Mapping[str, Any]) -> Call | None:
    """Return which product an event is, or None for another operation."""
    name, facts = event["name"], event.get("args", {})
    if name not in (*PRODUCTS, ATTENTION, BACKWARD):
        return None
    tensors = zip(facts["Input Dims"], facts["Input Strides"], facts["Input type"], strict=True)
    known = [(tuple(shape), tuple(strides), FORMATS[kind]) for shape, strides, kind in tensors if kind in FORMATS]
    return name, tuple(known)


def time_alone(call: Call, device: str, clock: Callable[[], float], least: float = 0.05) -> float:
    """Return the median seconds of a product alone."""
    import torch

    name, tensors = call

    def made(shape: Sequence[int], strides: Sequence[int], kind: str) -> torch.Tensor:
        dtype = getattr(torch, kind)
        size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if shape else 1
        flat = torch.ones(size, dtype=dtype) if kind == "bool" else torch.randn(size).to(dtype)
        flat = flat.to(device)
        return flat.as_strided(shape, strides)

    given = [made(*each) for each in tensors]
    plain = getattr(torch.ops.aten, name.removeprefix("aten::"))
    if name in (ATTENTION, BACKWARD):
        count = 3 if name == ATTENTION else 6  # query, key, value; or the gradient, these, what came out, its sums
        mask = given[count] if len(given) > count else None
        run = partial(plain, *given[:count], 0.0, mask is None, attn_mask=mask)
    else:
        factors = given[:2] if name in ("aten::mm", "aten::bmm") else given[:3]  # without a tensor for the result
        run = partial(plain.default, *factors)
    run()
    taken: list[float] = []
    while len(taken) < 3 or (sum(taken) < least and len(taken) < 50):
        start = clock()
        run()
        taken.append(clock() - start)
    return statistics.median(taken)


def by_term(own: Mapping[str, float]) -> dict[str, float]:
    """Return a profile's own seconds of operations, added up by term."""
    terms = dict.fromkeys([*TERMS, "other operations"], 0.0)
    for name, seconds in own.items():
        fits = (term for term, names in TERMS.items() if name.startswith(names))
        terms[next(fits, "other operations")] += seconds
    return terms


def machine(number_format: str, device: str, clock: Callable[[], float]) -> dict[str, float]:
    """Return the rate of a large product, in GFLOP/s, and of a copy, in GB/s read and written."""
    import torch

    side, dtype = (2048 if device == "cpu" else 8192), torch.bfloat16 if number_format == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.randn(2**27, device=device)
    target = torch.empty_like(source)

    def best(run: Callable[[], Any]) -> float:
        taken = []
        for _ in range(7):
            start = clock()
            run()
            taken.append(clock() - start)
        return min(taken)

    return {
        "gflops": 2 * side**3 / best(lambda: a @ b) / 1e9,
        "gigabytes_per_second": 2 * source.nbytes / best(lambda: target.copy_(source)) / 1e9,
    }


# ---- all ------------------------------------------------------------------------------------------------------------


def table(results: Mapping[str, Any]) -> str:
    """Return the results as Markdown: the parts of a step, its terms, and its products alone."""
    names = list(results)
    lines = ["| seconds | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]

    def row(title: str, values: Sequence[str]) -> None:
        lines.append(f"| {title} | {' | '.join(values)} |")

    row("**training part**", [f"**{found['training']:.2f}**" for found in results.values()])
    for part in next(iter(results.values()))["seconds"]:
        row(part, [f"{found['seconds'][part]:.2f}" for found in results.values()])
    for term in [*TERMS, "other operations"]:
        row(f"of it, {term}", [f"{found['terms'][term]:.2f}" for found in results.values()])
    row("its products alone", [f"{found['products_alone']:.2f}" for found in results.values()])
    row("its attention alone", [f"{found['attention_alone']:.2f}" for found in results.values()])
    floors = [found["products_alone"] + found["attention_alone"] for found in results.values()]
    row(
        "**training part ÷ products and attention**",
        [f"**{found['training'] / floor:.2f}**" for found, floor in zip(results.values(), floors, strict=True)],
    )
    row("utilisation, %", [f"{utilisation(found):.0%}".rstrip("%") for found in results.values()])
    row("a large product, GFLOP/s", [f"{found['machine']['gflops']:.0f}" for found in results.values()])
    row("a copy, GB/s", [f"{found['machine']['gigabytes_per_second']:.1f}" for found in results.values()])
    return "\n".join(lines)


def utilisation(found: Mapping[str, Any]) -> float:
    """Return the products' operations over those of a large product in the time of the training part."""
    return float(found["flops"] / found["training"] / found["machine"]["gflops"] / 1e9)


def main() -> None:
    """Run what is asked for, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=REGIMES, default=["short", "long", "group"])
    parser.add_argument("--formats", nargs="+", choices=["bf16", "float32"], default=["bf16", "float32"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        found = measure(REGIMES[options.only[0]], options.formats[0], options.device, options.repeats)
        print(json.dumps(found))
        return
    from opsd.training.machine import hardware

    path = RESULTS / ("profile.json" if options.device == "cpu" else "profile_gpu.json")
    record = json.loads(path.read_text()) if path.exists() else {"results": {}}
    for regime in options.only:
        for number_format in options.formats:
            work = ["--only", regime, "--formats", number_format, "--device", options.device]
            found = last_json([__file__, "--child", *work, "--repeats", str(options.repeats)])
            record["results"][f"{regime}, {number_format}"] = found
            record["hardware"] = hardware()
            path.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record["results"]))


if __name__ == "__main__":
    main()
