"""Held-out accuracy that falls, often while the loss falls too: training pays for something else."""

from __future__ import annotations

import math

from opsd.evaluation.plan import METRIC, P_VALUE, QUESTIONS
from opsd.health.monitor import FINE, Level, Monitor, Values, Verdict

UNLIKELY, VERY_UNLIKELY = 0.05, 0.01  # probabilities that chance alone took as much away
HALVED = 0.5  # of the odds: so much at one look is enough; a healthy run lost a third at one look and found it again


class Task(Monitor):
    """Compares the odds of a right answer at the last two looks with those at the best one before.

    Odds, not points: from 12.8 % to 8 % a student loses as much of what it could as from 50 % to 38 %.
    """

    name, needs = "task", (METRIC,)

    def judge(self, values: Values) -> Verdict:
        """Return what it says."""
        looks = values.all(METRIC)
        left, level = self._look(values, len(looks) - 1)
        if level == "fine":
            return FINE
        if level == "act" and left > HALVED and self._look(values, len(looks) - 2)[1] != "act":
            level = "watch"
        falls = ""
        if "divergence" in values and values.now("divergence") < values.start("divergence"):
            falls = ", while the divergence falls"
        return Verdict(
            level,
            f"accuracy is {looks[-1]:.1%}, and was {max(looks):.1%}{falls}",
            "Keep the best checkpoint (evaluation: rule: best), lower the learning rate, and look at samples.",
            {"lost": max(looks) - looks[-1]},
        )

    def _look(self, values: Values, number: int) -> tuple[float, Level]:
        """Return the share of the best odds that a look has left, and its level, fine where that may be chance."""
        looks = values.all(METRIC)[: number + 1]
        if number < 1:
            return 1.0, "fine"
        questions = values.now(QUESTIONS) if QUESTIONS in values else math.inf
        best, last = max(looks), looks[-1]
        left = _odds(last, questions) / _odds(best, questions)
        level = self.level_of(left)
        if values.count(P_VALUE) == values.count(METRIC) - 1:  # every look was compared, question by question
            p_value = values.all(P_VALUE)[number - 1]
            if level == "fine" or p_value >= UNLIKELY:
                return left, "fine"
            return left, "watch" if p_value >= VERY_UNLIKELY else level
        return left, "fine" if best - last <= chance(last, best, questions) else level


def chance(lower: float, higher: float, questions: float) -> float:
    """Return the half width of the 95 % interval of a difference of two accuracies over as many questions each."""
    mean = (lower + higher) / 2
    return 1.96 * math.sqrt(2 * mean * (1 - mean) / questions)


def _odds(accuracy: float, questions: float) -> float:
    """Return right answers over wrong ones; never 0 or infinite, half an answer is added to both."""
    half = 0.5 / questions if questions < math.inf else 1e-3
    return (accuracy + half) / (1 - accuracy + half)
