"""What a run is made of, in plain values: a checkpoint stores it, and a resumed run is compared with it.

Reads settings, model, rows, teacher and plan; `resume.py` decides what a difference means.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from enum import Enum
from itertools import chain
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import nn

from opsd.models.digests import digest_of, tokenizer_digest
from opsd.teachers.weight_copy import adapter_adds_nothing, adapter_parameters, digest
from opsd.training import checkpoints, resume
from opsd.training.machine import hardware
from opsd.training.parts import RunParts
from opsd.training.run_card import (
    chat_template_digest,
    data_digests,
    secret_digest,
    versions,
    without_secrets,
)
from opsd.training.together import failing_together

# Of a model's configuration: where it was loaded from and by what.
_NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version")
_NOT_OF_THE_ADAPTER = ("base_model_name_or_path", "inference_mode")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def model_facts(student: nn.Module, vocab_size: int) -> dict[str, Any]:
    """Return the facts of a student, before anything shards or trains it."""
    trainable = sorted(name for name, p in student.named_parameters() if p.requires_grad)
    adapters: Mapping[str, Any] = getattr(student, "peft_config", {})
    return {
        "student": _fingerprint(student, vocab_size),
        "trainable": f"{len(trainable)} parameters, {digest_of(trainable)}",
        "adapter": {name: _plain(_without(config.to_dict(), _NOT_OF_THE_ADAPTER)) for name, config in adapters.items()},
        "model": _plain(_without(student.config.to_dict(), _NOT_OF_THE_MODEL)),  # type: ignore[operator, union-attr]
        "dtypes": sorted({str(p.dtype) for p in student.parameters()}),
    }


def run_facts(parts: RunParts, data: str) -> dict[str, Any]:
    """Return everything else that a run is made of; passes once over its evaluation rows.

    Args:
        parts: what it is made of.
        data: hash of the training rows.
    """
    args, scorer, student, plan = parts.args, parts.scorer, parts.student, parts.plan
    settings = settings_facts(args)
    optimizer, scheduler = parts.optimizers
    if optimizer is not None:  # it has these settings of its own
        settings = _without(settings, ("learning_rate", *resume.OPTIMIZER_SETTINGS))
    kind = parts.accelerator.distributed_type.value
    return {
        "settings": settings,
        "optimizer": None if optimizer is None else {"class": type(optimizer).__name__, **_plain(optimizer.defaults)},
        "scheduler": None if scheduler is None else type(scheduler).__name__,
        "sharding": kind if kind == "FSDP" else "none",
        "processes": parts.accelerator.num_processes,
        "contrast": scorer.contrast and scorer.contrast.prompts.description,
        "rewards": dict(zip(parts.groups.rewards.names, map(_code, parts.groups.rewards.functions), strict=True)),
        "tools": {tool.__name__: _code(tool) for tool in student.renderer.tools or []},
        "left_out_ids": sorted(scorer.selection.left_out_ids),
        "end_ids": sorted(scorer.selection.end_ids),
        "tokenizer": tokenizer_digest(student.tokenizer),
        "chat_template": chat_template_digest(student),
        "data": data,
        "rows": len(parts.rows) if isinstance(parts.rows, Dataset) else None,
        "eval_data": None if plan is not None and parts.eval_rows is plan.selection else _plain(parts.eval_rows),
        "evaluation": plan
        and {field.name: _plain(getattr(plan, field.name)) for field in fields(plan) if field.name != "baselines"},
        "versions": versions(),
        "hardware": hardware(),
    }


def changes_on_resume(
    folder: Path | None, facts: Mapping[str, Any] | None, allowed: Collection[str] | None
) -> list[resume.Change]:
    """Return what differs between a checkpoint and this run, the same in every process; warn of what nobody checks.

    Args:
        folder: the checkpoint, or None for a new run.
        facts: of this run; None in processes that write nothing.
        allowed: names that may differ: `allow_changes`.

    Raises:
        CheckpointError: in every process, if something else differs in any.
    """
    differing = list[resume.Change]()
    with failing_together():
        if folder is not None and facts is not None:
            differing = resume.changes(folder, checkpoints.read_facts(folder), facts, allowed or ())
    differing = gather_object([differing])[0]
    if facts is not None:
        resume.warn(folder, facts, differing, allowed)
    return differing


def settings_facts(args: Any) -> dict[str, Any]:
    """Return the settings that can change a number, of secrets a hash; of a file of settings, its content."""
    settings = _without(args.to_dict(), chain(*resume.NOT_COMPARED.values()))
    if settings.get("model_init_kwargs"):
        settings["model_init_kwargs"] = _without(settings["model_init_kwargs"], ("device_map",))  # of this machine
    for name, value in settings.items():
        if isinstance(value, str) and value.endswith(".json") and Path(value).is_file():
            settings[name] = json.loads(Path(value).read_text("utf-8"))
    return without_secrets(_plain(settings), secret_digest)


def _fingerprint(student: nn.Module, vocab_size: int) -> str:
    """Return a hash of the weights that a resumed run must begin with: all but an adapter that adds nothing yet."""
    is_fresh = hasattr(student, "disable_adapter") and adapter_adds_nothing(student, vocab_size)
    left_out = adapter_parameters(student) if is_fresh else ()
    return digest({name: p for name, p in student.named_parameters() if p not in left_out})


def _code(function: Any) -> str:
    """Return a hash of a user's function; the code of opsd's own is what its version is."""
    kind = function if hasattr(function, "__code__") else type(function)
    if str(kind.__module__).startswith("opsd."):
        return "of opsd"
    try:
        return digest_of([inspect.getsource(kind)])
    except (OSError, TypeError):
        return "without source"


def _without(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    left_out = set(names)
    return {name: value for name, value in values.items() if name not in left_out}


def _plain(value: Any) -> Any:
    """Return what JSON can hold and another process compares alike: of rows their hash, of functions their names."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, Dataset | IterableDataset):
        return data_digests(value)[0]
    if isinstance(value, set | frozenset):
        return sorted(map(_plain, value), key=str)
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__qualname__", None) or _ADDRESS.sub("", str(value))
