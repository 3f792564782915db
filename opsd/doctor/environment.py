"""Check 10: the environment: tested versions, attention, determinism, disk space for checkpoints."""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

from opsd.doctor.cost import planned_steps
from opsd.doctor.patient import Patient
from opsd.findings import Finding, listed
from opsd.models.forward import language_model
from opsd.teachers.weight_copy import megabytes

DISTRIBUTION = "opsd-toolkit"  # `opsd` on the package index is another project
find = functools.partial(Finding, "environment")


def check_environment(patient: Patient) -> Iterator[Finding]:
    """Check versions, settings that change numbers, the teacher's cautions, and the disk."""
    yield _versions()
    yield _numerics(patient)
    for caution in patient.teacher.cautions:
        yield find("warn", caution, "`opsd teachers` lists what each strategy is for.")
    yield from _disk(patient)


def requirements() -> list[Requirement]:
    """Return the packages that opsd requires, with the versions that were tested; none where it is not installed."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []
    required = [Requirement(line) for line in lines]
    return [each for each in required if each.marker is None or each.marker.evaluate({"extra": ""})]


def _versions() -> Finding:
    wrong: list[str] = []
    right: list[str] = []
    required = requirements()
    if not required:
        return find("skip", f"{DISTRIBUTION} is not installed but run from a folder: tested versions are unknown.")
    for each in required:
        version = metadata.version(each.name)
        fits = each.specifier.contains(version, prereleases=True)
        (right if fits else wrong).append(f"{each.name} {version}" + ("" if fits else f" (tested: {each.specifier})"))
    if wrong:
        return find(
            "warn",
            f"versions outside the tested range: {listed(wrong, 20)}.",
            "Install with -c constraints.txt; or run the tests, which name what changed.",
        )
    return find("pass", f"versions are in the tested range: {listed(right, 20)}.")


def _numerics(patient: Patient) -> Finding:
    attention = getattr(language_model(patient.student.model).config, "_attn_implementation", "unknown")
    exact = torch.are_deterministic_algorithms_enabled() or patient.args.full_determinism
    device = next(patient.student.model.parameters()).device
    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads"
    )
    same = "deterministic kernels" if exact or device.type == "cpu" else "kernels that may differ from run to run"
    return find("pass", f"{where}; attention {attention}, {_precision(patient)}, {same}.")


def _precision(patient: Patient) -> str:
    """Name the dtypes of the weights, and the one of autocast."""
    model = patient.student.model
    trained, frozen = ({p.dtype for p in model.parameters() if p.requires_grad is trains} for trains in (True, False))
    weights = f"weights in {_names(frozen or trained)}"
    if frozen and trained != frozen:
        weights += f", those that train in {_names(trained)}"
    autocast = "bfloat16" if patient.args.bf16 else "float16" if patient.args.fp16 else ""
    return f"{weights}, {autocast} autocast" if autocast else f"{weights}, no autocast"


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _disk(patient: Patient) -> Iterator[Finding]:
    args = patient.args
    if str(getattr(args.save_strategy, "value", args.save_strategy)) == "no":
        return
    model = patient.student.model
    trained = [p for p in model.parameters() if p.requires_grad]
    adapter = hasattr(model, "peft_config")
    each = megabytes(trained if adapter else list(model.parameters())) + megabytes(
        list(patient.teacher.state_dict().values())
    )
    each += 0 if args.save_only_model else sum(8 * p.numel() for p in trained) / 2**20
    steps = planned_steps(patient)
    every = args.save_steps if args.save_steps >= 1 else max(1, int(args.save_steps * steps))
    by_epoch = str(getattr(args.save_strategy, "value", args.save_strategy)) == "epoch"
    written = max(1, math.ceil(args.num_train_epochs) if by_epoch else math.ceil(steps / every))
    count = min(written, args.save_total_limit or written)
    folder = Path(args.output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 2**20
    saw = f"{count} checkpoint(s) of {each:,.0f} MB, and {free:,.0f} MB free"
    figures = {"checkpoints": count, "megabytes_each": each, "megabytes_free": free}
    if count * each > free:
        do = "Keep fewer (save_total_limit), save less often (save_steps), or write elsewhere (output_dir)."
        yield find("fail", f"disk space is too small: {saw}.", do, figures=figures)
    else:
        yield find("pass", f"disk space is enough: {saw}.", figures=figures)
