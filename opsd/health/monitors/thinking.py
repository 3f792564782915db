"""Thinking aloud that is lost."""

from __future__ import annotations

from opsd.health.monitor import FINE, Monitor, Values, Verdict

MARKERS = 2.0  # in 1,000 tokens at the start: of a model that thinks aloud less there is none to lose


class Thinking(Monitor):
    """Compares markers of thinking with the start."""

    name, needs = "thinking", ("thinking",)

    def judge(self, values: Values) -> Verdict:
        """Return what it says."""
        share = self.share_of_start(values, "thinking", least=MARKERS)
        if share is None or (level := self.level_of(share)) == "fine":
            return FINE
        return Verdict(
            level,
            f"words of thinking aloud: {values.now('thinking'):.1f} in 1,000 tokens, and "
            f"{values.start('thinking'):.1f} at the start",
            "A teacher that knows the answer need not think. Show it less (a hint), ask it to think in its context, or "
            "stop before accuracy follows.",
            {"share": share},
        )
