"""Groups of rollouts of one prompt: rewards, the context fields a group provides, which rollouts are distilled.

SDPO (arXiv 2601.20802) puts a correct rollout of the same group, or a verifier's feedback, into the teacher's prompt;
SRPO (arXiv 2604.02288) does so for wrong rollouts and reinforces right ones (GRPO, arXiv 2402.03300). Knows rollouts
and rewards; nothing of models or losses.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from statistics import fmean, stdev
from typing import Any

from opsd.contexts.base import ROLLOUT_FIELDS
from opsd.contexts.filters import strip_thinking
from opsd.data.values import is_empty
from opsd.errors import ConfigError, not_one_of
from opsd.rollouts import Ids, Rollouts
from opsd.training.rewards import Rewards, Verdicts

DISTILL_ON = {
    "all": "every rollout is distilled",
    "wrong": "rollouts below success_reward are distilled",
    "right": "rollouts at or above success_reward are distilled",
}
SIBLING_CHOICES = ("first", "random")
GRPO_ON = {"all": "every rollout", "undistilled": "rollouts that are not distilled"}
# Values of rollout fields in prompts that are rendered before training.
PLACEHOLDERS = {**{name: f"(the {name}, from training)" for name in ROLLOUT_FIELDS}, "pass_rate": 0.0}
STD_EPSILON = 1e-4  # as in TRL's GRPOTrainer; a group of equal rewards has no advantage anyway

Decode = Callable[[Sequence[Ids]], Sequence[str]]
Answers = Callable[[Sequence[Mapping[str, Any]]], Sequence[Ids]]
HasFields = Callable[[Mapping[str, Any], Mapping[str, Any]], bool]


def placeholders(names: Iterable[str], row: Mapping[str, Any]) -> dict[str, Any]:
    """Return placeholders of rollout fields, for a row's prompt that is rendered before training."""
    return {name: PLACEHOLDERS[name] for name in names if name != "pass_rate" or is_empty(row.get(name))}


@dataclass(kw_only=True)
class GroupSettings:
    """Settings of an OPSDConfig about groups of rollouts and their rewards.

    Example:
        >>> OPSDConfig("runs/srpo", num_generations=8, distill_on="wrong", grpo_coef=1.0, grpo_on="undistilled")
    """

    num_generations: int = field(
        default=1,
        metadata={
            "help": "Rollouts per prompt (SDPO: 8). Batch per device × accumulation steps counts rollouts, and must be "
            "a multiple of it."
        },
    )
    success_reward: float = field(
        default=1.0,
        metadata={
            "help": "Smallest reward of a right rollout; its text may be put into the teacher's prompt for other "
            "rollouts of its group (SDPO, arXiv 2601.20802)."
        },
    )
    distill_on: str = field(
        default="all",
        metadata={"help": "Rollouts that are distilled: all, wrong (SRPO, arXiv 2604.02288), or right."},
    )
    sibling_choice: str = field(
        default="first",
        metadata={
            "help": "Right rollout of the group that the teacher sees: first (SDPO), or random, so that the rollouts "
            "of a group learn from different ones."
        },
    )
    teacher_lead: float | None = field(
        default=None,
        metadata={
            "help": "Reward by which the teacher's own answer must beat the mean of the student's rollouts for a "
            "prompt to be distilled (SKALD, arXiv 2608.09826). 0: any lead. The teacher samples one answer per prompt, "
            "which the reward functions grade. Unset: every prompt."
        },
    )
    grpo_coef: float = field(
        default=0.0,
        metadata={
            "help": "Weight of a policy gradient on group-relative rewards beside the divergence (GRPO, arXiv "
            "2402.03300), at least 0."
        },
    )
    grpo_on: str = field(
        default="all",
        metadata={"help": "Rollouts that the GRPO term reinforces: all, or undistilled (SRPO)."},
    )

    def check_groups(self) -> None:
        """Refuse settings that are out of range.

        Raises:
            ConfigError: names the setting.
        """
        choices = {"distill_on": DISTILL_ON, "grpo_on": GRPO_ON, "sibling_choice": SIBLING_CHOICES}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(not_one_of(name, getattr(self, name), known))
        if not self.grpo_coef >= 0:
            raise ConfigError(
                f"grpo_coef must not be negative, and is {self.grpo_coef}: it would punish rollouts for high rewards. "
                "Use 0 for no such term."
            )
        if self.grpo_coef > 0 and self.num_generations < 2:
            raise ConfigError(
                f"grpo_coef is {self.grpo_coef:g} and num_generations is {self.num_generations}. GRPO compares a "
                "rollout with its group, and alone it has no advantage. Set num_generations to 2 at least; 8 is usual."
            )


@dataclass
class Groups(GroupSettings):
    """Grades groups of rollouts; the fields are those of `GroupSettings` by keyword, after the rewards.

    Args:
        rewards: the reward functions; without any, rollouts stay as they are.

    Raises:
        ConfigError: settings that cannot work together.

    Example:
        >>> groups = Groups(Rewards.parse("last_number", None), num_generations=8, distill_on="wrong")
        >>> groups.describe()
        '8 rollouts per prompt, rewarded by last_number; rollouts below success_reward are distilled (success from 1)'
    """

    rewards: Rewards

    @classmethod
    def from_config(cls, args: Any, reward_funcs: Any) -> Groups:
        """Read the settings of an OPSDConfig.

        Args:
            args: the settings.
            reward_funcs: reward functions or graders' names, as OPSDTrainer takes them.
        """
        settings = {f.name: getattr(args, f.name) for f in fields(GroupSettings)}
        return cls(Rewards.parse(reward_funcs, args.reward_weights), **settings)

    def __post_init__(self) -> None:
        self.check_groups()
        graded = self.distill_on != "all" or self.grpo_coef > 0 or self.teacher_lead is not None
        if graded and not self.rewards.functions:
            raise ConfigError(
                f"distill_on {self.distill_on!r}, grpo_coef {self.grpo_coef:g} and teacher_lead {self.teacher_lead} "
                "need to know which answers are right, and there is no reward function. Pass reward_funcs=, such as "
                "'last_number' or a function with TRL's signature."
            )

    @property
    def rollout_fields(self) -> tuple[str, ...]:
        """The fields that contexts may read beside the columns: those that rollouts of a group provide."""
        return ROLLOUT_FIELDS if self.rewards.functions else ()

    def describe(self) -> str:
        """Name rollouts per prompt, rewards, and which rollouts are distilled or reinforced."""
        text = f"{self.num_generations} rollout{'s' if self.num_generations > 1 else ''} per prompt"
        if not self.rewards.functions:
            return text
        text += f", rewarded by {self.rewards.describe()}; {DISTILL_ON[self.distill_on]}"
        text += f" (success from {self.success_reward:g})"
        if self.teacher_lead is not None:
            text += f"; only prompts on which the teacher's own answer leads by more than {self.teacher_lead:g}"
        return text + (f"; + {self.grpo_coef:g}·GRPO on {GRPO_ON[self.grpo_on]}" if self.grpo_coef else "")

    def grade(
        self, rollouts: Rollouts, decode: Decode, has_fields: HasFields, state: Any, answer: Answers | None = None
    ) -> tuple[Rollouts, dict[str, Sequence[float]]]:
        """Return the rollouts with their fields, weights and advantages, and what is logged of each, NaN if unknown.

        Rows that are neither distilled nor reinforced have no scored token left: they are not counted in the loss.

        Args:
            rollouts: whole groups, one after the other; in evaluation each row once, which then is its own group.
            decode: token ids of some completions -> their texts; not called without reward functions.
            has_fields: (row, rollout fields) -> whether a teacher's context has anything to show.
            state: transformers' TrainerState.
            answer: rows -> the teacher's sampled answers; called with `teacher_lead` only.
        """
        if not self.rewards.functions:
            return rollouts, {}
        texts = decode(rollouts.completion_ids)
        verdicts = self.verdicts(rollouts.rows, texts, rollouts.completion_ids, state)
        right = [reward >= self.success_reward for reward in verdicts.rewards]
        wrong = [reward < self.success_reward for reward in verdicts.rewards]  # NaN is neither
        groups = self._groups(rollouts.rows)
        rollout_fields = [
            {
                **self._fields(number, self._sibling(number, group, texts, right, state), texts, verdicts.feedback),
                # a rate that was measured before training is the better one
                **({} if not is_empty(row.get("pass_rate")) else {"pass_rate": fmean(right[other] for other in group)}),
            }
            for number, (group, row) in enumerate(zip(groups, rollouts.rows, strict=True))
        ]
        selected = {"all": [True] * len(rollouts), "wrong": wrong, "right": right}[self.distill_on]
        leads = self._leads(verdicts.rewards, groups, rollouts.rows, decode, state, answer)
        if leads:
            selected = [c and not withheld for c, withheld in zip(selected, leads["lead/withheld"], strict=True)]
        has_context = [has_fields(row, fields) for row, fields in zip(rollouts.rows, rollout_fields, strict=True)]
        is_distilled = [chosen and has for chosen, has in zip(selected, has_context, strict=True)]
        advantages = self._advantages(verdicts.rewards, groups, is_distilled)
        unused = [not d and not a for d, a in zip(is_distilled, advantages, strict=True)]
        graded = replace(
            rollouts.mask_rows(unused),
            rollout_fields=rollout_fields,
            distill_weight=[float(d) for d in is_distilled],
            advantages=advantages,
            rewards=verdicts.rewards,
        )
        return graded, {
            **verdicts.values,
            **leads,
            "reward": verdicts.rewards,
            "group/right": right,
            "group/distilled": is_distilled,
            "group/without_context": [c and not has for c, has in zip(selected, has_context, strict=True)],
            "group/unused": unused,
            "group/flat": [len(set(_known(verdicts.rewards, group))) <= 1 for group in groups],
        }

    def verdicts(
        self, rows: Sequence[Mapping[str, Any]], texts: Sequence[str], completion_ids: Sequence[Ids], state: Any
    ) -> Verdicts:
        """Call the reward functions, with texts where prompts are text, else with an assistant's turn.

        Args:
            rows: dataset rows.
            texts: their completions.
            completion_ids: the same as ids.
            state: transformers' TrainerState.
        """
        chats = [[{"role": "assistant", "content": text}] for text in texts]
        completions = texts if isinstance(rows[0]["prompt"], str) else chats
        return self.rewards(rows, completions, completion_ids, state)

    def _leads(
        self,
        rewards: Sequence[float],
        groups: Sequence[Sequence[int]],
        rows: Sequence[Mapping[str, Any]],
        decode: Decode,
        state: Any,
        answer: Answers | None,
    ) -> dict[str, list[float]]:
        """Return by rollout the reward of the teacher's own answer, and whether its lead is too small to distil."""
        if self.teacher_lead is None or answer is None:
            return {}
        firsts = [number for number, group in enumerate(groups) if group[0] == number]
        ids = answer([rows[number] for number in firsts])
        graded = self.verdicts([rows[number] for number in firsts], decode(ids), ids, state).rewards
        reward_of = dict(zip(firsts, graded, strict=True))
        teachers = [reward_of[group[0]] for group in groups]
        students = [fmean(known) if (known := _known(rewards, group)) else math.nan for group in groups]
        # NaN leads by nothing: what is not known is not verified.
        withheld = [float(not t - s > self.teacher_lead) for t, s in zip(teachers, students, strict=True)]
        return {"lead/teacher": teachers, "lead/withheld": withheld}

    def _groups(self, rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """Return the group of each rollout: those around it that have its prompt."""
        prompts = [row["prompt"] for row in rows]
        groups = []
        for number, prompt in enumerate(prompts):
            first = number - number % self.num_generations
            around = range(first, min(first + self.num_generations, len(rows)))
            groups.append([other for other in around if prompts[other] == prompt])
        return groups

    def _sibling(
        self, number: int, group: Sequence[int], texts: Sequence[str], right: Sequence[bool], state: Any
    ) -> int | None:
        """Return the right rollout of a group that the teacher of another one sees; None where there is none."""
        siblings = [other for other in group if right[other] and other != number]
        if not siblings:
            return None
        if self.sibling_choice == "first":
            return siblings[0]
        # By step and text: the same on every process, in every order of micro-batches, and in a resumed run.
        return random.Random(f"{state.global_step} {number - group[0]} {texts[number]}").choice(siblings)

    def _fields(
        self, number: int, sibling: int | None, texts: Sequence[str], feedback: Sequence[str | None]
    ) -> dict[str, Any]:
        fields = {"attempt": strip_thinking(texts[number]), "feedback": feedback[number]}
        fields["sibling"] = None if sibling is None else strip_thinking(texts[sibling])
        return {name: value for name, value in fields.items() if not is_empty(value)}

    def _advantages(
        self, rewards: Sequence[float], groups: Sequence[Sequence[int]], is_distilled: Sequence[bool]
    ) -> list[float]:
        """Return coef · (reward - the group's mean) / its deviation where the term applies, 0 elsewhere."""
        advantages = []
        for number, (reward, group) in enumerate(zip(rewards, groups, strict=True)):
            applies = self.grpo_coef > 0 and not (self.grpo_on == "undistilled" and is_distilled[number])
            known = _known(rewards, group)
            # The mean of equal rewards may miss them by a rounding, and their rows would not count as unused.
            if not applies or math.isnan(reward) or len(set(known)) <= 1:
                advantages.append(0.0)
            else:
                advantages.append(self.grpo_coef * (reward - fmean(known)) / (stdev(known) + STD_EPSILON))
        return advantages


def _known(rewards: Sequence[float], group: Sequence[int]) -> list[float]:
    return [rewards[number] for number in group if not math.isnan(rewards[number])]
