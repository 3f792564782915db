"""Evaluation: generates answers, grades them, and computes metrics with intervals.

    graders, answers               whether a text is right, and what it answers
    sampling, result               answers of a model to rows; every answer with its grade, as a file
    sample_metrics, statistics     metrics per question; intervals and tests over questions and seeds
    power                          how many questions or seeds a difference needs
    plan, questions                what a run measures; which questions are the same
    summary, compare, verdict      one run summarised; several runs compared
    pareto, selection, plot        the task beside what was kept; the best value of an arm; a drawing of both
    sweep_folder                   what `opsd sweep` writes into its folders
    likelihood, run_folder         log-probabilities of traces, drift; a run's folder read back

Knows nothing of training.
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
