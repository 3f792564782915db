"""A student far from where it began."""

from __future__ import annotations

from opsd.health.monitor import FINE, Monitor, Values, Verdict


class Drift(Monitor):
    """Names a large KL to the student at step 0."""

    name, needs = "drift", ("ref_kl",)

    def judge(self, values: Values) -> Verdict:
        """Return what it says."""
        nats = values.now("ref_kl")
        level = self.level_of(nats)
        if level == "fine":
            return FINE
        return Verdict(
            level,
            f"the student is {nats:.2f} nats per token away from itself at step 0",
            "What is not trained on may be lost: measure it (evaluation: retention), raise ref_kl_coef, or lower the "
            "learning rate.",
            {"ref_kl": nats},
        )
