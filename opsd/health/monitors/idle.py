"""Rollouts that nothing is learned from: none succeeds, or no context has its field."""

from __future__ import annotations

from opsd.health.monitor import FINE, Monitor, Values, Verdict


class Idle(Monitor):
    """Names steps without a signal."""

    name, needs = "idle", ("group/unused",)

    def judge(self, values: Values) -> Verdict:
        """Return what it says."""
        share = values.now("group/unused")
        level = self.level_of(share)
        if level == "fine" or not values.is_settled("group/unused"):
            return FINE
        right = f"; {values.now('group/right'):.0%} are right" if "group/right" in values else ""
        return Verdict(
            level,
            f"{share:.0%} of rollouts are neither distilled nor reinforced{right}",
            "Choose easier rows, more rollouts per prompt (num_generations), or a context that needs no success.",
            {"unused": share},
        )
