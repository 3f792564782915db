"""Metrics of one question from its samples: mean, best of k, majority vote, form, length.

Means and intervals over questions are computed in `statistics`. `METRICS` is the table, `parse_metric` reads names such
as "pass@4", `metric_of` computes one. A new metric is a function and a row of the table. Knows nothing of models or
graders.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

from opsd.errors import ConfigError, did_you_mean
from opsd.settings import as_count


class Sample(Protocol):
    """What metrics read of one sample; `opsd.evaluation.Answer` has it."""

    @property
    def text(self) -> str:
        """The completion, without special tokens."""

    @property
    def correct(self) -> bool | None:
        """Whether it is right; None where the grader failed."""

    @property
    def length(self) -> int:
        """In tokens, including the end-of-sequence token."""

    @property
    def ended(self) -> bool:
        """Whether it ended before it was cut."""

    @property
    def answer(self) -> Hashable | None:
        """The answer that the grader read; None where the text has none in the form asked for."""


@dataclass(frozen=True)
class Metric:
    """A row of METRICS.

    Example:
        >>> METRICS["pass"].meaning
        'Chance that at least one of k samples is right.'
    """

    meaning: str
    """One sentence for help texts and tables."""
    compute: Callable[[Sequence[Sample], int, bool], float]
    """(samples of one question, k, has_form) -> the number."""
    takes_k: bool = False
    """Whether its name ends in @k; without, k is the number of samples."""
    is_share: bool = True
    """Whether it lies between 0 and 1."""
    more_is_better: bool = True
    """Whether a larger value is a better result; False if it is neither better nor worse."""

    @property
    def scale(self) -> int:
        """Factor for printing: shares as per cent, their differences as points."""
        return 100 if self.is_share else 1


def avg_at_k(correct: Sequence[bool | None], k: int) -> float:
    """Return the share of right samples among the first k.

    Args:
        correct: one per sample of the question; None (the grader failed) counts as wrong, so this is a lower bound.
        k: number of samples to average.

    Raises:
        ConfigError: k is not a whole number of at least 1, or is more than there are samples.
    """
    _check_k("avg", k, len(correct))
    return fmean(bool(right) for right in correct[:k])


def pass_at_k(correct: Sequence[bool | None], k: int) -> float:
    """Return the probability that at least one of k samples is right, estimated without bias from all n samples.

    1 - C(n-c, k) / C(n, k), where c of n are right: M. Chen et al., "Evaluating large language models trained on
    code" (arXiv 2107.03374), equation 1, as the product of figure 3, because binomials are too large for floats.

    Args:
        correct: one per sample of the question; None (the grader failed) counts as wrong, so this is a lower bound.
        k: number of samples to draw from the n.

    Raises:
        ConfigError: k is not a whole number of at least 1, or is more than there are samples.
    """
    n, right = len(correct), sum(map(bool, correct))
    _check_k("pass", k, n)
    # With fewer than k wrong samples, i reaches k and the product is 0.
    return 1.0 - math.prod(1 - k / i for i in range(n - right + 1, n + 1))


def maj_at_k(correct: Sequence[bool | None], answers: Sequence[Hashable | None], k: int) -> float:
    """Return how often the majority answer of k samples is right, over disjoint groups of k consecutive samples.

    An incomplete last group is left out. Samples without an answer do not vote; a group without votes is wrong. Ties
    are broken at random: a tied group counts with the share of right answers among those tied. The correctness of an
    answer is the mean over the group's samples that gave it. X. Wang et al., "Self-consistency improves chain of
    thought reasoning in language models" (arXiv 2203.11171).

    Args:
        correct: one per sample of the question; None (the grader failed) counts as wrong, so this is a lower bound.
        answers: one per sample, equal for equal answers; None where there is no answer.
        k: number of samples that vote.

    Raises:
        ConfigError: k is not a whole number of at least 1, or is more than there are samples.
    """
    _check_k("maj", k, len(correct))
    votes = list(zip(correct, answers, strict=True))
    return fmean(_majority(votes[start : start + k]) for start in range(0, len(votes) - k + 1, k))


def _majority(votes: Sequence[tuple[bool | None, Hashable | None]]) -> float:
    right: dict[Hashable, list[bool]] = {}
    for correct, answer in votes:
        if answer is not None:
            right.setdefault(answer, []).append(bool(correct))
    most = max(map(len, right.values()), default=0)
    return fmean(fmean(each) for each in right.values() if len(each) == most) if right else 0.0


def _avg(samples: Sequence[Sample], k: int, has_form: bool) -> float:
    return avg_at_k([sample.correct for sample in samples], k)


def _pass(samples: Sequence[Sample], k: int, has_form: bool) -> float:
    return pass_at_k([sample.correct for sample in samples], k)


def _maj(samples: Sequence[Sample], k: int, has_form: bool) -> float:
    answers = [sample.answer if has_form else sample.text.strip().casefold() or None for sample in samples]
    return maj_at_k([sample.correct for sample in samples], answers, k)


def _format(samples: Sequence[Sample], k: int, has_form: bool) -> float:
    return fmean(sample.answer is not None for sample in samples) if has_form else math.nan


def _length(samples: Sequence[Sample], k: int, has_form: bool) -> float:
    return fmean(sample.length for sample in samples)


def _truncated(samples: Sequence[Sample], k: int, has_form: bool) -> float:
    return fmean(not sample.ended for sample in samples)


METRICS: dict[str, Metric] = {
    "accuracy": Metric("Share of questions whose greedy answer is right.", _avg),
    "avg": Metric("Share of right samples among the first k.", _avg, takes_k=True),
    "pass": Metric("Chance that at least one of k samples is right.", _pass, takes_k=True),
    "maj": Metric("How often the most frequent answer of k samples is right.", _maj, takes_k=True),
    "format": Metric("Share of samples with an answer in the form asked for.", _format),
    "length": Metric("Mean number of tokens per sample.", _length, is_share=False, more_is_better=False),
    "truncated": Metric("Share of samples that were cut before they ended.", _truncated, more_is_better=False),
}


def parse_metric(name: str) -> tuple[str, int | None]:
    """Return the kind, a key of METRICS, and k of a metric's name; k is None for kinds that have none.

    Args:
        name: "accuracy", "avg@8", "pass@4", "maj@8", "format", "length" or "truncated", with any k.

    Raises:
        ConfigError: no metric has that name.
    """
    kind, at, number = name.partition("@")
    is_number = re.fullmatch("[1-9][0-9]*", number) is not None
    if kind not in METRICS:
        names = [f"{each}@{number if is_number else 8}" if METRICS[each].takes_k else each for each in METRICS]
        raise ConfigError(
            f"metric {name!r} is unknown.{did_you_mean(name, names)}\n"
            f"A metric is one of {', '.join(f'{each}@K' if METRICS[each].takes_k else each for each in METRICS)}."
        )
    if METRICS[kind].takes_k and not is_number:
        raise ConfigError(
            f"metric {name!r} needs a number of samples after the @, at least 1.\n"
            f"Values at different k cannot be compared, so k is part of the name. Write {kind}@8."
        )
    if at and not METRICS[kind].takes_k:
        raise ConfigError(f"metric {name!r} takes no number: it is a mean over all samples.\nWrite {kind}.")
    return kind, int(number) if at else None


def meaning_of(name: str) -> Metric:
    """Return the row of METRICS for a metric's name.

    Raises:
        ConfigError: no metric has that name.
    """
    return METRICS[parse_metric(name)[0]]


def metric_of(name: str, samples: Sequence[Sample], has_form: bool) -> float:
    """Return one metric of one question.

    Args:
        name: see `parse_metric`.
        samples: of the question, at least one, in the order they were drawn.
        has_form: whether the grader reads answers. If not, "format" is NaN, and "maj" counts texts as answers, stripped
            and in lower case; empty texts do not vote.

    Returns:
        A share between 0 and 1; for "length" tokens.

    Raises:
        ConfigError: no metric has that name, or k is more than there are samples.
    """
    kind, k = parse_metric(name)
    return METRICS[kind].compute(samples, len(samples) if k is None else k, has_form)


def _check_k(kind: str, k: int, samples: int) -> None:
    if as_count(f"k of {kind}@k", k) > samples:
        raise ConfigError(
            f"{kind}@{k} needs at least {k} samples per question, and there are {samples}. Draw more: samples={k}, "
            f"or --samples {k} of `opsd eval`."
        )
