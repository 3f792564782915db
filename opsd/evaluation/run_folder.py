"""What a run left in its output folder, read back: the run card, its settings, and how two cards differ.

Also the one way to write a JSON file: whole or not at all. Knows files; nothing of models or training.
"""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from opsd.errors import CheckpointError

CARD, CARD_PAGE = "run_card.json", "run_card.md"
# Ignored by `opsd diff`: paths and names that always differ,
_IGNORED = ("settings.output_dir", "settings.logging_dir", "settings.run_name", "settings.resume_from_checkpoint")
# and what was measured, by the doctor and by the run: it differs from run to run.
_IGNORED_PREFIXES = ("doctor.seconds", "doctor.verdict", "doctor.findings", "outcome.")


# ---- writing ----------------------------------------------------------------------------------------------------


def write_json(path: Path, values: Any, default: Callable[[Any], Any] | None = None) -> None:
    """Write a JSON file, whole or not at all; see `write_whole`.

    Args:
        path: the file; missing folders are made.
        values: plain values.
        default: makes a plain value of anything else, as in `json.dumps`; None refuses it.

    Raises:
        TypeError: a value is not plain, and `default` is None.

    Example:
        >>> write_json(Path("runs/first/results.json"), {"accuracy": 0.5})
    """
    write_whole(path, json.dumps(values, indent=1, ensure_ascii=False, default=default) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a text file under a temporary name and rename it: a reader never finds a part of it.

    Args:
        path: the file; missing folders are made.
        text: its content.

    Raises:
        OSError: it cannot be written; names it, and leaves no part of it.
    """
    temporary = path.with_name(f".{path.name}")
    try:
        check_output(path)
        temporary.write_text(text, "utf-8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def check_output(path: Path) -> None:
    """Make the folder of a file that is to be written, and refuse what is no regular file: it would be replaced.

    Raises:
        OSError: it is a folder or a device, or its folder cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        raise OSError(errno.EISDIR if path.is_dir() else errno.ENODEV, "it is no regular file", str(path))


# ---- reading ----------------------------------------------------------------------------------------------------


def read_card(run: str) -> dict[str, Any]:
    """Return the card of a run.

    Args:
        run: its output folder, a checkpoint in it, or the card itself.

    Raises:
        CheckpointError: there is no card, or it is not JSON.
    """
    path = _find_card(Path(run))
    if path is None:
        raise CheckpointError(
            f"{run!r} holds no {CARD}. Every run writes one into its output folder when it begins; name that folder."
        )
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}. The file is damaged; restore it from a backup.") from error


def settings_of(model: str) -> dict[str, Any]:
    """Return the settings of the run that a model folder or a checkpoint belongs to; empty for other models."""
    path = _find_card(Path(model)) if Path(model).is_dir() else None
    return {} if path is None else read_card(str(path))["settings"]


def _find_card(path: Path) -> Path | None:
    """Return the card that is at a path, in it, or beside it."""
    candidates = (path, path / CARD, path.parent / CARD)
    return next((each for each in candidates if each.is_file() and each.suffix == ".json"), None)


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return what differs between two cards: the dotted name, and the value in each (None where it is missing)."""
    first, second = dict(leaves(a)), dict(leaves(b))
    return [
        (name, first.get(name), second.get(name))
        for name in dict.fromkeys([*first, *second])
        if first.get(name) != second.get(name) and name not in _IGNORED and not name.startswith(_IGNORED_PREFIXES)
    ]


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every plain value in nested mappings, by dotted name; a list is one value unless it holds mappings."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for number, inner in enumerate(value):
            yield from leaves(inner, f"{name}.{number}")
    else:
        yield name, value


# ---- the card as a page -----------------------------------------------------------------------------------------


def as_markdown(card: Mapping[str, Any]) -> str:
    """Return a card as a page to read."""
    lines = [
        *(f"# {card['model']}", "", f"opsd {card['opsd']}, {card['rows']} rows", ""),
        f"- **teacher**: {card['teacher']['description']}",
        f"- **context**: {', '.join(card['contexts']) or 'none'}",
        f"- **rollouts**: {card['groups']}",
        f"- **loss**: {card['divergence']['description']}",
        f"- **evaluation**: {card['evaluation']}",
        *("", _fenced(card["divergence"]["formula"]), "", "## Doctor", ""),
    ]
    doctor = card["doctor"]
    if isinstance(doctor, str):
        lines.append(doctor)
    else:
        lines += [doctor["verdict"], ""]
        lines += [f"- {f['status']}: {f['check']}: {f['saw']}" for f in doctor["findings"]]
    if card.get("changes"):
        entries = [(entry["step"], entry["name"], entry["before"], entry["after"]) for entry in card["changes"]]
        cells = [f"| {step} | {name} | `{_cell(before)}` | `{_cell(after)}` |" for step, name, before, after in entries]
        lines += ["", "## Changed on resume", "", "| step | what | before | after |", "|---|---|---|---|", *cells]
    if "outcome" in card:
        lines += ["", "## Outcome", "", *(f"- {line}" for line in card["outcome"]["lines"])]
    lines += ["", "## Prompts", ""]
    for prompt in card["prompts"]:
        lines += [f"Row {prompt['row']}, student:", "", _fenced(prompt["student"]), ""]
        for view in prompt["teacher"]:
            lines += [f"Row {prompt['row']}, teacher with {view['context']}:", "", _fenced(view["prompt"]), ""]
    for title in ("hashes", "versions", "hardware", "seeds", "settings"):
        rows = [f"| {name} | `{_cell(value)}` |" for name, value in leaves(card[title])]
        lines += [f"## {title.capitalize()}", "", "| | |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ").replace("`", "'")
