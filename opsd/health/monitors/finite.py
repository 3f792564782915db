"""A loss that is NaN or infinite: every step after it spoils the weights."""

from __future__ import annotations

from opsd.health.monitor import FINE, Monitor, Values, Verdict


class Finite(Monitor):
    """Names a loss, a divergence or an entropy that is no number."""

    name, needs = "finite", ("not_finite",)

    def judge(self, values: Values) -> Verdict:
        """Return what it says."""
        count = int(sum(values.all("not_finite")))
        level = self.level_of(count)
        if level == "fine":
            return FINE
        return Verdict(
            level,
            f"the loss, the divergence or the entropy was NaN or infinite in {count} log entries",
            "Go back to a checkpoint from before. Usual causes: a learning rate that is too high, float16 without loss "
            "scaling, weights that were already broken.",
            {"entries": count},
        )
