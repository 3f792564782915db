"""An engine that samples with other probabilities than the trainer computes."""

from __future__ import annotations

from opsd.health.monitor import FINE, Monitor, Values, Verdict


class Engine(Monitor):
    """Names importance ratios that are cut."""

    name, needs = "engine", ("importance/truncated",)

    def judge(self, values: Values) -> Verdict:
        """Return what it says."""
        share = values.now("importance/truncated")
        level = self.level_of(share)
        if level == "fine":
            return FINE
        return Verdict(
            level,
            f"{share:.0%} of importance ratios are above importance_clip, and their mean is "
            f"{values.now('importance/ratio'):.2f}",
            "The engine holds other weights, another number format or another temperature: check its flags.",
            {"truncated": share},
        )
