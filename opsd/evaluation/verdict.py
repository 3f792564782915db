"""What the difference between two arms comes to, in words: "beat" needs both kinds of chance to say so.

Knows differences and their intervals; nothing of runs or files.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from opsd.evaluation.power import questions_needed, seeds_needed
from opsd.evaluation.sample_metrics import Metric
from opsd.evaluation.statistics import PairedDifference, SeedSpread
from opsd.evaluation.summary import SURE


@dataclass(frozen=True)
class Pairwise:
    """The first arm against another.

    Args:
        other: the other's name.
        difference: first minus other, mean over seeds that both have, with its interval over questions.
        p_value: of no difference, adjusted for the number of arms compared (Holm).
        spread: of the difference over seeds; runs of one seed are paired.
        words: what it comes to.
    """

    other: str
    difference: PairedDifference
    p_value: float
    spread: SeedSpread
    words: str


def beats(found: Pairwise) -> bool:
    """Tell whether the first arm is better than the other: for other questions and for other seeds."""
    by_seed = found.spread.low
    return found.p_value < SURE and found.difference.low > 0 and by_seed is not None and by_seed > 0


def loses(found: Pairwise) -> bool:
    """Tell whether the first arm is worse than the other: for other questions and for other seeds."""
    by_seed = found.spread.high
    return found.p_value < SURE and found.difference.high < 0 and by_seed is not None and by_seed < 0


@dataclass(frozen=True)
class Verdict:
    """Says what a difference comes to.

    Args:
        first: the name of the arm that is compared.
        kind: what is compared.
        trained: whether it is a run, of which another seed would be another model.
    """

    first: str
    kind: Metric
    trained: bool

    def with_verdict(self, found: Pairwise) -> Pairwise:
        """Return a difference with its words."""
        diff, seeds = found.difference, found.spread
        over = f"{self._number(diff.difference)} ({self._number(diff.low)} to {self._number(diff.high)} over {diff.n} "
        over += "questions"
        if seeds.low is not None:
            over += f"; {self._number(seeds.low)} to {self._number(seeds.high)} over {seeds.seeds} seeds"
        return replace(found, words=f"{self._sentence(found, over)})")

    def _sentence(self, found: Pairwise, over: str) -> str:
        diff, other, wins = found.difference, found.other, self.kind.more_is_better
        if beats(found):
            return f"{self.first} {'beat' if wins else 'has more than'} {other}: {over}"
        if loses(found):
            return f"{self.first} {'LOST to' if wins else 'has less than'} {other}: {over}"
        if found.p_value < SURE and diff.low * diff.high > 0:
            side = f"{self.first} is {'ahead of' if diff.low > 0 else 'behind'} {other}"
            if not self.trained:
                return f"{side}: {over}"
            if found.spread.deviation is None:
                return f"{side} with one pair of seeds, which says nothing of another; train two more (--seed): {over}"
            settle = max(seeds_needed(found.spread.mean, found.spread.deviation), found.spread.seeds + 1)
            return f"{side} on these seeds, and about {settle} would settle it: {over}"
        needed = None if diff.deviation is None else questions_needed(diff.difference, diff.deviation)
        more = f"; about {needed:,} questions would settle a difference of this size" if needed else ""
        return f"{self.first} and {other} cannot be told apart: {over}{more if (needed or 0) > diff.n else ''}"

    def _number(self, value: float | None) -> str:
        return "?" if value is None else f"{value * self.kind.scale:+.1f}"
