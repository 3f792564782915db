"""Writes the run card: what a run is, in `run_card.json` and `run_card.md` of its output folder.

It holds what another person needs to repeat the run: resolved settings, rendered prompts, hashes of data and templates,
the divergence as a formula, versions, hardware, seeds, the doctor's findings. `opsd.evaluation.run_folder` reads it.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset

from opsd import __version__, sources
from opsd.evaluation.run_folder import CARD, CARD_PAGE, as_markdown, read_card, write_json, write_whole
from opsd.findings import Examination
from opsd.models.digests import add_text, digest_of, tokenizer_digest
from opsd.models.forward import language_model
from opsd.teachers import Recipe, StudentHandle, Teacher, read_recipe
from opsd.training.groups import Groups, placeholders
from opsd.training.loss import Scorer
from opsd.training.machine import hardware
from opsd.training.parts import RunParts
from opsd.training.resume import Change

SHOWN_ROWS = 3
NOT_EXAMINED = "not examined"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "jinja2", "numpy", "tokenizers")
_SECRET = re.compile(r"(?:.*_)?(?:token|auth_token|api_key|key|password|secret)", re.IGNORECASE)
_USER = re.compile(r"(?<=:)//[^/@\s]+@")


def write_run_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Write a card into a run's folder, for machines and to read."""
    write_json(folder / CARD, card, default=str)
    write_whole(folder / CARD_PAGE, as_markdown(card))


def run_card(
    parts: RunParts, digests: tuple[str, str] | None = None, examination: Examination | None = None
) -> dict[str, Any]:
    """Return what a run is, in plain values; secrets among the settings are left out.

    Args:
        parts: what it is made of.
        digests: `data_digests` of the rows, if they are known.
        examination: what the doctor found, if it was asked.
    """
    args, student, scorer, rows = parts.args, parts.student, parts.scorer, parts.rows
    contexts = {context.name: context.digest for context in scorer.contexts}
    data, questions = digests or data_digests(rows)
    return {
        "opsd": __version__,
        "model": parts.given or type(language_model(student.model)).__name__,
        # Of a loaded model no more is known: training may have changed its weights since.
        "first_loaded_from": str(getattr(student.model.config, "_name_or_path", "")),
        "teacher": {"description": scorer.teacher.describe(), **scorer.teacher.description},
        "method": _method(parts.recipe, scorer.teacher),
        "contexts": list(contexts),
        "groups": parts.groups.describe(),
        "evaluation": parts.plan.describe() if parts.plan else "none was declared",
        "divergence": {"description": scorer.describe(), "formula": scorer.objective.formula},
        "settings": without_secrets(args.to_dict()),
        "hashes": {
            "tokenizer": tokenizer_digest(student.tokenizer),
            "chat_template": chat_template_digest(student),
            "templates": contexts,
            "data": data,
            "questions": questions,
        },
        "rows": len(rows) if isinstance(rows, Dataset) else "a stream",
        "rows_dropped": parts.dropped,
        "prompts": list(_prompts(student, scorer, parts.groups, rows)),
        "versions": versions(),
        "hardware": hardware(),
        "seeds": {"seed": args.seed, "data_seed": args.data_seed},
        "doctor": examination.as_dict() if examination else NOT_EXAMINED,
        "changes": [],
    }


def resumed_card(card: Mapping[str, Any], folder: Path, step: int, changes: Iterable[Change]) -> dict[str, Any]:
    """Return the card of a resumed run: its settings as they are now, and what was changed at which step.

    Args:
        card: of the resuming run.
        folder: the run's output folder, whose card has earlier changes and the doctor's findings.
        step: of the checkpoint.
        changes: what differs from the run that wrote it.
    """
    earlier = read_card(str(folder)) if (folder / CARD).is_file() else {}
    kept = [entry for entry in earlier.get("changes", []) if entry["step"] < step]  # later ones are undone
    doctor = card["doctor"] if card["doctor"] != NOT_EXAMINED else earlier.get("doctor", NOT_EXAMINED)
    return {**card, "doctor": doctor, "changes": kept + [{"step": step, **asdict(change)} for change in changes]}


def versions() -> dict[str, str]:
    """Return the versions of Python and the packages that numbers depend on."""
    packages = {name: metadata.version(name) for name in PACKAGES}
    return {"opsd": __version__, "python": platform.python_version(), **packages}


def _method(recipe: Recipe | None, teacher: Teacher) -> dict[str, Any]:
    """Return the recipe's source, or without a recipe that of the shipped recipe of the teacher's strategy."""
    named = recipe is not None
    if recipe is None and (path := sources.find("teachers", teacher.strategy)):
        recipe = read_recipe(path)
    return (
        {"recipe": named, "source": recipe.source, "differences": recipe.differences if named else ""} if recipe else {}
    )


def chat_template_digest(student: StudentHandle) -> str:
    """Return a hash of the chat template that renders the student's prompts."""
    return digest_of([student.renderer.chat_template or student.tokenizer.chat_template or ""])


def data_digests(dataset: Any) -> tuple[str, str]:
    """Return a hash of all rows and one of their prompts, in order and in one pass; of a stream only that it is one."""
    if not isinstance(dataset, Dataset):
        return "a stream", "a stream"
    whole, prompts = hashlib.sha256(), hashlib.sha256()
    for row in dataset.with_format(None):
        add_text(whole, json.dumps(row, sort_keys=True, default=str))
        add_text(prompts, json.dumps({"prompt": row["prompt"]}, sort_keys=True, default=str))
    return whole.hexdigest()[:16], prompts.hexdigest()[:16]


def without_secrets(value: Any, shown: Callable[[Any], str] = lambda secret: "(left out)") -> Any:
    """Leave out tokens, keys and passwords, at every depth, and names and passwords in addresses.

    Args:
        value: plain values.
        shown: what stands in place of a value whose name is that of a secret (`bos_token` looks like one too).
    """
    if isinstance(value, Mapping):
        return {k: shown(v) if v and _SECRET.fullmatch(str(k)) else without_secrets(v, shown) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item, shown) for item in value]
    return _USER.sub("//", value) if isinstance(value, str) else value


def secret_digest(secret: Any) -> str:
    """Return what tells one secret from another without showing either."""
    return f"(hash {digest_of([json.dumps(secret, sort_keys=True, default=str)])})"


def _prompts(student: StudentHandle, scorer: Scorer, groups: Groups, rows: Any) -> Iterator[dict[str, Any]]:
    """Yield the prompts of the first rows as student and teacher read them."""
    decode = student.tokenizer.decode
    for number, row in enumerate(islice(rows, SHOWN_ROWS)):
        fields, prompts = placeholders(groups.rollout_fields, row), []
        for leaf in scorer.teacher.prompts.leaves_of(row):  # in order, so that two runs with other contexts compare
            text = leaf.renderer.tokenizer.decode(leaf.ids(row, fields))
            prompts.append({"context": leaf.describe(), "prompt": text})
        yield {"row": number, "student": decode(student.renderer.ids(row["prompt"])), "teacher": prompts}
    scorer.forget_counts()
