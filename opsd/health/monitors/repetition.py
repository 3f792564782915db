"""Endless repetition, and a teacher that agrees with it."""

from __future__ import annotations

from opsd.health.monitor import FINE, Monitor, Values, Verdict


class Repetition(Monitor):
    """Names stretches of tokens that come again."""

    name, needs = "repetition", ("repetition",)

    def judge(self, values: Values) -> Verdict:
        """Return what it says."""
        share = values.now("repetition")
        level = self.level_of(share)
        if level == "fine" or not values.is_settled("repetition"):
            return FINE
        agrees = ""
        if "agreement_in_loops" in values and values.now("agreement_in_loops") > 2:
            agrees = "; inside them the divergence is small: the teacher agrees with a loop, and will not end it"
        return Verdict(
            level,
            f"{share:.0%} of the stretches of four tokens in rollouts were there before{agrees}",
            "Look at samples. Cut loops out of the loss (mask_truncated_completions), shorten max_completion_length, "
            "or go back to an earlier checkpoint.",
            {"repetition": share},
        )
