"""A gradient of nothing: the teacher is the student, or no token is scored."""

from __future__ import annotations

from opsd.health.monitor import FINE, Monitor, Values, Verdict


class Gradient(Monitor):
    """Names steps that change nothing."""

    name, needs = "gradient", ("grad_norm",)

    def judge(self, values: Values) -> Verdict:
        """Return what it says."""
        norm = max(values.all("grad_norm")[-3:])
        if norm >= self.threshold.watch:
            return FINE
        level = "act" if norm < self.threshold.act and values.is_settled("grad_norm") else "watch"
        loss = f" at a divergence of {values.now('divergence'):.2g} nats" if "divergence" in values else ""
        return Verdict(
            level,  # type: ignore[arg-type]
            f"the gradient's norm is {norm:.1g}{loss}: no step changes the model",
            "Look whether any token is scored, and whether what grades them, a teacher or rewards, tells them apart.",
            {"grad_norm": norm},
        )
