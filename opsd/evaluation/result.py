"""What a model answered to a set of questions: every answer with its grade, kept so that runs can be paired later.

Figures are computed from it and never stored alone: a share without its questions can be compared with nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
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
    """One answer.

    Args:
        text: without special tokens.
        correct: whether it is right; None where the grader failed.
        length: tokens, the end of the turn included.
        ended: whether it came to its end by itself.
        answer: what the grader read in it, as text; None where it has no answer in the form asked for.
    """

    text: str
    correct: bool | None
    length: int
    ended: bool
    answer: str | None = None


@dataclass(frozen=True)
class EvaluationResult:
    """What one model did on one set of questions, in their order.

    Args:
        questions: the questions, as they are told apart (see `opsd.evaluation.questions`).
        grader: its name.
        greedy: one answer per question, the likeliest token at every step.
        sampled: k more per question, sampled; empty where none were.
        temperature: of the sampled ones.
        has_form: whether the grader can tell an answer that has the form asked for from one that has not.
        max_new_tokens: longest answer, in tokens.
        model: who answered, in words.
        shown: what it was shown beside the question.
    """

    questions: list[str]
    grader: str
    greedy: list[Answer]
    sampled: list[list[Answer]]
    temperature: float = 1.0
    has_form: bool = False
    max_new_tokens: int = 0
    model: str = ""
    shown: str = "the prompt"

    # ---- the greedy answers ------------------------------------------------------------------------------------

    @property
    def n(self) -> int:
        """Number of questions."""
        return len(self.questions)

    @property
    def correct(self) -> list[bool]:
        """Whether each question was answered right; False where the grader failed."""
        return [answer.correct is True for answer in self.greedy]

    @property
    def texts(self) -> list[str]:
        """The answers."""
        return [answer.text for answer in self.greedy]

    @property
    def lengths(self) -> list[int]:
        """Tokens per answer."""
        return [answer.length for answer in self.greedy]

    @property
    def truncated(self) -> int:
        """How many answers ran into `max_new_tokens` before they ended."""
        return sum(not answer.ended for answer in self.greedy)

    @property
    def ungraded(self) -> list[int]:
        """Questions with an answer, greedy or sampled, on which the grader failed."""
        rows = zip(self.greedy, self.sampled or [[]] * self.n, strict=True)
        return [n for n, (one, more) in enumerate(rows) if any(a.correct is None for a in (one, *more))]

    @property
    def accuracy(self) -> float:
        """Share answered right; a lower bound where answers are ungraded."""
        return sum(self.correct) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy."""
        return proportion_interval(self.correct)

    # ---- all of them -------------------------------------------------------------------------------------------

    @property
    def samples(self) -> int:
        """Sampled answers per question."""
        return len(self.sampled[0]) if self.sampled else 0

    @cached_property
    def usual_metrics(self) -> list[str]:
        """The metrics worth a line."""
        k = self.samples
        of_samples = [f"avg@{k}", *([f"pass@{k}", f"maj@{k}"] if k > 1 else [])] if k else []
        return ["accuracy", *of_samples, *(["format"] if self.has_form else []), "length", "truncated"]

    def values(self, metric: str) -> np.ndarray:
        """Return a metric of every question, in their order.

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
                f"format is the share of answers with the form that a grader asks for, and {self.grader!r} cannot tell "
                "the form of an answer. Use exact, last_number, choice, math or regex:PATTERN."
            )
        answers = (self.sampled or [[] for _ in self.greedy]) if of_samples else [[answer] for answer in self.greedy]
        return np.array([metric_of(metric, each, self.has_form) for each in answers], dtype=float)

    def graded_values(self, metric: str) -> np.ndarray:
        """Return `values` with NaN where the grader failed: a lower bound less another one is no bound."""
        found = self.values(metric)
        found[self.ungraded] = np.nan
        return found

    def estimate(self, metric: str) -> Estimate:
        """Return a metric's mean over questions with its 95 % interval."""
        return estimate(self.values(metric), is_share=meaning_of(metric).is_share)

    # ---- files and pairs ---------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> EvaluationResult:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is something else, or damaged.
        """
        try:
            stored: dict[str, Any] = json.loads(path.read_text("utf-8"))
            answers = [Answer(**answer) for answer in stored.pop("greedy")]
            sampled = [[Answer(**answer) for answer in each] for each in stored.pop("sampled")]
            return cls(greedy=answers, sampled=sampled, **stored)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} holds no evaluation ({type(error).__name__}: {error}). It was written by something else, or "
                "damaged. Make it again: `opsd eval MODEL … --output FILE.json`."
            ) from error

    def in_order_of(self, other: EvaluationResult) -> EvaluationResult:
        """Return this result with its questions in another's order, so that the two can be paired.

        Raises:
            DataError: other questions, another grader, or answers cut at another length.
        """
        sampled = bool(self.sampled and other.sampled)
        for what, mine, its in (
            ("grader", self.grader, other.grader),
            ("max_new_tokens", self.max_new_tokens, other.max_new_tokens),
            ("temperature", self.temperature, other.temperature if sampled else self.temperature),
        ):
            if mine != its:
                raise DataError(
                    f"two results can be compared only under one {what}, and these have {its!r} and {mine!r}. The "
                    "difference would be the measure's. Evaluate both alike."
                )
        order = _matched(other.questions, self.questions)
        pick = [self.sampled[i] for i in order] if self.sampled else []
        return replace(self, questions=list(other.questions), greedy=[self.greedy[i] for i in order], sampled=pick)


def _matched(wanted: Sequence[str], have: Sequence[str]) -> list[int]:
    """Return for each wanted question where it is among those that there are; one asked twice is matched in order."""
    places: dict[str, list[int]] = {}
    for place, question in enumerate(have):
        places.setdefault(question, []).append(place)
    left = {question: iter(found) for question, found in places.items()}
    order = [next(left.get(question, iter(())), None) for question in wanted]
    if None in order or len(wanted) != len(have):
        both = len(set(wanted) & set(have))
        missing = [question for question, place in zip(wanted, order, strict=True) if place is None]
        raise DataError(
            f"a paired comparison needs the same questions on both sides; of {len(wanted)} and {len(have)} only "
            f"{both} are in both{name_few(missing)}. Between different questions a difference is theirs as much as "
            "the models'. Evaluate both on one split."
        )
    return [place for place in order if place is not None]
