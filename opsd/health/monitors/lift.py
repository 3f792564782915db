"""A teacher that is followed and teaches nothing: the divergence falls, and held-out accuracy never rises."""

from __future__ import annotations

from opsd.evaluation.plan import METRIC, QUESTIONS
from opsd.health.monitor import FINE, Monitor, Values, Verdict
from opsd.health.monitors.task import chance

LOOKS = 4  # fewer prove nothing
KNOWN = 0.9  # accuracy at the start, from which on there is little to gain


class Lift(Monitor):
    """Compares how much of the divergence is left with what held-out accuracy has gained."""

    name, needs = "lift", (METRIC, "divergence")

    def judge(self, values: Values) -> Verdict:
        """Return what it says."""
        looks, left = values.all(METRIC), self.share_of_start(values, "divergence")
        if len(looks) < LOOKS or left is None or looks[0] >= KNOWN:
            return FINE
        level = self.level_of(left)
        questions = values.now(QUESTIONS) if QUESTIONS in values else float("inf")
        if level == "fine" or max(looks) - looks[0] > chance(looks[0], max(looks), questions):
            return FINE
        return Verdict(
            level,
            f"{left:.0%} of the divergence at the start is left, and accuracy is {looks[-1]:.1%}, as at the start "
            f"({looks[0]:.1%}): the student follows its teacher, and gains nothing",
            "See whether the context helps the teacher (opsd doctor: lift), and whether it is that of the right row.",
            {"left": left, "gained": max(looks) - looks[0]},
        )
