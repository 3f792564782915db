"""The thresholds of all monitors, each with where it comes from. A monitor that has none here does not exist."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Threshold:
    """At which value a monitor says watch, and at which act.

    >>> THRESHOLDS["length"].watch
    0.7

    Args:
        watch: from here on.
        act: from here on.
        unit: of both.
        source: where they come from.
    """

    watch: float
    act: float
    unit: str
    source: str


_RUNS = "runs that were made to fail (benchmarks/failures)"
_SURVEY = "published failures (docs/health.md)"
THRESHOLDS: dict[str, Threshold] = {
    "gradient": Threshold(1e-5, 1e-6, "norm of the gradient", "rounding of float32, as in training/learning.py"),
    "finite": Threshold(1, 1, "log entries whose loss is NaN or infinite", "one spoils every weight"),
    "length": Threshold(0.7, 0.4, "share of the length at the start", f"{_SURVEY}: a loss of 30 % and more"),
    "truncation": Threshold(0.6, 0.9, "share of rollouts, and 20 points above the start", "StableOPD; ms-swift#9526"),
    "entropy": Threshold(0.5, 0.25, "share of the entropy at the start", "entropy collapse before accuracy: TRPO-like "
                         "runs lose half of it (DAPO, arXiv 2503.14476)"),
    "repetition": Threshold(0.2, 0.5, "share of 4-token stretches seen before", "TIDE, arXiv 2608.09836"),
    "diversity": Threshold(0.6, 0.45, "share of distinct pairs of tokens at the start", f"arXiv 2606.26091; {_RUNS}"),
    "siblings": Threshold(0.8, 0.95, "share of pairs of tokens that two siblings have in common", "arXiv 2606.26091"),
    "style": Threshold(0.7, 0.9, "share of the divergence", "OPSD, table 5: style tokens carry most of it"),
    "opening": Threshold(5.0, 20.0, "mean of the first 3 tokens over the median of the rest", "OPSD #10; tinker#796"),
    "leak": Threshold(0.02, 0.1, "share of rollouts above that at the start", "RLSD; SDFT"),
    "large_kl": Threshold(0.25, 0.5, "share of words above 2 nats", "a teacher that knows the same language differs by "
                          "less at most words"),
    "thinking": Threshold(0.7, 0.4, "share of the markers at the start", "arXiv 2603.24472"),
    "tools": Threshold(0.6, 0.3, "share of the calls at the start", "SOD #24: 3.7 to 0.5 calls"),
    "drift": Threshold(0.5, 2.0, "nats per token from step 0", "SDFT: 0.7 nats after a task, SFT 1.3"),
    "engine": Threshold(0.05, 0.2, "share of tokens, or nats per token", "importance ratios near 1 (SDPO clips at 2)"),
    "task": Threshold(0.85, 0.75, "odds of a right answer over those at the best look, at two looks; or 0.5 at one",
                      _RUNS),
    "lift": Threshold(0.7, 0.5, "share of the divergence at the start, where accuracy has not risen", _RUNS),
    "overfit": Threshold(5, 10, "passes over all rows since held-out accuracy was at its best", _RUNS),
    "lmbda": Threshold(2.0, 4.0, "divergence on own rollouts over that on texts of others", "GKD, arXiv 2306.13649: "
                       "exposure bias"),
    "idle": Threshold(0.9, 0.99, "share of rollouts that nothing is learned from", "rlhf-book PR 387; SDPO"),
    "unscored": Threshold(0.01, 0.05, "share of rollouts without a score", "what is lost is not lost at random: the "
                          "long ones"),
    "context": Threshold(0.3, 0.8, "share of teacher prompts that are shortened", "half of a trace is another trace"),
    "support": Threshold(0.95, 0.8, "the teacher's mass on the support", "verl#6909; docs/losses.md"),
    "clip": Threshold(0.3, 0.7, "share of tokens without a gradient", "token_clip is meant for few tokens"),
}  # fmt: skip
