"""Reward functions: how they are called, what their answers are worth together, what a grader's name means."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import make_llama, make_rows
from datasets import Dataset
from helpers import logged, make_trainer, returns

from opsd import SameCheckpointTeacher
from opsd.errors import ConfigError, DataError, OPSDWarning
from opsd.training.averages import Tally
from opsd.training.rewards import Rewards, Verdicts

STATE = SimpleNamespace(global_step=3)


def asked(functions: Any, weights: Any = None, rows: Any = None, completions: Any = None) -> Verdicts:
    rows = [{"prompt": "How many?", "answer": answer} for answer in ("1", "2", "3")] if rows is None else rows
    completions = ["It is 1.", "It is 9.", "It is 3."] if completions is None else completions
    return Rewards.parse(functions, weights)(rows, completions, [[7]] * len(rows), STATE)


@pytest.mark.parametrize("kind", ["messages", "text"])
def test_a_reward_function_is_called_as_trl_calls_it(tmp_path: Path, kind: str) -> None:
    calls: list[dict[str, Any]] = []

    def reward(prompts: Any, completions: Any, completion_ids: Any, answer: Any, **others: Any) -> list[float]:
        calls.append(
            {"prompts": prompts, "completions": completions, "ids": completion_ids, "answer": answer, **others}
        )
        others["log_metric"]("my/metric", 7.0)
        return [1.0] * len(prompts)

    rows = [{**r, "prompt": r["prompt"] if kind == "messages" else f"{n}?"} for n, r in enumerate(make_rows())]
    teacher = SameCheckpointTeacher(context="answer_only")
    trainer = make_trainer(tmp_path, teacher, "full", Dataset.from_list(rows), reward, num_generations=2, max_steps=1)
    trainer.train()
    (call,) = calls
    ids, texts = call["ids"], trainer._tokenizer.batch_decode(call["ids"], skip_special_tokens=True)
    assert all(isinstance(each, list) and 0 < len(each) <= 6 for each in ids) and len(ids) == 4
    if kind == "messages":
        texts = [[{"role": "assistant", "content": text}] for text in texts]
    assert call["completions"] == texts
    used = [rows[[row["prompt"] for row in rows].index(prompt)] for prompt in call["prompts"]]
    assert call["answer"] == [row["answer"] for row in used] and call["domain"] == [row["domain"] for row in used]
    assert call["prompts"][0] == call["prompts"][1] != call["prompts"][2] == call["prompts"][3]
    assert call["trainer_state"] is trainer.state and not {"prompt", "completion"} & call.keys()
    assert logged(trainer, "my/metric") == [7.0] and logged(trainer, "rewards/reward") == [1.0]


def test_rewards_are_summed_by_weight_and_none_is_unknown() -> None:
    first, second = returns([1.0, None, None]), returns([0.5, 2.0, None])
    verdicts = asked([first, second], [2.0, 0.5])
    assert verdicts.rewards[:2] == [2.25, 1.0] and math.isnan(verdicts.rewards[2])
    assert asked([first, second]).rewards[:2] == [1.5, 2.0]
    assert Tally.of(asked(second).values["rewards/fixed"]).result == 1.25, "of those that are known"
    assert Tally.of(asked(returns([None] * 3)).values["rewards/fixed"]).size == 0
    assert asked(returns([0.0] * 3, ["a", None, "c"])).feedback == ["a", None, "c"]


def test_what_is_not_said_of_every_rollout_is_refused() -> None:
    with pytest.raises(DataError, match=r"'fixed' returned 2 rewards. It must .* for each of 3 rollouts"):
        asked(returns([1.0, 0.0]))
    with pytest.raises(DataError, match="got 1 texts for 3 rollouts"):
        asked(returns([1.0] * 3, ["only one"]))


async def later(**columns: Any) -> list[float]:
    return [1.0]


class Later:
    async def __call__(self, **columns: Any) -> list[float]:
        return [1.0]


NO_REWARDS = [
    (later, "a plain function"),
    (Later(), "a plain function"),
    (make_llama(), "LlamaForCausalLM. opsd calls neither reward models"),
    (5, "is a int"),
    ("last_numbr", "Did you mean 'last_number'"),
    ("no_such_module:f", "Check both names"),
    ("math:pi", "is a float"),
]


@pytest.mark.parametrize(("value", "message"), NO_REWARDS)
def test_what_is_no_reward_function_is_refused_before_training(value: Any, message: str) -> None:
    """An async one would fail at its first rewards, a model give logits of the wrong prompt."""
    with pytest.raises(ConfigError, match=message):
        Rewards.parse([value], None)


def test_a_grader_is_a_reward_function_by_its_name() -> None:
    verdicts = asked("last_number")
    assert verdicts.rewards == [1.0, 0.0, 1.0] and verdicts.values == {"rewards/last_number": [1.0, 0.0, 1.0]}
    chats = [[{"role": "user", "content": "2"}, {"role": "assistant", "content": text}] for text in ("1", "2", "")]
    assert asked("exact", completions=chats).rewards == [1.0, 1.0, 0.0], "the last message is the answer"
    assert asked("exact", completions=[[], [{"role": "assistant"}], chats[0]]).rewards == [0.0, 0.0, 0.0]


MAJORITIES = {
    "most": (["It is 4.", "4", "So 5."], [1.0, 1.0, 0.0]),
    "half, and the rest apart": (["4", "4", "5", "6"], [1.0, 1.0, 0.0, 0.0]),
    "two answers of equal weight": (["4", "4", "5", "5"], [None] * 4),
    "less than half": (["4", "4", "5", "6", "7"], [None] * 5),
    "texts without an answer are none": (["4", "4", "none", "none at all"], [1.0, 1.0, 0.0, 0.0]),
    "no answer at all": (["none", "none"], [None, None]),
    "one rollout is no majority": (["4"], [None]),
}


@pytest.mark.parametrize(("completions", "expected"), MAJORITIES.values(), ids=MAJORITIES)
def test_the_majority_of_a_prompts_rollouts_is_right(completions: list[str], expected: list[float | None]) -> None:
    """Beside another prompt, whose answers do not count here; the column `answer` is not read."""
    rows = [{"prompt": "How many?"}] * len(completions) + [{"prompt": "How much?"}] * 2
    rewards = asked("majority:last_number", rows=rows, completions=[*completions, "9", "9"]).rewards
    assert [None if math.isnan(reward) else reward for reward in rewards] == [*expected, 1.0, 1.0]


def test_a_majority_needs_a_grader_that_reads_answers() -> None:
    with pytest.raises(ConfigError, match="'contains' reads no answer from a text"):
        Rewards.parse("majority:contains", None)


def test_a_reasoning_gym_dataset_grades_with_its_own_scorer() -> None:
    """Its scorers read more of a row than the answer: this one the numbers that may be used, kept in `metadata`."""
    reasoning_gym = pytest.importorskip("reasoning_gym")
    items = list(reasoning_gym.create_dataset("countdown", size=2, seed=1))
    rows = list(Dataset.from_list([{"prompt": item["question"], **item} for item in items]))
    right = [item["metadata"]["expression"] for item in items]
    assert asked("reasoning_gym:countdown", rows=rows, completions=right).rewards == [1.0, 1.0]
    assert asked("reasoning_gym:countdown", rows=rows, completions=right[::-1]).rewards == [0.05, 0.05], (
        "its own partial score"
    )


def test_where_a_grader_fails_the_reward_is_unknown_and_the_user_is_told() -> None:
    rows = [{"prompt": "How many?", "answer": answer} for answer in ("1", "nobody knows", "")]
    with pytest.warns(OPSDWarning, match=r"(?s)failed on a rollout .*neither right nor wrong"):
        verdicts = asked("last_number", rows=rows)
    assert verdicts.rewards[0] == 1.0 and all(map(math.isnan, verdicts.rewards[1:]))
