"""opsd: on-policy self-distillation of language models, with teachers that know more than the student is told.

Public names are imported on first use (PEP 562), so that `import opsd` touches neither torch nor trl.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# name -> the module it lives in
_PUBLIC = {
    "OPSDTrainer": "opsd.training.trainer",
    "OPSDConfig": "opsd.training.config",
    "EvaluationPlan": "opsd.evaluation.plan",
    "PrivilegedContext": "opsd.contexts.privileged",
    "ContextSchedule": "opsd.contexts.schedule",
    "import_columns": "opsd.data.columns",
    "Rollouts": "opsd.rollouts",
    "Objective": "opsd.losses",
    "Divergence": "opsd.losses",
    "Tokens": "opsd.losses",
    "Head": "opsd.models.head",
    "HiddenSignal": "opsd.signals",
    "MixtureSignal": "opsd.signals",
    "RoutedSignal": "opsd.signals",
    "TopKSignal": "opsd.signals",
    "Teacher": "opsd.teachers",
    "SameCheckpointTeacher": "opsd.teachers",
    "LiveTeacher": "opsd.teachers",
    "PastCheckpointTeacher": "opsd.teachers",
    "EMATeacher": "opsd.teachers",
    "SnapshotTeacher": "opsd.teachers",
    "Gate": "opsd.teachers",
    "CachedTeacher": "opsd.teachers",
    "ServedTeacher": "opsd.teachers",
    "SiblingTeacher": "opsd.teachers",
    "MixtureTeacher": "opsd.teachers",
    "RoutedTeacher": "opsd.teachers",
    "load_teacher": "opsd.teachers",
    "OPSDError": "opsd.errors",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'opsd' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
