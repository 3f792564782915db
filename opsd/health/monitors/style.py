"""A signal of style: punctuation, spaces, markup and hedges carry the loss."""

from __future__ import annotations

from opsd.health.monitor import FINE, Monitor, Values, Verdict


class Style(Monitor):
    """Names a divergence that is not about content."""

    name, needs = "style", ("kl/style",)

    def judge(self, values: Values) -> Verdict:
        """Return what it says."""
        share = values.now("kl/style")
        level = self.level_of(share)
        if level == "fine" or not values.is_settled("kl/style"):
            return FINE
        parts = ", ".join(
            f"{name} {values.now(f'kl/{name}'):.0%}" for name in ("punctuation", "space", "special", "hedges")
        )
        return Verdict(
            level,
            f"{share:.0%} of the divergence is at tokens of style ({parts})",
            "The student learns how the teacher writes, not what it knows: word the context so that it answers in the "
            "student's own way, or use entry_clip or mask_tokens.",
            {"style": share},
        )
