"""Tool calls that are lost."""

from __future__ import annotations

from opsd.health.monitor import FINE, Monitor, Values, Verdict


class Tools(Monitor):
    """Compares tool calls per rollout with the start."""

    name, needs = "tools", ("tools/call_frequency",)

    def judge(self, values: Values) -> Verdict:
        """Return what it says."""
        if not values.has_start("tools/call_frequency") or not values.start("tools/call_frequency"):
            return FINE
        share = values.now("tools/call_frequency") / values.start("tools/call_frequency")
        level = self.below(share)
        if level == "fine":
            return FINE
        return Verdict(
            level,
            f"{values.now('tools/call_frequency'):.2f} tool calls in a rollout, and "
            f"{values.start('tools/call_frequency'):.2f} at the start",
            "A teacher that knows the answer need not call a tool: show it the calls as well.",
            {"share": share},
        )
