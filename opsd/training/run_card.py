"""The run card: what a run was, in `run_card.json` and `.md` of its output folder, and what differs between two.

Everything that another person needs to say "this is the same run": resolved settings, the prompts that were rendered,
hashes of what made them, the divergence as a formula, versions, hardware, seeds, the doctor's findings.
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
from opsd.errors import CheckpointError
from opsd.training.groups import placeholders

if TYPE_CHECKING:
    from opsd.training.trainer import OPSDTrainer

JSON, MARKDOWN = "run_card.json", "run_card.md"
SHOWN_ROWS = 3
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "jinja2", "numpy", "tokenizers")
_SECRET = re.compile(r"(?:.*_)?(?:token|auth_token|api_key|key|password|secret)", re.IGNORECASE)
_USER = re.compile(r"(?<=:)//[^/@\s]+@")
# Where two runs always differ, and what says nothing of the training.
_OF_THE_PLACE = ("settings.output_dir", "settings.logging_dir", "settings.run_name", "settings.resume_from_checkpoint")


def write_run_card(trainer: OPSDTrainer) -> None:
    """Write a trainer's card into its output folder."""
    card = run_card(trainer)
    folder = Path(trainer.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JSON).write_text(json.dumps(card, indent=2, ensure_ascii=False, default=str) + "\n", "utf-8")
    (folder / MARKDOWN).write_text(as_markdown(card), "utf-8")


def run_card(trainer: OPSDTrainer) -> dict[str, Any]:
    """Return what a run is, in plain values."""
    student = trainer.student
    examination = trainer.examination
    contexts = {context.name: context.digest for context in trainer.scorer.contexts}
    return {
        "opsd": __version__,
        "model": str(getattr(student.model.config, "_name_or_path", "")) or type(student.model).__name__,
        "teacher": {"words": trainer.teacher.describe(), **trainer.teacher.description},
        "contexts": list(contexts),
        "learns": trainer.groups.describe(),
        "evaluation": trainer.evaluator.plan.describe() if trainer.evaluator else "none was declared",
        "divergence": {"words": trainer.scorer.describe(), "formula": trainer.args.objective.formula},
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
        for leaf in trainer.teacher.prompts.leaves_of(row):  # in order, so that two runs with other contexts compare
            text = leaf.renderer.tokenizer.decode(leaf.ids(row, made))
            shown.append({"shown": leaf.describe(), "prompt": text})
        yield {"row": number, "student": decode(trainer.student.renderer.ids(row["prompt"])), "teacher": shown}
    trainer.scorer.forget_counts()


def _digest(texts: Iterable[str]) -> str:
    found = hashlib.sha256()
    for text in texts:
        found.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return found.hexdigest()[:16]


def as_markdown(card: Mapping[str, Any]) -> str:
    """Return a card as a page to read."""
    lines = [f"# {card['model']}", "", f"opsd {card['opsd']}, {card['rows']} rows", ""]
    lines += [
        f"- **teacher**: {card['teacher']['words']}",
        f"- **is shown**: {', '.join(card['contexts']) or 'no more'}",
    ]
    lines += [f"- **learns**: {card['learns']}", f"- **minimises**: {card['divergence']['words']}"]
    lines += [f"- **is measured by**: {card['evaluation']}", ""]
    lines += ["```text", card["divergence"]["formula"], "```", "", "## The doctor", ""]
    doctor = card["doctor"]
    if isinstance(doctor, str):
        lines.append(doctor)
    else:
        lines += [doctor["verdict"], ""]
        lines += [f"- {f['status']}: {f['check']}: {f['saw']}" for f in doctor["findings"]]
    lines += ["", "## Prompts", ""]
    for prompt in card["prompts"]:
        lines += [f"Row {prompt['row']}, the student:", "", _fenced(prompt["student"]), ""]
        for told in prompt["teacher"]:
            lines += [f"Row {prompt['row']}, the teacher, shown {told['shown']}:", "", _fenced(told["prompt"]), ""]
    for title in ("hashes", "versions", "hardware", "seeds", "settings"):
        rows = [f"| {name} | `{_cell(value)}` |" for name, value in _leaves(card[title])]
        lines += [f"## {title.capitalize()}", "", "| | |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ").replace("`", "'")


def read_card(run: str) -> dict[str, Any]:
    """Return the card of a run.

    Args:
        run: its output folder, a checkpoint in it, or the card itself.

    Raises:
        CheckpointError: there is none.
    """
    found = _card_of(Path(run))
    if found is None:
        raise CheckpointError(
            f"{run!r} holds no {JSON}. Every run writes one into its output folder when it begins; name that folder."
        )
    try:
        return json.loads(found.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{found} is no JSON: {error}. It was damaged; take it from a backup.") from error


def settings_of(model: str) -> dict[str, Any]:
    """Return the settings of the run that a model's folder, or a checkpoint, belongs to; nothing for other models."""
    found = _card_of(Path(model)) if Path(model).is_dir() else None
    return {} if found is None else read_card(str(found))["settings"]


def _card_of(path: Path) -> Path | None:
    """Return the card that is at a path, in it, or beside it."""
    tried = (path, path / JSON, path.parent / JSON)
    return next((each for each in tried if each.is_file() and each.suffix == ".json"), None)


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return what differs between two cards: the name, and the value in each (None where it is not there)."""
    first, second = dict(_leaves(a)), dict(_leaves(b))
    names = [name for name in dict.fromkeys([*first, *second]) if name not in _OF_THE_PLACE]
    skipped = ("doctor.seconds", "doctor.verdict", "doctor.findings")
    return [
        (name, first.get(name), second.get(name))
        for name in names
        if first.get(name) != second.get(name) and not name.startswith(skipped)
    ]


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every plain value in nested mappings, by dotted name; a list is one value unless it holds mappings."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{name}.{number}")
    else:
        yield name, value
