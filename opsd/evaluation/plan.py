"""What a run is asked beside its training, and the rule that picks its checkpoint: declared before step 1.

A rule that is chosen after the curves were seen picks noise: on 30 questions the best of ten checkpoints gains a few
points over the last by chance alone. Knows rows and settings; nothing of models or training.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from datasets import Dataset

from opsd.data.files import load_rows
from opsd.data.rows import prepare_rows
from opsd.errors import ConfigError, DataError, OPSDError, OPSDWarning, as_count, as_number, did_you_mean, not_one_of
from opsd.evaluation.graders import Grader, load_grader
from opsd.evaluation.questions import check_disjoint, question_of

METRIC = "eval_accuracy"  # what a look at the selection split is logged as
RULES = {
    "last": "the last step's",
    "best": "the best on the selection split",
}
# Columns whose text is a solution that student and teacher can be asked the likelihood of, the fullest first.
TRACES = ("completion", "solution", "demonstration")
PROBED = 16  # rows of a split that are graded before training


@dataclass(frozen=True)
class Questions:
    """A split with its grader.

    Args:
        rows: prepared rows.
        grader: tells right answers from wrong ones.
    """

    rows: Dataset
    grader: Grader


@dataclass(frozen=True)
class EvaluationPlan:
    """What is measured of a run.

    Rows are a Dataset, a list of rows, or the name of a file, a folder or a hub id.

    Args:
        test: questions that neither train nor choose anything.
        grader: see `opsd.evaluation.load_grader`.
        answer_column: what the grader compares with.
        selection: other questions, looked at every `every` steps.
        every: steps between two looks at `selection`.
        rule: which checkpoint the run ends with: "last", or "best" on `selection`.
        retention: {name: {rows: …, grader: …}}: what must not get worse.
        neutral: prompts of no task, on whose continuations by the model as it was the student's drift is measured.
        samples: sampled answers per question beside the greedy one.
        temperature: of these.
        max_new_tokens: longest answer, in tokens; None is the run's `max_completion_length`.
        batch_size: answers per forward pass.
        seed: of the sampling.

    Raises:
        ConfigError: settings that cannot work together.
        DataError: rows that cannot be used, or splits that share questions.
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

    @classmethod
    def parse(cls, value: EvaluationPlan | Mapping[str, Any] | None) -> EvaluationPlan | None:
        """Read what a user gave: a plan, a mapping of its arguments, or None.

        Raises:
            ConfigError: an unknown key (nearest named), or one that is missing.
        """
        if value is None or isinstance(value, EvaluationPlan):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"evaluation is a mapping such as {{test: test.jsonl, grader: last_number}}, and not {value!r:.80}."
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
                    f"evaluation needs {key!r}: a figure means nothing without its questions and its grader. Add it: "
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
                "evaluation looks at `selection` every `every` steps, and only one of the two is given. The test split "
                "is not looked at while a run goes on: whoever watches it chooses by it. Give both, or neither."
            )
        if self.rule == "best" and self.selection is None:
            raise ConfigError(
                "rule 'best' picks a checkpoint on the split `selection`, and there is none. Picked on the test split, "
                "a gain is partly luck. Add selection: and every:, or take rule: last."
            )
        if not as_number("temperature", self.temperature) > 0:
            raise ConfigError(f"temperature divides logits, so it must be above 0, and is {self.temperature}.")
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 0:
            raise ConfigError(f"samples counts sampled answers per question, and is {self.samples!r}.")

    def loaded(self, train: Any = None, ready: Callable[[Any, str], Any] | None = None) -> EvaluationPlan:
        """Return the plan with its rows read, prepared, and checked against each other and the training rows.

        Args:
            train: prepared training rows; a stream is not looked through.
            ready: (rows, name) -> prepared rows, where a run does more with them than `prepare_rows`.

        Raises:
            DataError: as the class.
        """

        def read(name: str, given: Any) -> Any:
            return (
                None
                if given is None
                else _read(name, given, ready or (lambda rows, name: prepare_rows(rows, name=name)))
            )

        plan = replace(
            self,
            test=read("test", self.test),
            selection=read("selection", self.selection),
            retention={name: self._retained(name, given, read) for name, given in self.retention.items()},
            neutral=read("neutral", self.neutral),
        )
        known = {} if not isinstance(train, Dataset) else {"train": train}
        check_disjoint(known | {name: questions.rows for name, questions in plan.splits.items()})
        for name, questions in plan.splits.items():
            _check_gradable(name, questions)
            _warn_of_repeats(name, questions)
        return plan

    def _retained(self, name: str, given: Any, read: Callable[[str, Any], Any]) -> Mapping[str, Any]:
        if not isinstance(given, Mapping) or not {"rows", "grader"} >= set(given) or "rows" not in given:
            raise ConfigError(
                f"retention {name!r} is a mapping {{rows: FILE, grader: NAME}}, and not {given!r:.80}. Without rows "
                "nothing could be seen to get worse."
            )
        return {"rows": read(name, given["rows"]), "grader": given.get("grader", self.grader)}

    @cached_property
    def splits(self) -> dict[str, Questions]:
        """Every split that is graded, by name; of a plan that is loaded."""
        judge = load_grader(self.grader, self.answer_column)
        found = {"test": Questions(self.test, judge)}
        if self.selection is not None:
            found["selection"] = Questions(self.selection, judge)
        for name, given in self.retention.items():
            found[f"retention {name}"] = Questions(given["rows"], load_grader(given["grader"], self.answer_column))
        return found

    def describe(self) -> str:
        """What is declared."""
        chosen = f"checkpoint: {RULES[self.rule]}"
        looked = f"; selection: {len(self.selection)} questions every {self.every} steps" if self.every else ""
        kept = f"; retention: {', '.join(self.retention)}" if self.retention else ""
        more = f", {self.samples} samples at temperature {self.temperature:g}" if self.samples else ""
        return f"test: {len(self.test)} questions, greedy{more}, grader {self.grader}; {chosen}{looked}{kept}"


def _read(name: str, given: Any, ready: Callable[[Any, str], Any]) -> Dataset:
    if isinstance(given, str):
        given = load_rows(given)
    elif isinstance(given, Sequence):
        given = Dataset.from_list(list(given))
    rows = ready(given, name)
    if not isinstance(rows, Dataset):
        raise DataError(f"the split {name!r} of an evaluation is a stream; its questions are asked more than once.")
    if len(rows) == 0:
        raise DataError(f"the split {name!r} of an evaluation has no rows.\nAn accuracy of no rows is not 0. Fill it.")
    return rows


def _check_gradable(name: str, questions: Questions) -> None:
    """Refuse a split that cannot be graded at all, which would show when training is over."""
    failed: OPSDError | None = None
    for row in questions.rows.select(range(min(PROBED, len(questions.rows)))):
        try:
            questions.grader("", row)
            return
        except OPSDError as error:
            failed = error
        except Exception:  # of a function of the user's, which may not like an empty text
            return
    raise DataError(f"the first rows of the split {name!r} cannot be graded, none of {PROBED}: {failed}") from failed


def _warn_of_repeats(name: str, questions: Questions) -> None:
    repeated = len(questions.rows) - len(set(map(question_of, questions.rows)))
    if repeated:
        warnings.warn(
            f"the split {name!r} asks {repeated} of its {len(questions.rows)} questions again. Answers to one question "
            "say the same twice, and intervals over questions come out too narrow. Ask each once.",
            OPSDWarning,
            stacklevel=2,
        )
