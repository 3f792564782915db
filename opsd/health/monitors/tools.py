"""Tool calls that are lost."""

from __future__ import annotations

from opsd.health.monitor import FINE, Monitor, Values, Verdict


class Tools(Monitor):
    """Compares tool calls per rollout with the start."""

    name, needs = "tools", ("tools/call_frequency",)

    def judge(self, values: Values) -> Verdict:
        """Return what it says."""
        share = self.share_of_start(values, "tools/call_frequency")
        if share is None or (level := self.level_of(share)) == "fine":
            return FINE
        return Verdict(
            level,
            f"{values.now('tools/call_frequency'):.2f} tool calls in a rollout, and "
            f"{values.start('tools/call_frequency'):.2f} at the start",
            "A teacher that knows the answer need not call a tool: show it the calls as well.",
            {"share": share},
        )
