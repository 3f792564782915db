"""Writes the run card: what a run is, in `run_card.json` and `run_card.md` of its output folder.

It holds what another person needs to repeat the run: resolved settings, rendered prompts, hashes of data and templates,
the divergence as a formula, versions, hardware, seeds, the doctor's findings. `opsd.evaluation.run_folder` reads it.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from opsd import __version__
from opsd.evaluation.run_folder import CARD, CARD_PAGE, as_markdown, write_json, write_whole
from opsd.training.groups import placeholders

if TYPE_CHECKING:
    from opsd.training.trainer import OPSDTrainer

SHOWN_ROWS = 3
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "jinja2", "numpy", "tokenizers")
_SECRET = re.compile(r"(?:.*_)?(?:token|auth_token|api_key|key|password|secret)", re.IGNORECASE)
_USER = re.compile(r"(?<=:)//[^/@\s]+@")


def write_run_card(trainer: OPSDTrainer) -> None:
    """Write a trainer's card into its output folder."""
    card = run_card(trainer)
    folder = Path(trainer.args.output_dir)
    write_json(folder / CARD, card, default=str)
    write_whole(folder / CARD_PAGE, as_markdown(card))


def run_card(trainer: OPSDTrainer) -> dict[str, Any]:
    """Return what a run is, in plain values."""
    student = trainer.student
    examination = trainer.examination
    contexts = {context.name: context.digest for context in trainer.scorer.contexts}
    return {
        "opsd": __version__,
        "model": str(getattr(student.model.config, "_name_or_path", "")) or type(student.model).__name__,
        "teacher": {"description": trainer.teacher.describe(), **trainer.teacher.description},
        "contexts": list(contexts),
        "groups": trainer.groups.describe(),
        "evaluation": trainer.evaluator.plan.describe() if trainer.evaluator else "none was declared",
        "divergence": {"description": trainer.scorer.describe(), "formula": trainer.args.objective.formula},
        "settings": _settings(trainer),
        "hashes": {
            "tokenizer": tokenizer_digest(student.tokenizer),
            "chat_template": _digest([student.renderer.chat_template or student.tokenizer.chat_template or ""]),
            "templates": contexts,
            "data": data_digest(trainer.train_dataset),
            "questions": data_digest(trainer.train_dataset, "prompt"),
        },
        "rows": len(trainer.train_dataset) if isinstance(trainer.train_dataset, Dataset) else "a stream",
        "prompts": list(_prompts(trainer)),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
        "hardware": hardware(),
        "seeds": {"seed": trainer.args.seed, "data_seed": trainer.args.data_seed},
        "doctor": examination.as_dict() if examination else "the doctor was not asked",
    }


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of a tokenizer's words and special tokens."""
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return _digest([json.dumps(words), json.dumps(tokenizer.special_tokens_map, default=str, sort_keys=True)])


def data_digest(dataset: Any, column: str | None = None) -> str:
    """Return a hash of every row, or of a column of it, in order; of a stream only that it is one."""
    if not isinstance(dataset, Dataset):
        return "a stream"
    plain = dataset.with_format(None) if column is None else dataset.with_format(None).select_columns(column)
    return _digest(json.dumps(row, sort_keys=True, default=str) for row in plain)


def hardware() -> dict[str, Any]:
    """Return what this machine is."""
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "system": sys.platform,
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()


def _settings(trainer: OPSDTrainer) -> dict[str, Any]:
    """Return every training argument; what opens a door is not among them."""
    return _without_secrets(trainer.args.to_dict())


def _without_secrets(value: Any) -> Any:
    """Leave out tokens, keys and passwords, at every depth, and names and passwords in addresses."""
    if isinstance(value, Mapping):
        return {k: "(left out)" if v and _SECRET.fullmatch(str(k)) else _without_secrets(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_secrets(item) for item in value]
    return _USER.sub("//", value) if isinstance(value, str) else value


def _prompts(trainer: OPSDTrainer) -> Iterator[dict[str, Any]]:
    decode = trainer.student.tokenizer.decode
    for number, row in enumerate(islice(trainer.train_dataset, SHOWN_ROWS)):
        made, shown = placeholders(trainer.groups.rollout_fields, row), []
        for view in trainer.teacher.views_of(row):  # in order, so that two runs with other contexts compare
            shown.append({"context": view.shown, "prompt": view.renderer.tokenizer.decode(view.prompt_ids(row, made))})
        yield {"row": number, "student": decode(trainer.student.renderer.ids(row["prompt"])), "teacher": shown}
    trainer.scorer.forget_counts()


def _digest(texts: Iterable[str]) -> str:
    found = hashlib.sha256()
    for text in texts:
        found.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return found.hexdigest()[:16]
