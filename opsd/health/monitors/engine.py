"""Samples of other probabilities than the trainer computes: of an engine, or of older weights."""

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
            "vLLM holds other weights, another number format or another temperature: check its flags. Or samples have "
            "become too old: lower steps_per_generation or learning_rate.",
            {"truncated": share},
        )
