"""Rollouts that no server scores, and that leave the loss: what is trained on is no longer a fair sample."""

from __future__ import annotations

from opsd.health.monitor import FINE, Monitor, Values, Verdict


class Unscored(Monitor):
    """Reads the share of rollouts without a teacher's score."""

    name, needs = "unscored", ("unscored",)

    def judge(self, values: Values) -> Verdict:
        """Return what it says."""
        share = values.now("unscored")
        level = self.level_of(share)
        if level == "fine" or not values.is_settled("unscored"):
            return FINE
        return Verdict(
            level,
            f"{share:.1%} of rollouts have no score of the teacher, and left the loss",
            "See why its servers do not answer (the lines that begin with `teacher`); those that are long may be too "
            "long for them.",
            {"share": share},
        )
