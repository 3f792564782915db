"""The evaluation plan of a run: splits, graders, and the rule that picks the checkpoint, declared before step 1.

A rule that is chosen after seeing the curves selects noise: on 30 questions the best of ten checkpoints is a few points
above the last by chance alone. Knows rows and settings; nothing of models or training.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from datasets import Dataset

from opsd.data.files import load_rows
from opsd.data.prepare import prepare_rows
from opsd.errors import ConfigError, DataError, OPSDError, OPSDWarning, did_you_mean, not_one_of
from opsd.evaluation.graders import Grader, load_grader
from opsd.evaluation.questions import check_disjoint, question_of
from opsd.settings import as_count, as_number

METRIC = "eval_accuracy"  # the logged name of the accuracy on the selection split
QUESTIONS = "eval_questions"  # and of its number of questions
P_VALUE = "eval_p_value"  # and of no change since the best look before, over the same questions
RULES = {
    "last": "the last step's",
    "best": "the best on the selection split",
}
# Columns with a solution whose likelihood under student and teacher is measured, the most complete first.
TRACES = ("completion", "solution", "demonstration")
PROBED = 16  # rows of a split that are graded before training


@dataclass(frozen=True)
class Questions:
    """A split with its grader.

    Args:
        rows: prepared rows.
        grader: tells right answers from wrong ones.

    Example:
        >>> rows = Dataset.from_list([{"prompt": "What is 12 + 7?", "answer": "19"}])
        >>> len(Questions(rows, load_grader("last_number")).rows)
        1
    """

    rows: Dataset
    grader: Grader


@dataclass(frozen=True)
class EvaluationPlan:
    """What a run measures before, during and after training.

    Rows are a Dataset, a list of rows, or the name of a file, a folder or a hub id.

    Args:
        test: held-out questions, used neither for training nor for choosing a checkpoint.
        grader: see `opsd.evaluation.load_grader`.
        answer_column: column with the right answer.
        selection: other questions, evaluated every `every` steps.
        every: steps between two evaluations of `selection`.
        rule: which checkpoint the run ends with: "last", or "best" on `selection`.
        retention: {name: {rows: …, grader: …}}: other tasks, whose accuracy must not fall.
        neutral: prompts unrelated to the task, for the student's drift: KL(before ‖ now) on the continuations that the
            student sampled before training.
        samples: sampled answers per question beside the greedy one.
        temperature: of the sampled answers.
        max_new_tokens: longest answer, in tokens; None is the run's `max_completion_length`.
        batch_size: answers per forward pass.
        seed: of the sampled answers.
        baselines: folder where runs keep what they measured before training, for runs with the same model, questions
            and settings; `opsd sweep` sets it.

    Raises:
        ConfigError: settings that cannot work together.
        DataError: unusable rows, or splits that share questions.

    Example:
        >>> EvaluationPlan(test="test.jsonl", grader="last_number", selection="dev.jsonl", every=10, rule="best").rule
        'best'
    """

    test: Any
    grader: str
    answer_column: str = "answer"
    selection: Any = None
    every: int | None = None
    rule: str = "last"
    retention: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    neutral: Any = None
    samples: int = 0
    temperature: float = 1.0
    max_new_tokens: int | None = None
    batch_size: int = 64
    seed: int = 0
    baselines: str | None = None

    @classmethod
    def parse(cls, value: EvaluationPlan | Mapping[str, Any] | None) -> EvaluationPlan | None:
        """Return a plan from a plan or a mapping of its arguments; None stays None.

        Raises:
            ConfigError: a key is unknown (the nearest is named) or missing.
        """
        if value is None or isinstance(value, EvaluationPlan):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"evaluation must be a mapping such as {{test: test.jsonl, grader: last_number}}, and is {value!r:.80}."
            )
        known = list(inspect.signature(cls).parameters)
        for key in value:
            if key not in known:
                raise ConfigError(
                    f"evaluation has no setting {key!r}.{did_you_mean(str(key), known)} It has: {', '.join(known)}."
                )
        for key in ("test", "grader"):
            if key not in value:
                raise ConfigError(
                    f"evaluation needs {key!r}: an accuracy depends on its questions and its grader. Add it: "
                    "{test: test.jsonl, grader: last_number}."
                )
        return cls(**value)

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ConfigError(not_one_of("rule", self.rule, RULES))
        for name in ("every", "max_new_tokens", "batch_size"):
            if getattr(self, name) is not None:
                as_count(name, getattr(self, name))
        if (self.selection is None) != (self.every is None):
            raise ConfigError(
                "evaluation needs `selection` and `every` together, and only one of them is given: the split "
                "`selection` is evaluated every `every` steps, the test split never during training. Give both, or "
                "neither."
            )
        if self.rule == "best" and self.selection is None:
            raise ConfigError(
                "rule 'best' picks a checkpoint on the split `selection`, and there is none. Picking on the test split "
                "would bias the gain. Add selection: and every:, or set rule: last."
            )
        if not as_number("temperature", self.temperature) > 0:
            raise ConfigError(f"temperature must be above 0, because it divides logits, and is {self.temperature}.")
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 0:
            raise ConfigError(f"samples must be a whole number of at least 0, and is {self.samples!r}.")

    def loaded(self, train: Iterable[str] = (), prepare: Callable[..., Any] = prepare_rows) -> EvaluationPlan:
        """Return the plan with its rows read, prepared, and checked against each other and the training rows.

        Args:
            train: the questions of the training rows (`question_of`); of a stream none.
            prepare: `opsd.data.prepare.prepare_rows`, or that with some arguments.

        Raises:
            DataError: unusable rows, or splits that share questions.
        """
        asked: dict[str, list[str]] = {"train": list(train)}

        def read(name: str, source: Any, grader: str) -> Any:
            questions = asked.setdefault(name, [])
            needs = load_grader(grader, self.answer_column).needs
            return _read(
                name, source, partial(prepare, needs=needs, each_row=lambda row: questions.append(question_of(row)))
            )

        plan = replace(
            self,
            test=read("test", self.test, self.grader),
            selection=None if self.selection is None else read("selection", self.selection, self.grader),
            retention={name: self._read_retention(name, split, read) for name, split in self.retention.items()},
            neutral=None if self.neutral is None else _read("neutral", self.neutral, prepare),
        )
        check_disjoint(asked)
        for name, questions in plan.splits.items():
            _check_gradable(name, questions)
            _warn_of_repeats(name, asked[name])
        return plan

    def _read_retention(self, name: str, split: Any, read: Callable[[str, Any, str], Any]) -> Mapping[str, Any]:
        if not isinstance(split, Mapping) or not {"rows", "grader"} >= set(split) or "rows" not in split:
            raise ConfigError(
                f"retention {name!r} must be a mapping {{rows: FILE, grader: NAME}} (grader is optional), and is "
                f"{split!r:.80}."
            )
        grader = split.get("grader", self.grader)
        return {"rows": read(f"retention {name}", split["rows"], grader), "grader": grader}

    @cached_property
    def splits(self) -> dict[str, Questions]:
        """Every split that is graded, by name; of a plan that is loaded."""
        grader = load_grader(self.grader, self.answer_column)
        splits = {"test": Questions(self.test, grader)}
        if self.selection is not None:
            splits["selection"] = Questions(self.selection, grader)
        for name, split in self.retention.items():
            splits[f"retention {name}"] = Questions(split["rows"], load_grader(split["grader"], self.answer_column))
        return splits

    def describe(self) -> str:
        """Return the plan in a line."""
        checkpoint = f"checkpoint: {RULES[self.rule]}"
        selection = f"; selection: {len(self.selection)} questions every {self.every} steps" if self.every else ""
        retention = f"; retention: {', '.join(self.retention)}" if self.retention else ""
        sampled = f", {self.samples} samples at temperature {self.temperature:g}" if self.samples else ""
        test = f"test: {len(self.test)} questions, greedy{sampled}, grader {self.grader}"
        return f"{test}; {checkpoint}{selection}{retention}"


def _read(name: str, source: Any, prepare: Callable[..., Any]) -> Dataset:
    if isinstance(source, str):
        source = load_rows(source)
    elif isinstance(source, Sequence):
        source = Dataset.from_list(list(source))
    rows = prepare(source, name=name)
    if not isinstance(rows, Dataset):
        raise DataError(
            f"the evaluation split {name!r} is a stream, and its questions are needed more than once. Give a dataset."
        )
    if len(rows) == 0:
        raise DataError(f"the evaluation split {name!r} has no rows. An accuracy over no rows is undefined.")
    return rows


def _check_gradable(name: str, questions: Questions) -> None:
    """Refuse, before training, a split that the grader cannot grade at all."""
    failed: OPSDError | None = None
    for row in questions.rows.select(range(min(PROBED, len(questions.rows)))):
        try:
            questions.grader("", row)
            return
        except OPSDError as error:
            failed = error
        except Exception:  # of a user's function, which may not accept an empty text
            return
    raise DataError(f"none of the first {PROBED} rows of the split {name!r} can be graded: {failed}") from failed


def _warn_of_repeats(name: str, questions: Sequence[str]) -> None:
    repeated = len(questions) - len(set(questions))
    if repeated:
        warnings.warn(
            f"the split {name!r} repeats {repeated} of its {len(questions)} questions. Repeated questions make "
            "intervals over questions too narrow. Keep each question once.",
            OPSDWarning,
            stacklevel=2,
        )
