"""Says whether one arm beat another: both the interval over questions and the interval over seeds must show it.

Knows differences and their intervals; nothing of runs or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from opsd.evaluation.power import questions_needed, seeds_needed
from opsd.evaluation.sample_metrics import Metric
from opsd.evaluation.statistics import PairedDifference, SeedSpread
from opsd.evaluation.summary import LEVEL

MOST = 100_000  # questions: a number that no one has is no advice


@dataclass(frozen=True)
class Pairwise:
    """The first arm compared with another one.

    Args:
        other: name of the other arm.
        difference: first minus other, mean over the seeds that both have, with its interval over questions.
        p_value: of no difference, adjusted for the number of arms compared (Holm).
        spread: of the difference over seeds; runs of one seed are paired.
        verdict: the result in a sentence.
        by_seed: the difference at each seed.

    Example:
        >>> from opsd.evaluation import paired_difference
        >>> from opsd.evaluation.statistics import over_seeds
        >>> gain = paired_difference([False] * 40, [True] * 20 + [False] * 20)
        >>> beats(Pairwise("sft", gain, gain.p_value, over_seeds([0.49, 0.5, 0.51])))
        True
    """

    other: str
    difference: PairedDifference
    p_value: float
    spread: SeedSpread
    verdict: str = ""
    by_seed: Sequence[float] = ()

    @property
    def same_sign(self) -> int:
        """Number of seeds whose difference has the sign of the mean; 0 where that is 0."""
        return sum(each * self.difference.difference > 0 for each in self.by_seed)


def beats(pair: Pairwise) -> bool:
    """Return whether the first arm is better than the other, for other questions and for other seeds."""
    low = pair.spread.low
    return pair.p_value < LEVEL and pair.difference.low > 0 and low is not None and low > 0


def loses(pair: Pairwise) -> bool:
    """Return whether the first arm is worse than the other, for other questions and for other seeds."""
    high = pair.spread.high
    return pair.p_value < LEVEL and pair.difference.high < 0 and high is not None and high < 0


def over_all(first: str, pairwise: Sequence[Pairwise]) -> str:
    """Return whether the first arm beat the others, in a sentence."""
    beaten = [pair.other for pair in pairwise if beats(pair)]
    lost = [pair.other for pair in pairwise if loses(pair)]
    open_ = [pair for pair in pairwise if not beats(pair) and not loses(pair)]
    if len(beaten) == len(pairwise):
        all_of = "its control" if len(beaten) == 1 else f"all of its {len(beaten)} controls"
        return f"{first} beat {all_of} ({', '.join(beaten)})"
    score = f"{first} beat {len(beaten)} of {len(pairwise)}"
    if lost:
        score += f"; it lost to {', '.join(lost)}"
    if open_:
        questions = max(pair.difference.n for pair in open_)
        seeds = max(max(pair.spread.seeds, 1) for pair in open_)
        cannot = f"{questions} question{'s' * (questions > 1)} and {seeds} seed{'s' * (seeds > 1)} cannot tell it from"
        score += f"; {cannot} {', '.join(pair.other for pair in open_)}"
    return score


def with_verdict(pair: Pairwise, first: str, metric: Metric, *, trained: bool) -> Pairwise:
    """Return a comparison with its verdict.

    Args:
        pair: the comparison.
        first: name of the first arm.
        metric: what is compared.
        trained: whether the first arm is a training run, so that another seed would give another model.
    """
    difference, spread = pair.difference, pair.spread

    def number(value: float | None) -> str:
        return "?" if value is None else f"{value * metric.scale:+.1f}"

    change = f"{number(difference.difference)} ({number(difference.low)} to {number(difference.high)}"
    change += f" over {difference.n} questions"
    if spread.low is not None:
        change += f"; {number(spread.low)} to {number(spread.high)} over {spread.seeds} seeds"
    if len(pair.by_seed) > 1:
        change += f", the same sign in {pair.same_sign} of {len(pair.by_seed)}"
    return replace(pair, verdict=_sentence(pair, first, metric, trained, f"{change})"))


def _sentence(pair: Pairwise, first: str, metric: Metric, trained: bool, change: str) -> str:
    """Return the verdict, with the difference and its intervals in the text `change`."""
    difference, spread, other = pair.difference, pair.spread, pair.other
    if beats(pair):
        return f"{first} {'beat' if metric.more_is_better else 'has more than'} {other}: {change}"
    if loses(pair):
        return f"{first} {'LOST to' if metric.more_is_better else 'has less than'} {other}: {change}"
    if pair.p_value < LEVEL and difference.low * difference.high > 0:
        lead = f"{first} is {'ahead of' if difference.low > 0 else 'behind'} {other}"
        if not trained:
            return f"{lead}: {change}"
        if spread.deviation is None:
            return f"{lead} with one pair of seeds; another seed may differ, train two more with other seeds: {change}"
        needed = max(seeds_needed(spread.mean, spread.deviation), spread.seeds + 1)
        return f"{lead} on these seeds; about {needed} seeds would settle it: {change}"
    questions = None if difference.deviation is None else questions_needed(difference.difference, difference.deviation)
    more = ""
    if questions and difference.n < questions < MOST:
        more = f"; about {questions:,} questions would settle a difference of this size"
    return f"{first} and {other} cannot be distinguished: {change}{more}"
