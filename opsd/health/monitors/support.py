"""A top-k support that holds too little of the teacher."""

from __future__ import annotations

from opsd.health.monitor import FINE, Monitor, Values, Verdict


class Support(Monitor):
    """Names the teacher's mass outside the support."""

    name, needs = "support", ("support/teacher",)

    def judge(self, values: Values) -> Verdict:
        """Return what it says."""
        mass = values.now("support/teacher")
        level = self.level_of(mass)
        if level == "fine":
            return FINE
        return Verdict(
            level,
            f"the support holds {mass:.0%} of the teacher's probability",
            "Raise support_k, or keep the rest as one entry (tail: bucket).",
            {"mass": mass},
        )
