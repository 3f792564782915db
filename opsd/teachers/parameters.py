"""The settings that a strategy's constructor takes."""

from __future__ import annotations

import inspect

VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def constructor_parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Return the settings that a strategy's constructor takes, without its context; **kwargs stand for its parent's."""
    parameters: dict[str, inspect.Parameter] = {}
    for base in (base for base in cls.__mro__ if "__init__" in vars(base)):
        _, *arguments = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
        parameters |= {
            p.name: p for p in arguments if p.kind not in VARIABLE and p.name not in ("context", *parameters)
        }
        if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in arguments):
            break
    return parameters
