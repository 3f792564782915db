"""A loss that falls while held-out accuracy falls: training pays for something else."""

from __future__ import annotations

import math

from opsd.health.monitor import FINE, Monitor, Values, Verdict


def _chance(accuracy: float, questions: float) -> float:
    """Return the half width of the 95 % interval of a difference of two accuracies over as many questions each."""
    return 1.96 * math.sqrt(2 * accuracy * (1 - accuracy) / max(questions, 1))


class Task(Monitor):
    """Compares accuracy at looks with its best."""

    name, needs = "task", ("eval_accuracy",)

    def judge(self, values: Values) -> Verdict:
        """Return what it says."""
        looks = values.all("eval_accuracy")
        lost = max(looks) - looks[-1]
        level = self.level_of(lost + 1e-9)
        if "eval_questions" in values and lost < _chance((max(looks) + looks[-1]) / 2, values.now("eval_questions")):
            level = "fine"
        if level == "fine" or len(looks) < 2:
            return FINE
        if max(looks) - looks[-2] < self.threshold.watch:
            level = "watch"  # one look may be chance
        falls = ""
        if "divergence" in values and values.now("divergence") < values.start("divergence"):
            falls = ", while the divergence falls"
        return Verdict(
            level,
            f"accuracy is {looks[-1]:.1%}, and was {max(looks):.1%}{falls}",
            "Keep the best checkpoint (evaluation: rule: best), lower the learning rate, and look at samples.",
            {"lost": lost},
        )
