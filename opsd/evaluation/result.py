"""The result of an evaluation: every question and answer with its grade, so that two runs can be paired by question.

Metrics are computed from it and never stored alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from opsd.errors import CheckpointError, ConfigError, DataError
from opsd.evaluation.questions import name_few
from opsd.evaluation.run_folder import write_json
from opsd.evaluation.sample_metrics import meaning_of, metric_of, parse_metric
from opsd.evaluation.statistics import Estimate, estimate, proportion_interval


@dataclass(frozen=True)
class Answer:
    """One answer of a model.

    Args:
        text: without special tokens.
        correct: whether it is right; None where the grader failed.
        length: in tokens, including the end of the turn.
        ended: whether it ended before `max_new_tokens`.
        answer: the answer that the grader read, as text; None where there is none in the form asked for.

    Example:
        >>> Answer("12 + 7 is 19.", correct=True, length=9, ended=True, answer="19").correct
        True
    """

    text: str
    correct: bool | None
    length: int
    ended: bool
    answer: str | None = None


@dataclass(frozen=True)
class EvaluationResult:
    """One model's answers to one set of questions, in their order.

    Args:
        questions: the questions, normalised (see `opsd.evaluation.questions`).
        grader: name of the grader.
        greedy: one greedy answer per question.
        sampled: k sampled answers per question; empty if none were sampled.
        temperature: of the sampled answers.
        has_form: whether the grader can read answers, so that `format` is defined.
        max_new_tokens: longest answer, in tokens.
        model: name of the model.
        context: name of the context in the prompts, "none" for the plain question.

    Example:
        >>> answers = [Answer("19", True, 2, True), Answer("8", False, 2, True)]
        >>> result = EvaluationResult(["12 + 7", "3 + 4"], "last_number", answers, [])
        >>> result.accuracy, result.estimate("length").value
        (0.5, 2.0)
    """

    questions: list[str]
    grader: str
    greedy: list[Answer]
    sampled: list[list[Answer]]
    temperature: float = 1.0
    has_form: bool = False
    max_new_tokens: int = 0
    model: str = ""
    context: str = "none"

    # ---- the greedy answers ------------------------------------------------------------------------------------

    @property
    def n(self) -> int:
        """Number of questions."""
        return len(self.questions)

    @property
    def correct(self) -> list[bool]:
        """Whether each greedy answer is right; False where the grader failed."""
        return [answer.correct is True for answer in self.greedy]

    @property
    def texts(self) -> list[str]:
        """Texts of the greedy answers."""
        return [answer.text for answer in self.greedy]

    @property
    def lengths(self) -> list[int]:
        """Tokens per greedy answer."""
        return [answer.length for answer in self.greedy]

    @property
    def truncated(self) -> int:
        """Number of greedy answers that were cut at `max_new_tokens`."""
        return sum(not answer.ended for answer in self.greedy)

    @property
    def ungraded(self) -> list[int]:
        """Positions of the questions with an answer, greedy or sampled, on which the grader failed."""
        rows = zip(self.greedy, self.sampled or [[]] * self.n, strict=True)
        return [n for n, (greedy, sampled) in enumerate(rows) if any(a.correct is None for a in (greedy, *sampled))]

    @property
    def accuracy(self) -> float:
        """Share of right greedy answers; a lower bound where answers are ungraded."""
        return sum(self.correct) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy (Wilson)."""
        return proportion_interval(self.correct)

    # ---- metrics -----------------------------------------------------------------------------------------------

    @property
    def samples(self) -> int:
        """Sampled answers per question."""
        return len(self.sampled[0]) if self.sampled else 0

    @cached_property
    def usual_metrics(self) -> list[str]:
        """Names of the metrics that tables show."""
        k = self.samples
        of_samples = [f"avg@{k}", *([f"pass@{k}", f"maj@{k}"] if k > 1 else [])] if k else []
        return ["accuracy", *of_samples, *(["format"] if self.has_form else []), "length", "truncated"]

    def values(self, metric: str) -> np.ndarray:
        """Return a metric per question.

        Args:
            metric: "accuracy", "format", "length" or "truncated", of the greedy answers; "avg@k", "pass@k" or "maj@k",
                of k sampled ones.

        Raises:
            ConfigError: no metric has that name, or k is larger than the number of samples.
        """
        kind, k = parse_metric(metric)
        of_samples = k is not None
        if kind == "format" and not self.has_form:
            raise ConfigError(
                f"format is the share of answers with an answer in the form asked for, and the grader {self.grader!r} "
                "cannot read answers. Use exact, last_number, choice, math or regex:PATTERN."
            )
        answers = (self.sampled or [[] for _ in self.greedy]) if of_samples else [[answer] for answer in self.greedy]
        return np.array([metric_of(metric, each, self.has_form) for each in answers], dtype=float)

    def graded_values(self, metric: str) -> np.ndarray:
        """Return `values` with NaN where the grader failed: the difference of two lower bounds is not a bound."""
        values = self.values(metric)
        values[self.ungraded] = np.nan
        return values

    def estimate(self, metric: str) -> Estimate:
        """Return a metric's mean over questions with its 95 % interval."""
        return estimate(self.values(metric), is_share=meaning_of(metric).is_share)

    # ---- files and pairs ---------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write the result as JSON, whole or not at all."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> EvaluationResult:
        """Read a file that `save` wrote.

        Raises:
            CheckpointError: the file is damaged, or not an evaluation.
        """
        try:
            return cls.from_plain(json.loads(path.read_text("utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is not an evaluation, or damaged ({type(error).__name__}: {error}). Write it again: "
                "`opsd eval MODEL … --output FILE.json`."
            ) from error

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> EvaluationResult:
        """Return the result of plain values, as `dataclasses.asdict` makes them."""
        stored = dict(values)
        answers = [Answer(**answer) for answer in stored.pop("greedy")]
        sampled = [[Answer(**answer) for answer in each] for each in stored.pop("sampled")]
        return cls(greedy=answers, sampled=sampled, **stored)

    def in_order_of(self, other: EvaluationResult) -> EvaluationResult:
        """Return this result with its questions in the order of another result's, so that the two can be paired.

        Raises:
            DataError: the two differ in questions, grader, longest answer, or temperature of sampled answers.
        """
        conditions = ["grader", "max_new_tokens", *(["temperature"] if self.sampled and other.sampled else [])]
        for name in conditions:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise DataError(
                    f"two results can be compared only under one {name}, and these have {theirs!r} and {mine!r}. "
                    "Evaluate both alike."
                )
        order = _matched(other.questions, self.questions)
        pick = [self.sampled[i] for i in order] if self.sampled else []
        return replace(self, questions=list(other.questions), greedy=[self.greedy[i] for i in order], sampled=pick)


def _matched(wanted: Sequence[str], have: Sequence[str]) -> list[int]:
    """Return the position of each wanted question in `have`; a question that is asked twice is matched in order."""
    positions: dict[str, list[int]] = {}
    for position, question in enumerate(have):
        positions.setdefault(question, []).append(position)
    unused = {question: iter(each) for question, each in positions.items()}
    order = [next(unused.get(question, iter(())), None) for question in wanted]
    if None in order or len(wanted) != len(have):
        both = len(set(wanted) & set(have))
        missing = [question for question, position in zip(wanted, order, strict=True) if position is None]
        raise DataError(
            f"a paired comparison needs the same questions on both sides; of {len(wanted)} and {len(have)} only "
            f"{both} are in both{name_few(missing)}. Evaluate both on one split."
        )
    return [position for position in order if position is not None]
