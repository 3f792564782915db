"""A loss that falls while held-out accuracy falls: training pays for something else."""

from __future__ import annotations

import math
from collections.abc import Sequence

from opsd.evaluation.plan import METRIC, P_VALUE, QUESTIONS
from opsd.health.monitor import FINE, Monitor, Values, Verdict

UNLIKELY, VERY_UNLIKELY = 0.05, 0.01  # probabilities that chance alone took as much away


class Task(Monitor):
    """Compares the odds of a right answer at the last look with those at the best one.

    Odds, not points: from 12.8 % to 8 % a student loses as much of what it could as from 50 % to 38 %.
    """

    name, needs = "task", (METRIC,)

    def judge(self, values: Values) -> Verdict:
        """Return what it says."""
        looks = values.all(METRIC)
        questions = values.now(QUESTIONS) if QUESTIONS in values else math.inf
        best, last = max(looks), looks[-1]
        left = _odds(last, questions) / _odds(best, questions)
        level, sure = self.level_of(left), _certainty(values, looks, questions)
        if level == "fine" or sure == "chance":
            return FINE
        falls = ""
        if "divergence" in values and values.now("divergence") < values.start("divergence"):
            falls = ", while the divergence falls"
        return Verdict(
            "watch" if sure == "likely" else level,
            f"accuracy is {last:.1%}, and was {best:.1%}{falls}",
            "Keep the best checkpoint (evaluation: rule: best), lower the learning rate, and look at samples.",
            {"lost": best - last},
        )


def chance(lower: float, higher: float, questions: float) -> float:
    """Return the half width of the 95 % interval of a difference of two accuracies over as many questions each."""
    mean = (lower + higher) / 2
    return 1.96 * math.sqrt(2 * mean * (1 - mean) / questions)


def _odds(accuracy: float, questions: float) -> float:
    """Return right answers over wrong ones; never 0 or infinite, half an answer is added to both."""
    half = 0.5 / questions if questions < math.inf else 1e-3
    return (accuracy + half) / (1 - accuracy + half)


def _certainty(values: Values, looks: Sequence[float], questions: float) -> str:
    """Return whether a loss is sure, likely, or chance."""
    if values.count(P_VALUE) == len(looks) - 1 > 0:  # every look was compared, question by question
        p_value = values.all(P_VALUE)[-1]
        return "chance" if p_value >= UNLIKELY else "likely" if p_value >= VERY_UNLIKELY else "sure"
    best, last = max(looks), looks[-1]
    if best - last <= chance(last, best, questions):
        return "chance"
    is_second = len(looks) > 1 and best - looks[-2] > 0.5 * (best - last)
    return "sure" if is_second else "likely"
