"""Several rollouts of one prompt: what they earn, what the teacher may be shown of them, who learns how.

SDPO (arXiv 2601.20802) shows the teacher a correct rollout of the same group, or what the verifier said; SRPO
(arXiv 2604.02288) does so for wrong rollouts and reinforces right ones (GRPO, arXiv 2402.03300). Knows rollouts and
rewards; nothing of models or losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

from opsd.contexts.filters import PRODUCED, strip_thinking
from opsd.errors import ConfigError, not_one_of
from opsd.rollouts import Ids, Rollouts
from opsd.training.rewards import Rewards, Verdicts

DISTILL_ON = {
    "all": "every rollout is distilled",
    "wrong": "rollouts below success_reward are distilled",
    "right": "rollouts at or above success_reward are distilled",
}
GRPO_ON = {"all": "every rollout", "undistilled": "rollouts that are not distilled"}
# what stands for it in prompts that are rendered before training
PLACEHOLDERS = {**{name: f"(the {name}, made during training)" for name in PRODUCED}, "pass_rate": 0.0}
STD_EPSILON = 1e-4  # TRL's GRPOTrainer; a group that agrees has no advantage anyway


Decode = Callable[[Sequence[Ids]], Sequence[str]]
HasFields = Callable[[Mapping[str, Any], Mapping[str, Any]], bool]


def placeholders(names: Iterable[str], row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what stands for what training makes, in a row's prompt that is rendered before training."""
    return {name: PLACEHOLDERS[name] for name in names if name != "pass_rate" or name not in row}


@dataclass(frozen=True)
class Groups:
    """How rollouts are graded and routed.

    Args:
        rewards: the reward functions; none leaves rollouts as they are.
        size: rollouts per prompt.
        success_reward: from this reward on a rollout is right.
        distill_on: which rollouts are distilled, a key of DISTILL_ON.
        grpo_coef: weight of the GRPO term, 0 for none.
        grpo_on: which rollouts it reinforces, a key of GRPO_ON.

    Raises:
        ConfigError: settings that cannot work together.
    """

    rewards: Rewards
    size: int = 1
    success_reward: float = 1.0
    distill_on: str = "all"
    grpo_coef: float = 0.0
    grpo_on: str = "all"

    @classmethod
    def from_config(cls, args: Any, reward_funcs: Any) -> Groups:
        """Read the settings of an OPSDConfig."""
        return cls(
            Rewards.parse(reward_funcs, args.reward_weights),
            args.num_generations,
            args.success_reward,
            args.distill_on,
            args.grpo_coef,
            args.grpo_on,
        )

    def __post_init__(self) -> None:
        for name, known in (("distill_on", DISTILL_ON), ("grpo_on", GRPO_ON)):
            if getattr(self, name) not in known:
                raise ConfigError(not_one_of(name, getattr(self, name), known))
        if self.grpo_coef < 0:
            raise ConfigError(
                f"grpo_coef must not be negative, and is {self.grpo_coef}: it would punish what is right."
            )
        needs_rewards = self.distill_on != "all" or self.grpo_coef > 0
        if needs_rewards and not self.rewards.functions:
            raise ConfigError(
                f"distill_on {self.distill_on!r} and grpo_coef {self.grpo_coef:g} need to know which rollouts are "
                "right, and there is no reward function. Pass reward_funcs=, such as 'last_number' or a function with "
                "TRL's signature."
            )
        if self.grpo_coef > 0 and self.size < 2:
            raise ConfigError(
                "grpo_coef is set and num_generations is 1. GRPO compares a rollout with its group, and alone it has "
                "no advantage. Set num_generations to 2 at least; 8 is usual."
            )

    @property
    def rollout_fields(self) -> tuple[str, ...]:
        """The names that contexts may use beside the columns."""
        return PRODUCED if self.rewards.functions else ()

    def describe(self) -> str:
        """Who learns how, in words; a resumed run must do the same."""
        if not self.rewards.functions:
            return f"{self.size} rollouts per prompt" if self.size > 1 else "one rollout per prompt"
        said = (
            f"{self.size} rollout(s) per prompt, rewarded by {self.rewards.describe()}; {DISTILL_ON[self.distill_on]}"
        )
        said += f" (success from {self.success_reward:g})"
        return said + (f"; + {self.grpo_coef:g}·GRPO on {GRPO_ON[self.grpo_on]}" if self.grpo_coef else "")

    def grade(
        self, rollouts: Rollouts, decode: Decode, has_fields: HasFields, state: Any
    ) -> tuple[Rollouts, dict[str, float]]:
        """Return the rollouts with what they produced and how they learn, and what is logged.

        Rows that are neither distilled nor reinforced have no scored token left: they count nowhere.

        Args:
            rollouts: whole groups, one after the other; in evaluation each row once, which then is its own group.
            decode: gives the text of each of some completions; not asked where nobody reads it.
            can_show: whether a teacher has anything to be shown, given a row and what was produced for it.
            state: transformers' TrainerState.
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
                **self._produced(number, group, texts, right, verdicts.feedback[number]),
                # a rate that was measured before training is the better one
                **({} if "pass_rate" in row else {"pass_rate": fmean(right[other] for other in group)}),
            }
            for number, (group, row) in enumerate(zip(groups, rollouts.rows, strict=True))
        ]
        routed = {"all": [True] * len(rollouts), "wrong": wrong, "right": right}[self.distill_on]
        shown = [has_fields(row, made) for row, made in zip(rollouts.rows, rollout_fields, strict=True)]
        distill_weight = [chosen and can for chosen, can in zip(routed, shown, strict=True)]
        advantages = self._advantages(verdicts.rewards, groups, distill_weight)
        idle = [not d and not a for d, a in zip(distill_weight, advantages, strict=True)]
        known = [reward for reward in verdicts.rewards if not math.isnan(reward)]
        graded = replace(
            rollouts.mask_rows(idle),
            rollout_fields=rollout_fields,
            distill_weight=[float(d) for d in distill_weight],
            advantages=advantages,
        )
        return graded, {
            **verdicts.means,
            "reward": fmean(known) if known else math.nan,
            "group/right": fmean(right),
            "group/distilled": fmean(distill_weight),
            "group/without_context": fmean(c and not s for c, s in zip(routed, shown, strict=True)),
            "group/unused": fmean(idle),
            "group/flat": fmean(len(set(_known(verdicts.rewards, group))) <= 1 for group in groups),
        }

    def verdicts(
        self, rows: Sequence[Mapping[str, Any]], texts: Sequence[str], completion_ids: Sequence[Ids], state: Any
    ) -> Verdicts:
        """Ask the reward functions: about text where prompts are text, else about an assistant's turn.

        Args:
            rows: dataset rows.
            texts: their completions.
            completion_ids: the same as ids.
            state: transformers' TrainerState.
        """
        chats = [[{"role": "assistant", "content": text}] for text in texts]
        completions = texts if isinstance(rows[0]["prompt"], str) else chats
        return self.rewards(rows, completions, completion_ids, state)

    def _groups(self, rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """Return the group of each rollout: those around it that have its prompt."""
        prompts = [row["prompt"] for row in rows]
        groups = []
        for number, prompt in enumerate(prompts):
            first = number - number % self.size
            around = range(first, min(first + self.size, len(rows)))
            groups.append([other for other in around if prompts[other] == prompt])
        return groups

    def _produced(
        self, number: int, group: Sequence[int], texts: Sequence[str], right: Sequence[bool], feedback: str | None
    ) -> dict[str, Any]:
        siblings = [other for other in group if right[other] and other != number]
        made = {"attempt": strip_thinking(texts[number]), "feedback": feedback}
        made["sibling"] = strip_thinking(texts[siblings[0]]) if siblings else None
        return {name: value for name, value in made.items() if value}

    def _advantages(
        self, rewards: Sequence[float], groups: Sequence[Sequence[int]], distill_weight: Sequence[bool]
    ) -> list[float]:
        """Return coef · (reward - the group's mean) / its deviation where the term applies, 0 elsewhere."""
        found = []
        for number, (reward, group) in enumerate(zip(rewards, groups, strict=True)):
            applies = self.grpo_coef > 0 and not (self.grpo_on == "undistilled" and distill_weight[number])
            known = _known(rewards, group)
            # The mean of equal rewards may miss them by a rounding, and their rows would not count as unused.
            if not applies or math.isnan(reward) or len(set(known)) <= 1:
                found.append(0.0)
            else:
                found.append(self.grpo_coef * (reward - fmean(known)) / (stdev(known) + STD_EPSILON))
        return found


def _known(rewards: Sequence[float], group: Sequence[int]) -> list[float]:
    return [rewards[number] for number in group if not math.isnan(rewards[number])]
