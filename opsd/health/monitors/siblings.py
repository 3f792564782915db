"""Siblings that say the same: nothing is left to choose from among the rollouts of a prompt."""

from __future__ import annotations

from opsd.health.monitor import FINE, Monitor, Values, Verdict

ROOM = 0.25  # of similarity above the start: siblings of a certain model are alike from the first step on


class Siblings(Monitor):
    """Names rollouts of one prompt that become alike."""

    name, needs = "siblings", ("sibling_similarity",)

    def judge(self, values: Values) -> Verdict:
        """Return what it says."""
        now = values.now("sibling_similarity")
        level = self.level_of(now)
        if level == "fine" or not values.has_start("sibling_similarity"):
            return FINE
        start = values.start("sibling_similarity")
        if now - start < ROOM:
            return FINE
        return Verdict(
            self.unless_better(level, values),  # rollouts that are right are alike
            f"two rollouts of a prompt share {now:.0%} of their pairs of tokens, and shared {start:.0%} at the start",
            "Groups of rollouts no longer differ, so that rewards and siblings teach nothing: lower the learning rate, "
            "take the forward KL or a JSD (beta), and look at pass@k (evaluation: samples).",
            {"similarity": now},
        )
