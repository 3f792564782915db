"""Teacher strategies: whose weights score a rollout.

Adding one is a file here, a line in `TEACHERS`, and a line in `tests/test_teachers.py`; a strategy outside of opsd is
named as `module:Class` (docs/your_own_teacher.md).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from opsd import sources
from opsd.errors import ConfigError, did_you_mean
from opsd.teachers.base import Teacher, TeacherView
from opsd.teachers.cached import CachedTeacher
from opsd.teachers.composite import CompositeTeacher, wrong_teacher
from opsd.teachers.cost import Cost
from opsd.teachers.ema import EMATeacher
from opsd.teachers.gate import Gate
from opsd.teachers.local import LocalTeacher
from opsd.teachers.mixture import MixtureTeacher
from opsd.teachers.parameters import constructor_parameters
from opsd.teachers.past import PastCheckpointTeacher
from opsd.teachers.prompting import ContextLike, TeacherPrompts
from opsd.teachers.recipes import Recipe, find_recipe, read_recipe
from opsd.teachers.routed import RoutedTeacher
from opsd.teachers.self_teacher import LiveTeacher, SameCheckpointTeacher
from opsd.teachers.served import ServedTeacher
from opsd.teachers.sibling import SiblingTeacher
from opsd.teachers.snapshot import SnapshotTeacher
from opsd.teachers.student import StudentHandle

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
        ServedTeacher,
        CachedTeacher,
    )
}

__all__ = [
    "TEACHERS",
    "CachedTeacher",
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
    "ServedTeacher",
    "SiblingTeacher",
    "SnapshotTeacher",
    "StudentHandle",
    "Teacher",
    "TeacherPrompts",
    "TeacherView",
    "load_teacher",
    "recipe_of",
]

TeacherLike = Teacher | str | PathLike[str] | Mapping[str, Any] | None


def load_teacher(value: TeacherLike = None, *, context: ContextLike = None) -> Teacher:
    """Return the teacher that `value` names; loads no weights and asks no network.

    Args:
        value: a Teacher; a recipe's name or a path to one (`.yaml`); "module:Class" for a class of your own; a folder
            with a model or a hub id (= sibling); a mapping (`{"strategy": "ema", "decay": 0.99}`, or
            `{"recipe": "ema", "decay": 0.999}` to change a recipe's numbers), with its own `context` where it is part
            of a mixture or a route; or None for the same checkpoint, frozen.
        context: its context; wins over the context of a mapping or a recipe.

    Raises:
        ConfigError: nothing has that name, or the strategy has no such setting.

    Example:
        >>> load_teacher("ema", context="demonstration")
        >>> load_teacher({"strategy": "my_module:MyTeacher", "temperature": 0.5})
    """
    if isinstance(value, Teacher):
        if context is not None:
            raise ConfigError(
                "a Teacher object brings its own context, and another one was given beside it. A teacher takes one "
                f"context. Write {type(value).__name__}(context=…) and leave the other out."
            )
        return value
    settings, recipe_context = _resolve(value)
    settings = dict(settings)
    given_context = settings.pop("context", recipe_context)
    return _build(settings, context if context is not None else given_context)


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
        raise ConfigError(wrong_teacher(value))
    source = fspath(value)
    if Path(source).is_dir() or sources.is_hub_id(source):
        return {"strategy": SiblingTeacher.strategy, "model": source}, None
    if sources.is_object_name(source):
        return {"strategy": source}, None
    raise ConfigError(_nothing_named(source))


def _nothing_named(name: str) -> str:
    known = sources.names("teachers")
    return (
        f"no teacher is called {name!r}.{did_you_mean(name, known)} A teacher is a recipe's name, a path to a recipe "
        "(.yaml), a folder with a model, a hub id (organisation/name), or a class of your own (module:Class); a name "
        f"without '/' is never looked up on a hub. Recipes: {', '.join(known)} (`opsd teachers`)."
    )


def _class_of(strategy: Any) -> type[Teacher]:
    """Return the class of a strategy: one of the table, or "module:Class"."""
    if isinstance(strategy, str) and sources.is_object_name(strategy):
        cls = sources.import_object(strategy, "teacher")
        if not isinstance(cls, type) or not issubclass(cls, Teacher):
            kind = f"the class {cls.__name__}" if isinstance(cls, type) else f"a {type(cls).__name__}"
            raise ConfigError(
                f"teacher {strategy!r} is {kind}, which does not extend opsd.Teacher. A strategy inherits rendering, "
                "checkpoints and defaults from it. Write `class MyTeacher(Teacher)`: docs/your_own_teacher.md."
            )
        return cls
    if strategy not in TEACHERS:
        raise ConfigError(
            f"no teacher strategy is called {strategy!r}.{did_you_mean(str(strategy), TEACHERS)} "
            f"Strategies: {', '.join(TEACHERS)}; or module:Class for one of your own."
        )
    return TEACHERS[strategy]


def _build(settings: dict[str, Any], context: Any) -> Teacher:
    strategy = settings.pop("strategy", None)
    if strategy is None:
        raise ConfigError(
            f"a teacher given as a mapping needs `strategy` or `recipe`, and has: {', '.join(settings) or 'nothing'}. "
            f"Strategies: {', '.join(TEACHERS)}; recipes: {', '.join(sources.names('teachers'))}."
        )
    cls = _class_of(strategy)
    _check_settings(strategy, settings, constructor_parameters(cls))
    if issubclass(cls, CompositeTeacher) and "teachers" in settings:
        settings["teachers"] = _parts(strategy, settings["teachers"])
    if "context" in inspect.signature(cls.__init__).parameters:
        return cls(context=context, **settings)
    teacher = cls(**settings)  # a class of the user's, which need not pass a context on
    teacher.prompts = teacher.prompts.with_default(context)
    return teacher


def _check_settings(strategy: str, settings: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]) -> None:
    """Refuse settings that the strategy does not have, and name those that it cannot do without."""
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


def _parts(strategy: str, teachers: Any) -> Any:
    """Return the teachers of a mixture or a route, read here, where an error can say which of them is wrong."""
    if isinstance(teachers, Mapping) and not {"strategy", "recipe"} & set(teachers):
        return {name: _part(strategy, name, teacher) for name, teacher in teachers.items()}
    if isinstance(teachers, Sequence) and not isinstance(teachers, str):
        return [_part(strategy, number, teacher) for number, teacher in enumerate(teachers)]
    return _part(strategy, 0, teachers)


def _part(strategy: str, name: Any, value: TeacherLike) -> Teacher:
    try:
        if value is None:
            raise ConfigError("it is null, and only you can choose it. The student at step 0 is `same_checkpoint`.")
        return load_teacher(value)
    except ConfigError as error:
        raise ConfigError(f"part {str(name)!r} of this {strategy} teacher: {error}") from error
