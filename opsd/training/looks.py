"""Looks at the selection split while a run trains: what is kept of each, and what is logged.

Knows results; not who answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from opsd.evaluation.plan import METRIC, P_VALUE, QUESTIONS
from opsd.evaluation.result import EvaluationResult
from opsd.evaluation.statistics import paired_difference
from opsd.evaluation.summary import metrics_with_intervals

RIGHT = "right"  # of a look: a character per question
MARKS = {"1": 1.0, "0": 0.0, "?": math.nan}  # right, wrong, and not graded


class Looks:
    """The looks of a run.

    >>> looks = Looks()
    >>> looks.add(10, result)
    {'eval_accuracy': 0.42, 'eval_length': 15.1, 'eval_questions': 200}

    Args:
        entries: of a run that is resumed, as its summary has them.
    """

    def __init__(self, entries: Iterable[Mapping[str, Any]] = ()):
        self.entries = [dict(entry) for entry in entries]

    def add(self, step: int, result: EvaluationResult) -> dict[str, float]:
        """Add a look, and return what is logged of it; looks at later steps are those of a run that broke off."""
        earlier = [entry for entry in self.entries if entry["step"] < step]
        values = result.graded_values("accuracy").tolist()
        right = "".join("?" if math.isnan(value) else "1" if value else "0" for value in values)
        self.entries = [*earlier, {"step": step, **metrics_with_intervals(result), RIGHT: right}]
        logged = {METRIC: result.accuracy, "eval_length": result.estimate("length").value, QUESTIONS: result.n}
        best = max(earlier, key=lambda entry: entry["accuracy"]["value"], default={})
        if RIGHT in best and (known := _known(best[RIGHT], right)):
            logged[P_VALUE] = paired_difference([a for a, _ in known], [b for _, b in known]).p_value
        return logged


def _known(best: str, right: str) -> Sequence[tuple[float, float]]:
    """Return the grades of the questions that both looks graded."""
    return [(MARKS[a], MARKS[b]) for a, b in zip(best, right, strict=True) if "?" not in (a, b)]
