"""Check 9: memory, seconds per step, rows and time to finish, from two measured micro-batches."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator

import torch
from datasets import Dataset

from opsd.doctor.patient import Patient, as_it_trains
from opsd.findings import Finding
from opsd.training.machine import peak_megabytes

PROBED = 4  # rows of a probe's micro-batch at most
STATES = {"adamw": 8, "adafactor": 1, "sgd": 0, "lion": 4}  # bytes per trained weight, float32 states
find = functools.partial(Finding, "cost")


def check_cost(patient: Patient) -> Iterator[Finding]:
    """Measure sampling and two backward passes, and estimate the run from them."""
    args = patient.args
    sampling = patient.sampled[1] / len(patient.rows)
    training, probed = _probe(patient)
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    seconds = rows * (sampling + training / probed)
    steps = planned_steps(patient)
    memory, states = _peak_megabytes(), _optimizer_megabytes(patient)
    figures = {
        "seconds_per_step": seconds,
        "sampling_share": sampling / (sampling + training / probed),
        "megabytes": memory,
        "optimizer_megabytes": states,
        "steps": steps,
    }
    finish = f", {_duration(seconds * steps)} for {steps:,} steps" if steps else ""
    yield find(
        "pass",
        f"about {seconds:.1f} s per step{finish} (from {len(patient.rows)} rollouts and {probed} rows trained on; "
        f"larger batches take less per row); {memory / 1000:.1f} GB so far, {states / 1000:.1f} GB more for the "
        "optimizer.",
        figures=figures,
    )
    yield from _rows_used(patient, steps)


def _probe(patient: Patient) -> tuple[float, int]:
    """Return the seconds of the second of two micro-batches, and its rows; gradients are discarded."""
    trainer, model = patient.trainer, patient.student.model
    count = min(PROBED, patient.args.per_device_train_batch_size, len(patient.rows))
    batch = trainer.scorer.prepare_rollouts(patient.rollouts.select(range(count)))
    device, seconds = next(model.parameters()).device, 0.0
    if device.type == "cuda":  # memory of the checks before is not training's
        torch.cuda.reset_peak_memory_stats(device)
    with as_it_trains(model, patient.args):
        for _ in range(2):
            start = time.perf_counter()
            with trainer.accelerator.autocast():
                scored = trainer.scorer.score(batch)
                trainer.scorer(model, scored, device, 1).loss.backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return seconds, count


def planned_steps(patient: Patient) -> int:
    """Return the optimizer steps of a run, 0 where the length of a stream is unknown."""
    args, dataset = patient.args, patient.trainer.train_dataset
    if args.max_steps > 0:
        return args.max_steps
    if not isinstance(dataset, Dataset):
        return 0
    batches = len(dataset) * args.num_generations // (_rollouts(patient) * args.steps_per_rollouts)
    return math.ceil(args.num_train_epochs * batches * args.steps_per_rollouts)


def _rollouts(patient: Patient) -> int:
    args = patient.args
    processes = patient.trainer.accelerator.num_processes
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * processes


def _rows_used(patient: Patient, steps: int) -> Iterator[Finding]:
    dataset = patient.trainer.train_dataset
    if not isinstance(dataset, Dataset) or not steps:
        return
    drawn = steps * _rollouts(patient) // patient.args.num_generations
    passes = drawn / len(dataset)
    figures = {"rows": len(dataset), "drawn": drawn}
    if passes < 1:
        yield find("pass", f"{drawn:,} of {len(dataset):,} rows will be used.", figures=figures)
    else:
        yield find("pass", f"all {len(dataset):,} rows will be used, {passes:.1f} times each.", figures=figures)


def _optimizer_megabytes(patient: Patient) -> float:
    trained = sum(p.numel() for p in patient.student.model.parameters() if p.requires_grad)
    name = str(getattr(patient.args.optim, "value", patient.args.optim))
    size = next((size for kind, size in STATES.items() if kind in name), 8)
    # plus a gradient each, freed by now
    return trained * (size / (4 if "8bit" in name else 1) + 4) / 2**20


def _peak_megabytes() -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else peak_megabytes()


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
