"""Settings that change with the step: a mapping of steps to values, each in force from its step on.

Knows settings and the trainer that samples; nothing of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opsd.errors import ConfigError
from opsd.training.averages import Tally
from opsd.training.metrics import COMPLETIONS


@dataclass(frozen=True)
class StepSchedule:
    """A number that changes at given optimizer steps.

    Args:
        values: the value that holds from each step on; the first step is 0.

    Example:
        >>> schedule = StepSchedule.parse("lmbda_schedule", {0: 0.0, 8: 1.0})
        >>> schedule.at(7), schedule.at(8)
        (0.0, 1.0)
    """

    values: Mapping[int, float]

    @classmethod
    def parse(cls, name: str, value: Any) -> StepSchedule:
        """Return a schedule from a mapping.

        Args:
            name: of the setting, for errors.
            value: {step: value}; steps may be text, as JSON writes them.

        Raises:
            ConfigError: not a mapping of steps to numbers, or one that does not begin at step 0.
        """
        try:
            values = dict(sorted((int(step), float(number)) for step, number in value.items()))
        except (AttributeError, TypeError, ValueError):
            raise ConfigError(
                f"{name} must be a mapping of steps to values, and is {value!r:.80}. Each value holds from its step "
                f"on. Write {name}: {{0: …, 8: …}}."
            ) from None
        if not values or min(values) != 0:
            raise ConfigError(
                f"{name} must begin at step 0, and is {value!r:.80}. Before its first step there would be no value. "
                "Add a value for 0."
            )
        return cls(values)

    def at(self, step: int) -> float:
        """Return the value at a step, counted from 0."""
        return self.values[max(begin for begin in self.values if begin <= step)]

    @property
    def least(self) -> float:
        """The smallest value."""
        return min(self.values.values())

    @property
    def most(self) -> float:
        """The largest value."""
        return max(self.values.values())

    @property
    def last(self) -> float:
        """The value at the end of training."""
        return self.values[max(self.values)]

    def describe(self) -> str:
        """Return the schedule in words: `0 from step 0, 1 from step 8`."""
        return ", ".join(f"{value:g} from step {step}" for step, value in self.values.items())


def own_rows(trainer: Any, rows: int) -> int:
    """Return how many of a batch's rows the student samples itself: all of them in an evaluation."""
    step = trainer.state.global_step
    return on_policy_rows(rows, trainer.args.on_policy_share.at(step), step) if trainer.model.training else rows


def on_policy_rows(rows: int, lmbda: float, step: int) -> int:
    """Return how many of a step's rows are on-policy: the same on every process, λ·rows on average.

    floor(λ·rows·(step+1)) - floor(λ·rows·step): the carry of earlier steps without a counter, so a resume needs none.

    Args:
        rows: rows of one process.
        lmbda: the share.
        step: steps done.
    """
    share = lmbda * rows
    return int(share * (step + 1) + 1e-9) - int(share * step + 1e-9)


def set_longest(trainer: Any) -> int:
    """Set the length at which the trainer's rollouts are cut, and return it; evaluations take the whole length."""
    args = trainer.args
    longest = int(args.completion_length.at(trainer.state.global_step))
    if not trainer.model.training:
        longest = args.max_completion_length
    trainer.generation_config.max_new_tokens = longest
    if trainer.use_vllm:
        trainer.vllm_generation.max_completion_length = longest
    return longest


def scheduled(trainer: Any) -> dict[str, Tally]:
    """Return the values that schedules give to a training step, to be logged; nothing without schedules."""
    args, step = trainer.args, trainer.state.global_step
    if not trainer.model.training:
        return {}
    tallies = {}
    if args.lmbda_schedule is not None:
        tallies["lmbda"] = Tally(args.on_policy_share.at(step), 1)
    if args.completion_length_schedule is not None:
        tallies[f"{COMPLETIONS}limit"] = Tally(args.completion_length.at(step), 1)
    return tallies
