"""Metrics of k samples per question: against their definitions, by brute force over subsets and orders."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsd.errors import ConfigError
from opsd.evaluation.sample_metrics import (
    METRICS,
    avg_at_k,
    maj_at_k,
    metric_of,
    parse_metric,
    pass_at_k,
)

GRADES = st.sampled_from([True, False, None])
ANSWERS = st.sampled_from(["4", "5", "6", None])


@dataclass(frozen=True)
class One:
    text: str = "4"
    correct: bool | None = True
    length: int = 1
    ended: bool = True
    answer: str | None = "4"


@given(st.lists(GRADES, min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(correct: list[bool | None], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(correct)))
    subsets = [any(subset) for subset in itertools.combinations(correct, k)]
    assert pass_at_k(correct, k) == pytest.approx(sum(subsets) / len(subsets))


@pytest.mark.parametrize(("n", "right", "k"), [(1000, 3, 100), (5000, 1, 2), (2000, 1990, 1), (300, 0, 8), (9, 9, 9)])
def test_pass_at_k_of_many_samples_is_exact(n: int, right: int, k: int) -> None:
    """C(5000, 2500) is no float."""
    exact = 1 - Fraction(math.comb(n - right, k), math.comb(n, k))
    assert pass_at_k([True] * right + [False] * (n - right), k) == pytest.approx(float(exact), rel=1e-9)


@given(st.lists(GRADES, min_size=1, max_size=9))
def test_at_one_sample_all_three_agree(correct: list[bool | None]) -> None:
    share = sum(right is True for right in correct) / len(correct)
    assert avg_at_k(correct, len(correct)) == pytest.approx(share)
    assert pass_at_k(correct, 1) == pytest.approx(share)
    assert maj_at_k(correct, ["an answer"] * len(correct), 1) == pytest.approx(share)


def test_avg_at_k_counts_the_first_k_and_a_failed_grader_as_wrong() -> None:
    assert avg_at_k([True, None, False, True, True], 4) == 0.5
    assert avg_at_k([True, False], 1) == 1.0


@given(st.integers(1, 4), st.integers(1, 3), st.data())
def test_maj_at_k_is_the_mean_over_all_orders_of_a_vote_won_by_who_comes_first(
    k: int, groups: int, data: st.DataObject
) -> None:
    """Tied answers have equally many samples: who comes first in a random order is a fair draw among them."""
    n = k * groups + data.draw(st.integers(0, k - 1))
    samples = data.draw(st.lists(st.tuples(GRADES, ANSWERS), min_size=n, max_size=n))
    votes = []
    for start in range(0, k * groups, k):
        for order in itertools.permutations(samples[start : start + k]):
            given = [answer for _, answer in order if answer is not None]
            winner = Counter(given).most_common(1)[0][0] if given else None
            first = next((right for right, answer in order if answer == winner), None) if given else False
            votes.append(bool(first))
    correct, answers = zip(*samples, strict=True)
    assert maj_at_k(correct, answers, k) == pytest.approx(fmean(votes))


def test_maj_at_k_by_hand() -> None:
    right = {"4": True, "5": False, None: False}
    for answers, k, expected in (
        ("4 4 5", 3, 1.0),
        ("4 5 5", 3, 0.0),
        ("4 5 - -", 4, 0.5),  # a tie
        ("4 - - -", 4, 1.0),  # who has no answer does not vote
        ("- - - -", 4, 0.0),
        ("4 4 5 5", 2, 0.5),  # two groups
        ("4 4 5 5 5", 2, 0.5),  # and a fifth sample without one
    ):
        given = [None if answer == "-" else answer for answer in answers.split()]
        assert maj_at_k([right[answer] for answer in given], given, k) == expected, answers
    # The grader was at odds with itself, or failed on one of three: its mean.
    assert maj_at_k([True, None, True], ["4", "4", "4"], 3) == pytest.approx(2 / 3)


def test_maj_at_k_wants_an_answer_per_sample() -> None:
    with pytest.raises(ValueError, match="zip"):
        maj_at_k([True, True], ["4"], 1)


@pytest.mark.parametrize("metric", [avg_at_k, pass_at_k, lambda correct, k: maj_at_k(correct, ["4"] * 4, k)])
def test_a_k_that_cannot_be_is_refused(metric: object) -> None:
    for k, message in ((5, "--samples 5"), (0, "at least 1"), (-1, "at least 1"), (1.5, "whole number")):
        with pytest.raises(ConfigError, match=message):
            metric([True] * 4, k)  # type: ignore[operator]
    with pytest.raises(ConfigError, match="needs at least 8 samples per question, and there are 4"):
        pass_at_k([True] * 4, 8)


@pytest.mark.parametrize("kind", METRICS)
def test_every_metric_of_the_table_has_a_name_a_meaning_and_a_value(kind: str) -> None:
    name = f"{kind}@2" if METRICS[kind].takes_k else kind
    assert parse_metric(name) == (kind, 2 if METRICS[kind].takes_k else None)
    assert METRICS[kind].meaning.endswith(".") and METRICS[kind].meaning.count(".") == 1
    assert isinstance(metric_of(name, [One(), One()], has_form=True), float)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pas@4", "Did you mean 'pass@4'"),
        ("Maj@16", "Did you mean 'maj@16'"),
        ("formt", "Did you mean 'format'"),
        ("", "is one of accuracy, avg@K, pass@K, maj@K, format, length, truncated"),
        ("perplexity", "is unknown.\n"),
        ("maj@x", "Write maj@8"),
        ("pass", "Write pass@8"),
        ("pass@", "Write pass@8"),
        ("pass@0", "at least 1"),
        ("avg@-1", "at least 1"),
        ("avg@1.5", "at least 1"),
        ("avg@²", "at least 1"),
        ("avg@4@4", "at least 1"),
        ("format@3", "Write format"),
        ("length@", "Write length"),
    ],
)
def test_a_name_that_no_metric_has_is_refused_with_the_nearest_one(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_metric(name)
    assert message in str(error.value)


SAMPLES = [
    One(" Four ", True, 10, True, "4"),
    One("four", True, 20, True, None),
    One("five", False, 30, False, "5"),
    One("", None, 40, True, None),
]


@pytest.mark.parametrize(
    ("name", "has_form", "value"),
    [
        ("accuracy", True, 0.5),
        ("avg@4", True, 0.5),
        ("avg@2", True, 1.0),
        ("pass@1", True, 0.5),
        ("pass@2", True, 5 / 6),
        ("maj@4", True, 0.5),  # 4 and 5 are tied
        ("maj@4", False, 1.0),  # "four" has two votes, whatever its case and space; the empty text has none
        ("maj@1", False, 0.5),
        ("format", True, 0.5),
        ("length", False, 25.0),
        ("truncated", False, 0.25),
    ],
)
def test_metrics_of_four_samples_by_hand(name: str, has_form: bool, value: float) -> None:
    assert metric_of(name, SAMPLES, has_form) == pytest.approx(value)


def test_an_empty_text_does_not_vote() -> None:
    assert metric_of("maj@3", [One("", False), One(" ", False), One("four", True)], has_form=False) == 1.0


def test_format_is_not_known_where_answers_have_none() -> None:
    assert math.isnan(metric_of("format", SAMPLES, has_form=False))
    assert metric_of("format", [One(answer=None)], has_form=True) == 0.0


def test_a_metric_of_more_samples_than_there_are_names_the_way_out() -> None:
    with pytest.raises(ConfigError, match="--samples 8"):
        metric_of("maj@8", SAMPLES, has_form=True)
