"""A student that becomes certain of everything."""

from __future__ import annotations

from opsd.health.monitor import FINE, Monitor, Values, Verdict


class Entropy(Monitor):
    """Compares the student's entropy with that at the start, on its own rollouts: on given texts it should fall."""

    name, needs = "entropy", ("entropy", "completions/mean_length")

    def judge(self, values: Values) -> Verdict:
        """Return what it says."""
        share = self.share_of_start(values, "entropy")
        if share is None or (level := self.level_of(share)) == "fine":
            return FINE
        start, now = values.start("entropy"), values.now("entropy")
        return Verdict(
            self.unless_better(level, values),
            f"the student's entropy is {now:.2f} nats per token, and was {start:.2f} at the start",
            "Samples become one and the same. The reverse KL narrows: lower the learning rate, take the forward KL or "
            "a JSD (beta), or an entropy_gate.",
            {"share": share},
        )
