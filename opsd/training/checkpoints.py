"""The teacher's files in a checkpoint, the number format of a run, and which checkpoint a run resumes from.

The teacher's tensors are written as safetensors, the rest as JSON; each file under a temporary name and then renamed,
both before the trainer's files. Knows files and plain dictionaries only.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from opsd.errors import CheckpointError
from opsd.evaluation.run_folder import CARD, write_json, write_whole

TENSORS, FACTS = "opsd_teacher.safetensors", "opsd_teacher.json"
SAMPLES = "opsd_samples_{}.json"  # of each process, with steps_per_generation
NUMBER_FORMAT = "precision.json"
TRAINER_STATE = "trainer_state.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors", "pytorch_model.bin",
           "pytorch_model_fsdp.bin", "pytorch_model_fsdp_0")  # fmt: skip
OPTIMIZER = ("optimizer.pt", "optimizer.bin", "optimizer_0")  # the last is FSDP's folder of shards
RESUME = "trainer.train(resume_from_checkpoint=True), or `opsd train CONFIG --resume_from_checkpoint true`"
UNFINISHED = "checkpoint-is-incomplete.txt"  # transformers' mark of an interrupted save


def write(
    folder: Path,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    *,
    step: int = 0,
    pending: Mapping[str, Any] | None = None,
) -> None:
    """Write a teacher's state into a checkpoint folder, each file whole or not at all.

    Args:
        folder: the checkpoint.
        tensors: the teacher's state, in CPU memory.
        facts: what the run is made of; a resumed run is compared with it. Of `processes` each writes its random state.
        step: optimizer steps done.
        pending: metrics since the last log entry, which the next entry averages.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A folder that is written again, after a resume from an earlier step, is incomplete until the trainer has written.
    (folder / TRAINER_STATE).unlink(missing_ok=True)
    temporary = folder / f".{TENSORS}"
    save_file({name: t.contiguous() for name, t in tensors.items()}, temporary)
    temporary.replace(folder / TENSORS)
    write_json(folder / FACTS, {"step": step, "pending": pending or {}, **facts})


def write_samples(folder: Path, process: int, samples: Mapping[str, Any]) -> None:
    """Write a process's samples for later steps into a checkpoint folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / SAMPLES.format(process), json.dumps(samples))


def read_samples(folder: Path, process: int) -> dict[str, Any] | None:
    """Return a process's samples for later steps, or None where each step has its own."""
    path = folder / SAMPLES.format(process)
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def read_facts(folder: Path) -> dict[str, Any]:
    """Return what the run of a checkpoint was made of.

    Raises:
        CheckpointError: not a checkpoint of opsd, or its files are of two steps.
    """
    return {name: value for name, value in _read(folder).items() if name not in ("step", "pending")}


def _read(folder: Path) -> dict[str, Any]:
    if not (folder / FACTS).is_file():
        raise CheckpointError(
            f"{folder} is not a checkpoint of opsd: it has no {FACTS}. Without the teacher's state the run would "
            "continue with another teacher. Start a new run from its weights instead: model_name_or_path."
        )
    stored = json.loads((folder / FACTS).read_text("utf-8"))
    step = stored.get("step")
    if folder.name != f"checkpoint-{step}" and re.fullmatch(r"checkpoint-\d+", folder.name):
        raise CheckpointError(
            f"the teacher's state in {folder} is of step {step}. Student and teacher would belong to different steps. "
            "Restore the folder's files, or resume from another checkpoint."
        )
    return stored


def read_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a teacher's tensors from a checkpoint, and the metrics that were not logged yet.

    Raises:
        CheckpointError: as `read_facts`.
    """
    return load_file(folder / TENSORS), _read(folder)["pending"]


def problem(folder: Path) -> str | None:
    """Return why a checkpoint cannot be resumed from, or None."""
    if (folder / UNFINISHED).exists():
        return "its writing was interrupted"
    for names in ((TRAINER_STATE,), (FACTS,), (TENSORS,), WEIGHTS, OPTIMIZER, ("scheduler.pt",)):
        if not any((folder / name).exists() for name in names):
            return f"it has no {' or '.join(names)}"
    for path in sorted(folder.iterdir()):
        if not _is_whole(path):
            return f"its {path.name} is cut short"
    facts = json.loads((folder / FACTS).read_text("utf-8"))
    processes = facts.get("processes", 1)
    of_processes = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    settings = facts.get("settings", {})
    if (settings.get("steps_per_generation") or 0) > settings.get("gradient_accumulation_steps", 1):
        of_processes += [SAMPLES.format(rank) for rank in range(processes)]
    for name in of_processes:
        if not (folder / name).is_file():
            return f"it has no {name}"
    return None


def _is_whole(path: Path) -> bool:
    """Tell whether a file is complete, as far as its format tells; other formats pass."""
    if path.name.startswith("."):  # a temporary file of a save that never ended
        return True
    try:
        if path.suffix == ".json":
            json.loads(path.read_text("utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):  # compares what the header lists with the file's length
                pass
        elif path.suffix in (".pt", ".pth", ".bin"):
            return is_zipfile(path)
    except (ValueError, SafetensorError, OSError):
        return False
    return True


def saved(output_dir: str | os.PathLike[str]) -> list[Path]:
    """Return the checkpoint folders of a run, newest step first."""
    folders = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(folders, key=lambda p: -int(p.name.split("-")[1]))


def step_of(folder: Path) -> int:
    """Return the optimizer step that a checkpoint was written at."""
    return int(_read(folder)["step"])


def is_finished(folder: Path, max_steps: int) -> bool:
    """Tell whether a checkpoint is of the last step of its run.

    Args:
        folder: the checkpoint.
        max_steps: of the resuming run; not above 0 where epochs say how long it trains.
    """
    state = json.loads((folder / TRAINER_STATE).read_text("utf-8"))
    return state["global_step"] >= (max_steps if max_steps > 0 else state["max_steps"])


def resolve(output_dir: str | os.PathLike[str], resume: str | bool | None) -> tuple[Path | None, list[str]]:
    """Return the checkpoint to resume from (None starts anew), and what was passed over and why.

    Args:
        output_dir: the run's folder.
        resume: False or None for a new run, True for the newest checkpoint that can be used, or a checkpoint's path.

    Raises:
        CheckpointError: a new run in a folder that holds one; nothing to resume from; a checkpoint that is damaged.
    """
    checkpoints = saved(output_dir)
    if not resume:
        if checkpoints:
            raise CheckpointError(
                f"{output_dir} already holds a run ({checkpoints[0].name}). A new run would mix with it. Resume it: "
                f"{RESUME}; or choose another output_dir."
            )
        if any((Path(output_dir) / name).is_file() for name in WEIGHTS):
            raise CheckpointError(
                f"{output_dir} already holds a model. A new run would write over it. Choose another output_dir."
            )
        return None, []
    if not isinstance(resume, bool):
        if not Path(resume).is_dir():
            raise CheckpointError(f"there is no checkpoint {resume}. Checkpoints here: {_names(checkpoints)}.")
        reason = problem(Path(resume)) if (Path(resume) / FACTS).is_file() else None
        if reason is not None:
            raise CheckpointError(
                f"{resume} cannot be resumed from: {reason}. Name another (here: {_names(checkpoints)}), or resume "
                "from the newest complete one: resume_from_checkpoint=True."
            )
        return Path(resume), []
    passed_over: list[str] = []
    for folder in checkpoints:
        reason = problem(folder)
        if reason is None:
            return folder, passed_over
        passed_over.append(f"{folder.name} was passed over: {reason}")
    raise CheckpointError(
        f"{output_dir} has no checkpoint to resume from. " + "; ".join(passed_over) + " Start a new run without "
        "resume_from_checkpoint (in an empty folder), or name a checkpoint by its path."
    )


def model_folder(model: str) -> str:
    """Return the folder to load a model from: for a run that has not ended, its newest complete checkpoint.

    Raises:
        CheckpointError: a run's folder with neither a model nor a complete checkpoint.
    """
    folder = Path(model)
    if any((folder / name).is_file() for name in WEIGHTS) or not (folder / CARD).is_file():
        return model
    whole = next((checkpoint for checkpoint in saved(folder) if problem(checkpoint) is None), None)
    if whole is None:
        raise CheckpointError(
            f"{model} is a run without a model: it was stopped before its end, and has no complete checkpoint (here: "
            f"{_names(saved(folder))}). Resume it: {RESUME}; or name a model."
        )
    return str(whole)


def _names(checkpoints: list[Path]) -> str:
    return ", ".join(p.name for p in checkpoints) or "none"


def store_number_format(output_dir: str | os.PathLike[str], bf16: bool) -> None:
    """Write beside a run whether it computes in bfloat16."""
    write_json(Path(output_dir) / NUMBER_FORMAT, {"bf16": bf16})


def ready_folder(args: Any) -> None:
    """Make the output folder of a run, and let a resumed run keep its number format.

    Raises:
        CheckpointError: the folder cannot be written to.
    """
    check_writable(args.output_dir)
    restore_number_format(args)


def restore_number_format(args: Any) -> None:
    """Let a resumed run compute with the numbers it began with, also on a machine where another format is faster.

    OPSDConfig chooses `bf16` by the machine where the user set none, and reads no folder. The trainer calls this first
    of all, before a model loads or an Accelerator is made: from then on the format cannot change.

    Args:
        args: an OPSDConfig; changed where the run in its `output_dir` stored another choice than the one made here.
    """
    stored = Path(args.output_dir) / NUMBER_FORMAT
    # Without a checkpoint there is nothing to resume: the folder may have come from another machine.
    if not args.bf16_is_default or args.fp16 or not stored.is_file() or not saved(args.output_dir):
        return
    bf16 = bool(json.loads(stored.read_text("utf-8"))["bf16"])
    if bf16 == args.bf16:
        return
    args.bf16 = bf16
    args.mixed_precision = "bf16" if bf16 else os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def check_writable(output_dir: str | os.PathLike[str]) -> None:
    """Make the output folder.

    Raises:
        CheckpointError: the folder cannot be made or written to.
    """
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".opsd-write-probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CheckpointError(
            f"output_dir {folder} cannot be written to ({error.strerror}). Checkpoints would be lost after training. "
            "Choose a folder that you can write to."
        ) from error
