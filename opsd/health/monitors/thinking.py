"""Thinking aloud that is lost."""

from __future__ import annotations

from opsd.health.monitor import FINE, WINDOW, Monitor, Values, Verdict

MARKERS = 10  # to expect in the tokens looked at: that none of fewer is there may be chance


class Thinking(Monitor):
    """Compares markers of thinking with the start."""

    name, needs = "thinking", ("thinking", "traced_tokens")

    def judge(self, values: Values) -> Verdict:
        """Return what it says."""
        expected = WINDOW * values.now("traced_tokens") * values.start("thinking") / 1000
        share = self.share_of_start(values, "thinking")
        if share is None or expected < MARKERS or (level := self.level_of(share)) == "fine":
            return FINE
        return Verdict(
            level,
            f"words of thinking aloud: {values.now('thinking'):.1f} in 1,000 tokens, and "
            f"{values.start('thinking'):.1f} at the start",
            "A teacher that knows the answer need not think. Show it less (a hint), ask it to think in its context, or "
            "stop before accuracy follows.",
            {"share": share},
        )
