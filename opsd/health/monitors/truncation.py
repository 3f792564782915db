"""Rollouts that do not end: length inflation, or an end of turn that is not learned."""

from __future__ import annotations

from opsd.health.monitor import FINE, Monitor, Values, Verdict

GROWTH = 0.2  # of the share since the start


class Truncation(Monitor):
    """Names a share of cut rollouts that has grown."""

    name, needs = "truncation", ("completions/clipped_ratio",)

    def judge(self, values: Values) -> Verdict:
        """Return what it says."""
        if not values.has_start("completions/clipped_ratio"):
            return FINE
        start, now = values.start("completions/clipped_ratio"), values.now("completions/clipped_ratio")
        level = self.level_of(now)
        if level == "fine" or now < start + GROWTH:
            return FINE  # short limits cut most rollouts of healthy runs
        return Verdict(
            level,
            f"{now:.0%} of rollouts are cut at the longest length, and {start:.0%} were at the start",
            "Look at the last tokens of samples. The teacher may not end its answers (template, end token), or the "
            "student repeats itself; else raise max_completion_length.",
            {"cut": now},
        )
