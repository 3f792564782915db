"""Too few rollouts of its own: the student follows given texts better and better, and its own no better."""

from __future__ import annotations

from opsd.health.monitor import FINE, Monitor, Values, Verdict


class Lmbda(Monitor):
    """Compares the divergence on the student's rollouts with that on texts of others, where a run has both."""

    name, needs = "lmbda", ("kl/mean", "kl/off_policy")

    def judge(self, values: Values) -> Verdict:
        """Return what it says."""
        if not values.has_start("kl/off_policy") or not values.has_start("kl/mean"):
            return FINE
        own, others = values.now("kl/mean"), values.now("kl/off_policy")
        level = self.level_of(own / max(others, 1e-6))
        if level == "fine" or own < 0.9 * values.start("kl/mean"):
            return FINE  # it learns on its own rollouts too
        return Verdict(
            level,
            f"the divergence is {own:.2g} nats on the student's own rollouts, no less than at the start, and "
            f"{others:.2g} on texts of others",
            "It learns texts that it does not write (exposure bias): raise lmbda, or let it grow (lmbda_schedule).",
            {"ratio": own / max(others, 1e-6)},
        )
