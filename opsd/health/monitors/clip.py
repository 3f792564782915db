"""A clip that takes the gradient of most tokens."""

from __future__ import annotations

from opsd.health.monitor import FINE, Monitor, Values, Verdict


class Clip(Monitor):
    """Names the share of tokens that are clipped."""

    name, needs = "clip", ("clipped/tokens",)

    def judge(self, values: Values) -> Verdict:
        """Return what it says."""
        share = values.now("clipped/tokens")
        level = self.level_of(share)
        if level == "fine":
            return FINE
        return Verdict(
            level,
            f"{share:.0%} of tokens are above token_clip and have no gradient",
            "Raise token_clip, or clip entries instead (entry_clip), which leaves a gradient.",
            {"clipped": share},
        )
