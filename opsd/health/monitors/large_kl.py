"""A large divergence at ordinary words: misaligned tokens, or a teacher out of its depth."""

from __future__ import annotations

from opsd.health.monitor import FINE, Monitor, Values, Verdict


class LargeKL(Monitor):
    """Names words at which the two disagree by more than 2 nats."""

    name, needs = "large_kl", ("kl/large",)

    def judge(self, values: Values) -> Verdict:
        """Return what it says."""
        share = values.now("kl/large")
        level = self.level_of(share)
        if level == "fine" or not values.has_start("kl/large") or share < 0.8 * values.start("kl/large"):
            return FINE  # it is being learned
        return Verdict(
            level,
            f"{share:.0%} of ordinary words diverge by more than 2 nats, and training does not lower it",
            "Check the alignment (`opsd doctor`) and whether the teacher answers well with its context; one that is "
            "much weaker, or prompted for another task, cannot be followed.",
            {"large": share},
        )
