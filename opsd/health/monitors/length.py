"""Rollouts that become short: thinking, and then answers, are lost."""

from __future__ import annotations

from opsd.health.monitor import FINE, Monitor, Values, Verdict


class Length(Monitor):
    """Compares the length of rollouts with that at the start."""

    name, needs = "length", ("completions/mean_length",)

    def judge(self, values: Values) -> Verdict:
        """Return what it says."""
        share = self.share_of_start(values, "completions/mean_length")
        if share is None or (level := self.level_of(share)) == "fine":
            return FINE
        start, now = values.start("completions/mean_length"), values.now("completions/mean_length")
        return Verdict(
            self.unless_better(level, values),  # a student that rambles less answers better
            f"rollouts have {now:.1f} tokens, and had {start:.1f} at the start",
            "Compare samples with those at the start (log_completions). A terse context teaches terse answers: word it "
            "otherwise, lower the learning rate, or stop here.",
            {"share": share},
        )
