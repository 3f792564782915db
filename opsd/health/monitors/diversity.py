"""Diversity collapse: all rollouts become alike."""

from __future__ import annotations

from opsd.health.monitor import FINE, Monitor, Values, Verdict


class Diversity(Monitor):
    """Compares how many different pairs of tokens rollouts have with the start."""

    name, needs = "diversity", ("distinct_2",)

    def judge(self, values: Values) -> Verdict:
        """Return what it says."""
        share = self.share_of_start(values, "distinct_2")
        if share is None or (level := self.level_of(share)) == "fine":
            return FINE
        alike = f"; two rollouts share {values.now('similarity'):.0%} of theirs" if "similarity" in values else ""
        return Verdict(
            self.unless_better(level, values),
            f"{values.now('distinct_2'):.0%} of the pairs of tokens in rollouts are different ones, and "
            f"{values.start('distinct_2'):.0%} were at the start{alike}",
            "The reverse KL drops what the teacher finds less likely: take the forward KL or a JSD (beta), and look at "
            "pass@k (evaluation: samples).",
            {"share": share},
        )
