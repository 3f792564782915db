"""A first token that student and teacher disagree on: another template, or another thinking mode."""

from __future__ import annotations

from opsd.health.monitor import FINE, Monitor, Values, Verdict


class Opening(Monitor):
    """Compares the first tokens with the rest."""

    name, needs = "opening", ("kl/opening_ratio",)

    def judge(self, values: Values) -> Verdict:
        """Return what it says."""
        ratio = values.now("kl/opening_ratio")
        level = self.level_of(ratio)
        if level == "fine" or not values.is_settled("kl/opening_ratio"):
            return FINE
        learned = not values.has_start("kl/mean") or values.now("kl/mean") < 0.7 * values.start("kl/mean")
        if level == "act" and (learned or values.now("kl/opening") < 0.5):
            level = "watch"  # another opening can be learned, and then the loss falls; or most of it is elsewhere
        return Verdict(
            level,
            f"the first three tokens diverge {ratio:.0f} times as much as the median of the rest, and carry "
            f"{values.now('kl/opening'):.0%} of the loss",
            "The teacher begins its answers in another way: compare both prompts (`opsd show`), their thinking modes "
            "and chat templates; or leave these tokens out (skip_first_tokens).",
            {"ratio": ratio},
        )
