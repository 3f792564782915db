"""Reward functions: one number for a whole rollout, and the verifier's feedback on it.

Any function with TRL's signature works, and every grader of `opsd eval` by its name. Knows functions, rows and texts;
nothing of groups, teachers or losses.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from opsd.data.needs import Need
from opsd.data.values import text_of
from opsd.errors import ConfigError, DataError, OPSDWarning
from opsd.evaluation.graders import REASONING_GYM, answer_need, is_function_name, load_grader, reasoning_gym_scorer
from opsd.rollouts import Ids
from opsd.sources import import_object

Row: TypeAlias = Mapping[str, Any]
RewardFunc: TypeAlias = Callable[..., Sequence[float | None]]
FEEDBACK = "feedback"  # what a reward function calls the column that it gives to `log_extra`
UNKNOWN = float("nan")
MAJORITY = "majority:"
LEAST_MAJORITY = 0.5  # share of a group; below it the most frequent answer is one of many
PASSED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")  # beside columns
NOT_COLUMNS = ("prompt", "completion", "completion_ids")  # passed by their plural names


def load_reward(value: RewardFunc | str) -> RewardFunc:
    """Return the reward function that `value` means.

    Args:
        value: a function with TRL's signature; a grader's name ("last_number", "regex:PATTERN"), whose verdict is a
            reward of 1 or 0; "reasoning_gym:DATASET", that dataset's own score between 0 and 1; "majority:GRADER", 1
            for rollouts with the answer of most rollouts of their prompt; or "module:function", a function with TRL's
            signature.

    Raises:
        ConfigError: nothing has that name, or it is not a plain function.
    """
    if isinstance(value, str):
        if value.startswith(MAJORITY):
            return _MajorityReward(value)
        if is_function_name(value):
            return load_reward(import_object(value, "reward function"))
        return _GraderReward(value)
    is_plain = callable(value) and not hasattr(value, "parameters")
    if not is_plain or any(map(inspect.iscoroutinefunction, (value, type(value).__call__))):
        raise ConfigError(
            f"a reward function is a plain function (prompts, completions, completion_ids, **columns) -> rewards, and "
            f"this is a {type(value).__name__}. opsd calls neither reward models nor async functions: wrap it in a "
            "plain function."
        )
    return value


class _GraderReward:
    """A grader as a reward function: 1 for a right answer, 0 for a wrong one, None where it failed."""

    def __init__(self, name: str):
        self.__name__ = name
        self.column = "answer"
        self._score: Callable[[str, Row], float]
        if name.startswith(REASONING_GYM):
            self._score = reasoning_gym_scorer(name.removeprefix(REASONING_GYM))
        else:
            self._score = load_grader(name)

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        texts = [completion_text(completion) for completion in completions]
        keys = [key for key, values in columns.items() if isinstance(values, list) and len(values) == len(texts)]
        rows = [{key: columns[key][number] for key in keys} for number in range(len(texts))]
        return [self._reward(text, row) for text, row in zip(texts, rows, strict=True)]

    def _reward(self, text: str, row: Row) -> float | None:
        try:
            return float(self._score(text, row))
        except Exception as error:
            warnings.warn(
                f"the grader {self.__name__!r} failed on a rollout ({type(error).__name__}: {error}). The rollout gets "
                "no reward from it, and counts as neither right nor wrong. Fix such rows, or use another grader.",
                OPSDWarning,
                stacklevel=2,
            )
            return None


class _MajorityReward:
    """Whether a rollout has the answer that most rollouts of its prompt have (U-OPSD, arXiv 2608.06296; TTRL).

    Needs no right answers. With a context that reads `sibling`, the teacher sees a rollout with that answer.
    """

    def __init__(self, name: str):
        self.__name__ = name
        grader = load_grader(name.removeprefix(MAJORITY))
        if grader.read is None:
            raise ConfigError(
                f"reward function {name!r} counts equal answers, and the grader {grader.name!r} reads no answer from a "
                "text. Use last_number, exact, choice, or a regex."
            )
        self._read = grader.answer

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        answers = [self._read(completion_text(completion)) for completion in completions]
        return [self._reward(number, prompts, answers) for number in range(len(answers))]

    def _reward(self, number: int, prompts: Sequence[Any], answers: Sequence[str | None]) -> float | None:
        group = [answer for prompt, answer in zip(prompts, answers, strict=True) if prompt == prompts[number]]
        known = Counter(answer for answer in group if answer is not None)
        if not known or max(known.values()) < LEAST_MAJORITY * len(group) or len(group) < 2:
            return None  # no majority: nothing is known of this group
        (answer, count), *rest = known.most_common(2)
        if rest and rest[0][1] == count:
            return None
        return float(answers[number] == answer)


def completion_text(completion: Any) -> str:
    """Return the text of a completion as TRL passes it: text, or messages."""
    if isinstance(completion, str):
        return completion
    return text_of(completion[-1]) if completion else ""


@dataclass(frozen=True)
class Verdicts:
    """Rewards and feedback of some rollouts.

    >>> rewards = Rewards.parse("last_number", None)
    >>> rewards([{"prompt": "1 + 1?", "answer": "2"}], ["It is 2."], [[5, 6]], state=None).rewards
    [1.0]

    Args:
        rewards: the weighted sum per rollout; NaN where no function gave one.
        feedback: the verifier's text on each, or None.
        values: each function's reward per rollout by name, NaN where it gave none, and what functions gave to
            `log_metric`, the same for all.
    """

    rewards: Sequence[float]
    feedback: Sequence[str | None]
    values: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Rewards:
    """The reward functions of a run.

    >>> Rewards.parse(["last_number", my_function], [1.0, 0.5]).describe()
    'last_number, 0.5 × my_function'

    Args:
        functions: called in order.
        weights: of each in the sum.

    Raises:
        ConfigError: another number of weights than of functions.
    """

    functions: Sequence[RewardFunc]
    weights: Sequence[float]

    @classmethod
    def parse(cls, functions: Any, weights: Sequence[float] | None) -> Rewards:
        """Return the reward functions that a user passed: one function, a name, a list of either, or None."""
        given = [] if functions is None else functions if isinstance(functions, list | tuple) else [functions]
        loaded = [load_reward(each) for each in given]
        if weights is not None and len(weights) != len(loaded):
            raise ConfigError(
                f"reward_weights has {len(weights)} weight(s) for {len(loaded)} reward function(s). Each function "
                "needs one, in the same order; leave it out for all 1."
            )
        return cls(loaded, list(weights or [1.0] * len(loaded)))

    @property
    def names(self) -> list[str]:
        """The names of the functions in logs and checkpoints; equal names are numbered."""
        given = [getattr(each, "__name__", type(each).__name__) for each in self.functions]
        return [name if given.count(name) == 1 else f"{name}/{number}" for number, name in enumerate(given)]

    def describe(self) -> str:
        """The functions, each with its weight where that is not 1."""
        weighed = zip(self.names, self.weights, strict=True)
        return ", ".join(name if weight == 1.0 else f"{weight:g} × {name}" for name, weight in weighed)

    @property
    def needs(self) -> list[Need]:
        """The columns that functions read; a row that leaves a grader's empty has no reward."""
        needs = [answer_need(each.__name__, each.column) for each in self.functions if isinstance(each, _GraderReward)]
        for function, name in zip(self.functions, self.names, strict=True):
            wanted = [each.name for each in _parameters(function) if each.default is each.empty]
            needs += [
                Need(
                    (column,), f"reward function {name!r}", "It is called with the rows' columns by name.",
                    f"give its parameter {column} a default", may_be_empty=True,
                )
                for column in wanted if column not in PASSED
            ]  # fmt: skip
        return needs

    def __call__(
        self, rows: Sequence[Row], completions: Sequence[Any], completion_ids: Sequence[Ids], state: Any
    ) -> Verdicts:
        """Call every function on all rollouts.

        Args:
            rows: their dataset rows.
            completions: texts, or lists with an assistant message where prompts are messages.
            completion_ids: their ids.
            state: transformers' TrainerState.

        Raises:
            DataError: a function returned another number of rewards than it got rollouts.
        """
        keys = {key for row in rows for key in row} - set(NOT_COLUMNS)
        extra: dict[str, list[Any]] = {}
        logged: dict[str, Sequence[float]] = {}
        columns = {
            **{key: [row.get(key) for row in rows] for key in keys},
            "trainer_state": state,
            "log_extra": lambda name, values: extra.__setitem__(name, list(values)),
            "log_metric": lambda name, value: logged.__setitem__(name, [float(value)] * len(rows)),
        }
        prompts = [row["prompt"] for row in rows]
        totals, known = [0.0] * len(rows), [False] * len(rows)
        for function, name, weight in zip(self.functions, self.names, self.weights, strict=True):
            asked = {**columns, "prompts": prompts, "completions": completions, "completion_ids": completion_ids}
            values = _as_rewards(function(**_accepted(function, asked)), name, len(rows))
            for number, value in enumerate(values):
                if not math.isnan(value):
                    totals[number] += weight * value
                    known[number] = True
            logged[f"rewards/{name}"] = values
        rewards = [total if is_known else UNKNOWN for total, is_known in zip(totals, known, strict=True)]
        feedback = extra.get(FEEDBACK, [None] * len(rows))
        if len(feedback) != len(rows):
            raise DataError(
                f"log_extra('feedback', …) got {len(feedback)} texts for {len(rows)} rollouts. Pass one for each, in "
                "order (None where there is none)."
            )
        return Verdicts(rewards, feedback, logged)


def _parameters(function: RewardFunc) -> list[inspect.Parameter]:
    """Return the parameters that a function names; of one that cannot be looked into, none."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some built-in ones
        return []
    return [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]


def _accepted(function: RewardFunc, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a function takes: everything if it has **kwargs, as TRL's have, and else what it names."""
    names = [each.name for each in _parameters(function)]
    kinds = [each.kind for each in inspect.signature(function).parameters.values()] if names else []
    takes_all = not names or inspect.Parameter.VAR_KEYWORD in kinds
    return values if takes_all else {name: values[name] for name in names if name in values}


def _as_rewards(returned: Any, name: str, count: int) -> list[float]:
    """Return the values of a function as one finite number for each rollout, NaN for None.

    Raises:
        DataError: the function returned something else.
    """
    rule = f"It must return one finite number for each of {count} rollouts, in order (None where it has none)."
    try:
        values = [UNKNOWN if value is None else float(value) for value in returned]
    except (TypeError, ValueError) as error:
        raise DataError(f"reward function {name!r} returned {returned!r:.80}. {rule}") from error
    if len(values) != count:
        raise DataError(f"reward function {name!r} returned {len(values)} rewards. {rule}")
    if any(map(math.isinf, values)):
        raise DataError(f"reward function {name!r} returned an infinite reward. {rule}")
    return values
