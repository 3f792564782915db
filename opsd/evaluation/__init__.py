"""Evaluation: graders say which answers are right, sampling gets the answers, statistics says how sure the figure is.

Knows nothing of training or teachers: a model, rows and a function from row to prompt ids are all it is given.
"""

from __future__ import annotations

from opsd.evaluation.graders import GRADERS, Grader, grade_rows, load_grader
from opsd.evaluation.result import Answer, EvaluationResult
from opsd.evaluation.sampling import evaluate, generate_with
from opsd.evaluation.statistics import PairedDifference, paired_difference, proportion_interval, share_of_gap
from opsd.models.generation import generate, stop_ids_of

__all__ = [
    "GRADERS",
    "Answer",
    "EvaluationResult",
    "Grader",
    "PairedDifference",
    "evaluate",
    "generate",
    "generate_with",
    "grade_rows",
    "load_grader",
    "paired_difference",
    "proportion_interval",
    "share_of_gap",
    "stop_ids_of",
]
