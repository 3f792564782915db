"""Reads recipes: ten-line YAML files with a teacher's strategy and numbers, its context, and training arguments.

Knows the form of a recipe and nothing of what a strategy does with its numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from opsd import sources
from opsd.errors import ConfigError, did_you_mean
from opsd.settings import looked_in, read_yaml


@dataclass(frozen=True)
class Recipe:
    """A recipe: a teacher with its numbers and context, and the training arguments of its source.

    Args:
        about: what it is for, in a sentence.
        source: where its numbers come from.
        teacher: `strategy` and the arguments of that class.
        context: template name, or the arguments of PrivilegedContext, or None.
        args: training arguments (learning rate, lengths, …) that `opsd train` takes as defaults.
        differences: what the published method does and this recipe does not.

    Example:
        >>> read_recipe(find_recipe("sdft")).teacher
        {"strategy": "ema", "decay": 0.99}
    """

    about: str
    source: str
    teacher: Mapping[str, Any]
    context: str | Mapping[str, Any] | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    differences: str = ""


def find_recipe(name: str | PathLike[str]) -> Path | None:
    """Return the file of a shipped recipe's name or of a path to YAML; None if it is neither."""
    text = fspath(name)
    if text.endswith((".yaml", ".yml")):
        path = Path(text).expanduser()
        if not path.is_file():
            near = did_you_mean(path.stem, sources.names("teachers"))
            raise ConfigError(f"there is no recipe file {text!r}.{near}{looked_in(text)}")
        return path
    return None if "/" in text else sources.find("teachers", text)


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        ConfigError: invalid YAML, an unknown or a missing key.
    """
    content = read_yaml(path)
    known = [f.name for f in fields(Recipe)]
    for key in content:
        if key not in known:
            raise ConfigError(
                f"{path}: a recipe has no key {key!r}.{did_you_mean(key, known)} It would be ignored, and a setting "
                f"you meant would not be in force. Known keys: {', '.join(known)}."
            )
    missing = [key for key in ("about", "source", "teacher") if not content.get(key)]
    if missing:
        raise ConfigError(
            f"{path}: a recipe needs the key(s) {', '.join(missing)}: what it is for, where its numbers come from, and "
            "its teacher. Copy a shipped one and edit it: `opsd cp ema .`."
        )
    for key in ("teacher", "args"):
        if not isinstance(content.get(key, {}), dict):
            raise ConfigError(
                f"{path}: {key} must be a mapping, and is {content[key]!r}. Its keys are settings by name, such as "
                "`teacher: {strategy: ema, decay: 0.99}`."
            )
    return Recipe(**content)
