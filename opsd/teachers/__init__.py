"""Teacher strategies: whose weights score a rollout.

Adding one is a file here, a line in `TEACHERS`, and a line in `tests/test_teachers.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from opsd import sources
from opsd.contexts.base import Context
from opsd.errors import ConfigError, did_you_mean
from opsd.teachers.base import Cost, StudentHandle, Teacher
from opsd.teachers.composite import CompositeTeacher
from opsd.teachers.ema import EMATeacher
from opsd.teachers.gate import Gate
from opsd.teachers.local import LocalTeacher
from opsd.teachers.mixture import MixtureTeacher
from opsd.teachers.past import PastCheckpointTeacher
from opsd.teachers.recipes import Recipe, find_recipe, read_recipe
from opsd.teachers.routed import RoutedTeacher
from opsd.teachers.self_teacher import LiveTeacher, SameCheckpointTeacher
from opsd.teachers.sibling import SiblingTeacher
from opsd.teachers.snapshot import SnapshotTeacher

TEACHERS: dict[str, type[Teacher]] = {
    cls.strategy: cls
    for cls in (
        SameCheckpointTeacher,
        LiveTeacher,
        EMATeacher,
        SnapshotTeacher,
        PastCheckpointTeacher,
        SiblingTeacher,
        MixtureTeacher,
        RoutedTeacher,
    )
}

__all__ = [
    "TEACHERS",
    "Cost",
    "EMATeacher",
    "Gate",
    "LiveTeacher",
    "LocalTeacher",
    "MixtureTeacher",
    "PastCheckpointTeacher",
    "Recipe",
    "RoutedTeacher",
    "SameCheckpointTeacher",
    "SiblingTeacher",
    "SnapshotTeacher",
    "StudentHandle",
    "Teacher",
    "load_teacher",
    "recipe_of",
]

TeacherLike = Teacher | str | PathLike[str] | Mapping[str, Any] | None


def load_teacher(value: TeacherLike = None, *, context: Context | str | Mapping[str, Any] | None = None) -> Teacher:
    """Return the teacher that `value` names; loads no weights and asks no network.

    Args:
        value: a Teacher; a recipe's name or a path to one (`.yaml`); a folder with a model or a hub id (= sibling); a
            mapping (`{"strategy": "ema", "decay": 0.99}`, or `{"recipe": "ema", "decay": 0.999}` to change a
            recipe's numbers), with a `context` of its own where it is part of a mixture or a route; or None for the
            same checkpoint, frozen.
        context: what it is shown; wins over its own or a recipe's context.

    Raises:
        ConfigError: nothing has that name, or the strategy has no such setting.
    """
    if isinstance(value, Teacher):
        if context is not None:
            raise ConfigError(
                "a Teacher object brings its own context, and another one was given beside it. Only one can be shown. "
                f"Write {type(value).__name__}(context=…) and leave the other out."
            )
        return value
    settings, recipe_context = _resolve(value)
    settings = dict(settings)
    own_context = settings.pop("context", recipe_context)
    return _build(settings, context if context is not None else own_context)


def recipe_of(value: TeacherLike) -> Recipe | None:
    """Return the recipe that `value` names, or None if it names something else."""
    if isinstance(value, Mapping):
        value = value.get("recipe")
    if not isinstance(value, str | PathLike):
        return None
    path = find_recipe(value)
    return None if path is None else read_recipe(path)


def _resolve(value: TeacherLike) -> tuple[Mapping[str, Any], Any]:
    """Return the strategy's settings and the recipe's context."""
    if value is None:
        return {"strategy": SameCheckpointTeacher.strategy}, None
    recipe = recipe_of(value)
    if isinstance(value, Mapping):
        changes = {key: v for key, v in value.items() if key != "recipe"}
        if "recipe" in value and recipe is None:
            raise ConfigError(_nothing_named(str(value["recipe"])))
        return ({**recipe.teacher, **changes}, recipe.context) if recipe else (changes, None)
    if recipe is not None:
        return recipe.teacher, recipe.context
    if not isinstance(value, str | PathLike):
        raise ConfigError(
            f"a teacher is a Teacher, a name, a path, a model id, a mapping or None, and this is a "
            f"{type(value).__name__}. Take one from `opsd teachers`."
        )
    source = fspath(value)
    if Path(source).is_dir() or sources.is_hub_id(source):
        return {"strategy": SiblingTeacher.strategy, "model": source}, None
    raise ConfigError(_nothing_named(source))


def _nothing_named(name: str) -> str:
    known = sources.names("teachers")
    return (
        f"no teacher is called {name!r}.{did_you_mean(name, known)} A teacher is a recipe's name, a path to a recipe "
        "(.yaml), a folder with a model, or a hub id (organisation/name); a name without '/' is never looked up on a "
        f"hub. Recipes: {', '.join(known)} (`opsd teachers`)."
    )


def _build(settings: dict[str, Any], context: Any) -> Teacher:
    strategy = settings.pop("strategy", None)
    if strategy is None:
        raise ConfigError(
            f"a teacher given as a mapping needs `strategy` or `recipe`, and has: {', '.join(settings) or 'nothing'}. "
            f"Strategies: {', '.join(TEACHERS)}; recipes: {', '.join(sources.names('teachers'))}."
        )
    if strategy not in TEACHERS:
        raise ConfigError(
            f"no teacher strategy is called {strategy!r}.{did_you_mean(str(strategy), TEACHERS)} "
            f"Strategies: {', '.join(TEACHERS)}."
        )
    cls = TEACHERS[strategy]
    parameters = {k: p for k, p in inspect.signature(cls).parameters.items() if k != "context"}
    for key in settings:
        if key not in parameters:
            raise ConfigError(
                f"teacher strategy {strategy!r} has no setting {key!r}.{did_you_mean(key, parameters)} "
                f"Its settings: {', '.join(parameters) or 'none'}."
            )
    missing = [k for k, p in parameters.items() if p.default is p.empty and settings.get(k) is None]
    if missing:
        yours = ", ".join(f"{name}: …" for name in missing)
        raise ConfigError(
            f"teacher strategy {strategy!r} needs {', '.join(missing)}, which only you can choose. "
            f"Write `teacher: {{strategy: {strategy}, {yours}}}`, or {{recipe: …, {yours}}} on top of a recipe."
        )
    if issubclass(cls, CompositeTeacher):
        settings["teachers"] = _parts(strategy, settings["teachers"])
    return cls(context=context, **settings)


def _parts(strategy: str, teachers: Any) -> Any:
    """Load the teachers of a mixture or a route here, where an error can say which of them it is about."""
    if isinstance(teachers, Mapping) and not {"strategy", "recipe"} & set(teachers):
        return {name: _part(strategy, name, teacher) for name, teacher in teachers.items()}
    if isinstance(teachers, Sequence) and not isinstance(teachers, str):
        return [_part(strategy, number, teacher) for number, teacher in enumerate(teachers)]
    return teachers  # a single one


def _part(strategy: str, name: Any, value: TeacherLike) -> Teacher:
    try:
        if value is None:
            raise ConfigError("it is null, and only you can choose it. The student at step 0 is `same_checkpoint`.")
        return load_teacher(value)
    except ConfigError as error:
        raise ConfigError(f"part {str(name)!r} of this {strategy} teacher: {error}") from error
