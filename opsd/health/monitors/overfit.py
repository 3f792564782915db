"""Rows that are seen again and again: the divergence on them falls, and held-out accuracy has had its best."""

from __future__ import annotations

from opsd.evaluation.plan import METRIC
from opsd.health.monitor import FINE, Monitor, Values, Verdict

LOOKS = 3  # fewer have no trend
FALLS = 0.7  # of the divergence at the start


class Overfit(Monitor):
    """Counts passes over the rows since held-out accuracy was at its best."""

    name, needs = "overfit", (METRIC, "divergence", "epoch")

    def judge(self, values: Values) -> Verdict:
        """Return what it says."""
        looks, left = values.all(METRIC), self.share_of_start(values, "divergence")
        if len(looks) < LOOKS or left is None or left > FALLS:
            return FINE
        best = len(looks) - 1 - looks[::-1].index(max(looks))  # the last of equal ones
        passes = values.all("epoch")[-1] * (len(looks) - 1 - best) / (len(looks) - 1)
        level = self.level_of(passes)
        if level == "fine":
            return FINE
        return Verdict(
            level,
            f"{passes:.0f} passes over the same rows ago, accuracy was at its best ({max(looks):.1%}; now "
            f"{looks[-1]:.1%}), and the divergence on them falls on",
            "Use more rows, or stop at the best checkpoint (evaluation: rule: best).",
            {"passes": passes},
        )
