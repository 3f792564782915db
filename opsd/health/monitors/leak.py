"""Rollouts that speak of a solution which their prompt does not have."""

from __future__ import annotations

from opsd.health.monitor import FINE, Monitor, Values, Verdict


class Leak(Monitor):
    """Names leak phrases and copied stretches of the teacher's prompt."""

    name, needs = "leak", ("leak/phrases",)

    def judge(self, values: Values) -> Verdict:
        """Return what it says."""
        if not values.is_settled("leak/phrases"):
            return FINE
        # At the start the student has learned nothing of the teacher: what it says then is its own way.
        first = values.all("leak/phrases")[0], values.all("leak/copied")[0]
        named, copied = values.now("leak/phrases") - first[0], values.now("leak/copied") - first[1]
        level, share = self.level_of(named), max(named, copied)
        if level == "fine" and self.level_of(copied) != "fine":
            level = "watch"  # a right answer may well repeat the sentence in which it was told
        if level == "fine":
            return FINE
        return Verdict(
            level,
            f"{values.now('leak/phrases'):.0%} of rollouts name a given solution, and {values.now('leak/copied'):.0%} "
            "copy six words of the teacher's prompt that the student's has not",
            "The student learns to speak of what it will not be shown: tell the teacher to answer as if it had not "
            "seen it, and check the template with `opsd lint`.",
            {"share": share},
        )
