"""Several rollouts per prompt: their order, what a group makes for its teacher, who learns how, and by which loss.

Shapes: B rollouts · T tokens of a completion · V vocabulary.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from conftest import make_rows
from datasets import IterableDataset
from helpers import changed, logged, make_trainer, returns, snapshot
from torch.utils.data import BatchSampler

from opsd import OPSDTrainer, PrivilegedContext, SameCheckpointTeacher
from opsd.cli import main
from opsd.commands.run_file import read_run
from opsd.data.order import EpochSampler
from opsd.errors import ConfigError, DataError
from opsd.rollouts import Rollouts
from opsd.training.averages import Tally
from opsd.training.groups import Groups
from opsd.training.metrics import gate_metrics
from opsd.training.rewards import Rewards

STATE = SimpleNamespace(global_step=3)


def graded(
    rewards: list[float | None], feedback: Any = None, context: Any = "own_success", size: int = 4, **settings: Any
) -> tuple[Rollouts, dict[str, float]]:
    """Groups of `size`, two of each prompt, whose completions read t0, t1, …; every other one thinks first."""
    texts = [f"<think>so t{n + 1}?</think> t{n}" if n % 2 else f"t{n}" for n in range(len(rewards))]
    rows = [{"prompt": f"prompt {n // (2 * size)}", "answer": "19"} for n in range(len(rewards))]
    rollouts = Rollouts(rows, [[1]] * len(rows), [[10 + n] * 3 for n in range(len(rows))])
    groups = Groups(Rewards.parse(returns(rewards, feedback), None), num_generations=size, **settings)
    has_fields = SameCheckpointTeacher(context=context).prompts.has_fields
    result, values = groups.grade(rollouts, lambda ids: texts, has_fields, STATE)
    return result, {name: Tally.of(of_rows).result for name, of_rows in values.items()}


# ---- the order of rows ----------------------------------------------------------------------------------------------


def epoch_sampler(rows: int = 7, epoch: int = 0, **changes: Any) -> EpochSampler:
    settings = {"batch_size": 8, "group": 4, "repeats": 2, "shuffle": True, "seed": 5, "epoch": lambda: epoch}
    return EpochSampler(rows, **{**settings, **changes})


def test_each_row_stands_as_often_as_it_is_sampled_and_whole_groups_make_a_batch() -> None:
    order = list(epoch_sampler())
    batches = [order[start : start + 8] for start in range(0, len(order), 8)]
    assert len(order) == len(epoch_sampler()) == 3 * 2 * 8, "the seventh row waits for the next epoch"
    assert all(batch[:4] == [batch[0]] * 4 and batch[4:] == [batch[4]] * 4 for batch in batches)
    assert batches[0::2] == batches[1::2], "once per accumulation step"
    assert len({row for batch in batches for row in batch}) == 6


def test_the_order_follows_from_the_epoch_alone() -> None:
    """A run that is resumed in epoch 1 never ran epoch 0 in this process."""
    orders = [list(epoch_sampler(epoch=epoch)) for epoch in (0, 1, 1)]
    assert orders[0] != orders[1] == orders[2]
    assert list(epoch_sampler(shuffle=False))[::4] == [0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5]


def test_rows_that_make_no_whole_batch_are_refused() -> None:
    assert len(epoch_sampler(2)) == 16
    with pytest.raises(DataError, match=r"has 1 row\(s\), and one batch of rollouts takes 2 .* ÷ num_generations"):
        epoch_sampler(1)


@pytest.mark.parametrize(("processes", "per_process", "group"), [(1, 8, 4), (2, 4, 4), (2, 8, 4), (3, 4, 2)])
def test_a_group_never_spans_two_processes(processes: int, per_process: int, group: int) -> None:
    """Rewards are compared where they were given: accelerate's sharding must cut between groups."""
    sampler = epoch_sampler(24, batch_size=processes * per_process, group=group)
    seen = []
    for process in range(processes):
        batches = list(BatchSamplerShard(BatchSampler(sampler, per_process, False), processes, process))
        assert batches[0::2] == batches[1::2], "every accumulation step brings the same rows"
        for batch in batches[::2]:
            groups = [batch[start : start + group] for start in range(0, per_process, group)]
            assert all(len(set(rows)) == 1 for rows in groups)
            seen += [rows[0] for rows in groups]
    assert len(seen) == len(set(seen)) == 24, "each row is one group of one process"


# ---- what a group makes for its teacher -----------------------------------------------------------------------------


def test_a_sibling_is_the_first_other_correct_rollout_of_the_same_group() -> None:
    """Its own text would let the teacher copy; another group's, even of the same prompt, is not compared with it."""
    rollouts, _ = graded([0.0, 1.0, 1.0, None, 0.0, 0.0, 1.0, 0.0])
    assert [made.get("sibling") for made in rollouts.rollout_fields] == ["t1", "t2", "t1", "t1", "t6", "t6", None, "t6"]
    assert [made["attempt"] for made in rollouts.rollout_fields] == [f"t{n}" for n in range(8)], "without thinking"


def test_a_random_sibling_is_any_other_correct_rollout_by_step_and_text() -> None:
    groups = Groups(Rewards.parse(returns([1.0] * 8), None), num_generations=8, sibling_choice="random")
    rows = [{"prompt": "1 + 1?", "answer": "2"}] * 8

    def siblings(step: int, texts: str = "abcdefgh") -> list[str]:
        rollouts = Rollouts(rows, [[1]] * 8, [[5]] * 8)
        state = SimpleNamespace(global_step=step)
        found, _ = groups.grade(rollouts, lambda ids: list(texts), lambda row, made: True, state)
        return [made["sibling"] for made in found.rollout_fields]

    drawn = [siblings(step) for step in range(40)]
    assert all(own != sibling for each in drawn for own, sibling in zip("abcdefgh", each, strict=True))
    assert {sibling for each in drawn for sibling in each[:1]} == set("bcdefgh"), "every other one, in time"
    assert siblings(3) == drawn[3], "a resumed run draws the same"
    assert len(set(drawn[0])) > 1, "rollouts of a group see different ones"


def test_feedback_belongs_to_its_own_rollout_and_blank_feedback_is_none() -> None:
    rollouts, found = graded([0.0] * 4, [None, "too few", " ", "too many"])
    assert [made.get("feedback") for made in rollouts.rollout_fields] == [None, "too few", None, "too many"]
    assert rollouts.is_distilled == [False, True, False, True] and found["group/without_context"] == 0.5


def test_rows_that_stand_for_themselves_have_no_siblings() -> None:
    """In evaluation each row is sampled once: neighbours are other questions, and their answers would be shown."""
    groups = Groups(Rewards.parse(returns([1.0, 1.0, 0.0]), None), num_generations=4, grpo_coef=1.0)
    rows = [{"prompt": [{"role": "user", "content": f"{n}?"}], "answer": "1"} for n in range(3)]
    rollouts = Rollouts(rows, [[1]] * 3, [[5]] * 3)
    found, _ = groups.grade(rollouts, lambda ids: ["a", "b", "c"], lambda row, made: True, STATE)
    assert [made["attempt"] for made in found.rollout_fields] == ["a", "b", "c"]
    assert [made["pass_rate"] for made in found.rollout_fields] == [1.0, 1.0, 0.0]
    assert all("sibling" not in made for made in found.rollout_fields)
    assert not any(found.advantages)


def test_a_row_without_anything_to_show_is_not_scored_and_is_counted() -> None:
    """Distilled from a teacher that knows no more, it would pull towards nothing."""
    rollouts, found = graded([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert [sum(mask) for mask in rollouts.loss_mask] == [0, 3, 3, 3, 0, 0, 0, 0]
    assert found["group/without_context"] == found["group/unused"] == 5 / 8
    assert found["group/distilled"] == 3 / 8 and found["group/right"] == 1 / 8 and found["group/flat"] == 0.5
    rollouts, found = graded([1.0, 0.0, None, 0.0], context="answer_only")
    assert all(rollouts.is_distilled) and found["group/without_context"] == 0.0, "a column is there for every row"


@pytest.mark.parametrize(("name", "shows"), [("sibling", 3), ("attempt", 4), ("feedback", 1)])
def test_a_template_of_ones_own_may_need_what_the_group_makes(name: str, shows: int) -> None:
    context = PrivilegedContext.from_string("{% block user %}{{ prompt }} {{ " + name + " }}{% endblock %}")
    rollouts, _ = graded([1.0, 0.0, 0.0, 0.0], [None, "no", None, None], context=context)
    assert sum(rollouts.is_distilled) == shows


def test_own_success_needs_a_reward_function_and_no_column(tmp_path: Path) -> None:
    context = PrivilegedContext("own_success")
    row = make_rows(1)[0]
    told = [context.messages(row, made)[0][0]["content"] for made in ({"sibling": "S."}, {"feedback": "F."}, {})]
    assert "S." in told[0] and "check" not in told[0] and "F." in told[1] and "solved" not in told[1]
    assert told[2] == row["prompt"][0]["content"]
    assert context.missing(["prompt", "answer", "solution"])
    group = {"num_generations": 4}
    make_trainer(tmp_path, SameCheckpointTeacher(context=context), reward_funcs="last_number", **group)
    with pytest.raises(DataError, match="'feedback' or 'sibling'"):
        make_trainer(tmp_path, SameCheckpointTeacher(context=context), "no such model")


# ---- who learns how -------------------------------------------------------------------------------------------------

ONE, TWO, NONE = [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, None], [0.0, 0.0, 0.0, 0.0]
# Rewards, route, grpo_on (- for no GRPO) → per rollout d(istilled), r(einforced), both, or unused (-).
ROUTED = [
    (ONE, "all", "-", "- d d d"),
    (ONE, "wrong", "-", "- d d d"),
    (ONE, "right", "-", "- - - -"),
    (ONE, "all", "all", "r dr dr dr"),
    (ONE, "all", "undistilled", "r d d d"),
    (ONE, "wrong", "all", "r dr dr dr"),
    (ONE, "wrong", "undistilled", "r d d d"),
    (ONE, "right", "all", "r r r r"),
    (ONE, "right", "undistilled", "r r r r"),
    (TWO, "all", "-", "d d d d"),
    (TWO, "wrong", "-", "- - d -"),
    (TWO, "right", "-", "d d - -"),
    (TWO, "all", "all", "dr dr dr d"),
    (TWO, "wrong", "undistilled", "r r d -"),
    (TWO, "right", "undistilled", "d d r -"),
    (NONE, "all", "all", "- - - -"),
    (NONE, "wrong", "undistilled", "- - - -"),
]


@pytest.mark.parametrize(("rewards", "route", "grpo_on", "expected"), ROUTED)
def test_a_rollout_learns_as_its_reward_routes_it(rewards: Any, route: str, grpo_on: str, expected: str) -> None:
    grpo = {} if grpo_on == "-" else {"grpo_coef": 0.5, "grpo_on": grpo_on}
    rollouts, found = graded(rewards, distill_on=route, **grpo)
    whom = expected.split()
    assert list(rollouts.distill_weight) == ["d" in each for each in whom]
    assert [advantage != 0.0 for advantage in rollouts.advantages] == ["r" in each for each in whom]
    assert [any(mask) for mask in rollouts.loss_mask] == [each != "-" for each in whom]
    assert rollouts.is_distilled == ["d" in each for each in whom]
    assert (found["group/distilled"], found["group/unused"]) == (expected.count("d") / 4, expected.count("-") / 4)


def test_advantages_are_those_of_trls_grpo() -> None:
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randn(6, 5, generator=generator).double()
    rollouts, _ = graded(rewards.flatten().tolist(), size=5, grpo_coef=0.3)
    expected = 0.3 * (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(torch.tensor(rollouts.advantages).double().view(6, 5), expected)
    rollouts, found = graded([1.0, None, 0.0, 0.25], grpo_coef=1.0)
    known = torch.tensor([1.0, 0.0, 0.25], dtype=torch.float64)
    expected = ((known - known.mean()) / (known.std() + 1e-4)).tolist()
    assert rollouts.advantages == pytest.approx([expected[0], 0.0, *expected[1:]])
    assert found["reward"] == pytest.approx(known.mean().item())


@pytest.mark.parametrize("reward", [0.1, 0.7, 1.0])
def test_a_group_that_agrees_has_no_advantage_not_even_a_rounding(reward: float) -> None:
    """The mean of three times 0.7 is not 0.7: divided by 1e-4 the rest counted the rows as reinforced."""
    rollouts, found = graded([reward] * 3, size=3, distill_on="wrong", success_reward=0.05, grpo_coef=1.0)
    assert rollouts.advantages == [0.0] * 3 and found["group/unused"] == found["group/flat"] == 1.0


# ---- the loss -------------------------------------------------------------------------------------------------------

REWARDS = [1.0, 0.0, None, 0.2, 1.0, 1.0, 0.0, 0.5]
COEF = 0.7
# Settings → which of the eight are distilled: the first has no sibling, the third no reward.
MIXED = [
    ("wrong", "undistilled", 1.0, [0, 1, 0, 1, 0, 0, 1, 1]),
    ("right", "undistilled", 1.3, [0, 0, 0, 0, 1, 1, 0, 0]),
    ("wrong", "all", 1.0, [0, 1, 0, 1, 0, 0, 1, 1]),
    ("all", "all", 1.0, [0, 1, 1, 1, 1, 1, 1, 1]),
]


def mixed(folder: Path, **settings: Any) -> tuple[OPSDTrainer, Rollouts]:
    """A trainer, and two groups of four rollouts as it grades and shows them."""
    teacher = SameCheckpointTeacher(context="own_success")
    trainer = make_trainer(folder, teacher, reward_funcs=returns(REWARDS), num_generations=4, **settings)
    rows = [row for row in make_rows(2) for _ in range(4)]
    generator = torch.Generator().manual_seed(3)
    completions = [torch.randint(3, 300, (1 + 3 * n % 7,), generator=generator).tolist() for n in range(8)]
    prompts = [trainer.student.renderer.ids(row["prompt"]) for row in rows]
    rollouts, decode = Rollouts(rows, prompts, completions), trainer.processing_class.batch_decode
    graded, _ = trainer.groups.grade(rollouts, decode, trainer.teacher.prompts.has_fields, trainer.state)
    return trainer, trainer.scorer.prepare_rollouts(graded)


def gradients(trainer: OPSDTrainer, rollouts: Rollouts) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = trainer.scorer
    trainer.model.zero_grad()
    record = loss(trainer.model, loss.score(rollouts), torch.device("cpu"), 1)
    record.loss.backward()
    return record.loss.detach(), {name: p.grad.clone() for name, p in trainer.model.named_parameters()}


def defined(trainer: OPSDTrainer, rollouts: Rollouts, share_B: list[int]) -> tuple[float, dict[str, torch.Tensor]]:
    """Σ weight · (share · KL(s ‖ t) − coef · A · log s(y)) in float64, rollout by rollout, from every logit."""
    args, model = trainer.args, copy.deepcopy(trainer.model).double()
    teacher = copy.deepcopy(model).requires_grad_(False)  # at step 0 the frozen copy is the student
    worth_B = []
    for n, reward in enumerate(REWARDS):
        known = torch.tensor([r for r in REWARDS[n - n % 4 : n - n % 4 + 4] if r is not None]).double()
        applies = reward is not None and not (args.grpo_on == "undistilled" and share_B[n])
        worth_B.append(COEF * ((reward - known.mean()) / (known.std() + 1e-4)).item() if applies else 0.0)
    used = [n for n in range(8) if share_B[n] or worth_B[n]]
    weight = 1.0 / sum(len(rollouts.completion_ids[n]) for n in used)
    divergence, total = 0.0, torch.zeros((), dtype=torch.float64)
    for n in used:
        y_T, logs = torch.tensor(rollouts.completion_ids[n]), []
        for scorer, prompts in (
            (model, rollouts.prompt_ids),
            (teacher, rollouts.teacher_prompt_ids[trainer.teacher.prompts]),
        ):
            logits_TV = scorer(torch.tensor([prompts[n] + rollouts.completion_ids[n]])).logits[0, -len(y_T) - 1 : -1]
            logs.append((logits_TV / args.temperature).log_softmax(-1))
        s_TV, t_TV = logs
        kl = (s_TV.exp() * (s_TV - t_TV)).sum()
        divergence += weight * share_B[n] * kl.item()
        total = total + weight * (share_B[n] * kl - worth_B[n] * s_TV.gather(-1, y_T[:, None]).sum())
    total.backward()
    return divergence, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(("route", "grpo_on", "temperature", "share_B"), MIXED)
def test_the_gradient_is_that_of_the_definition(
    tmp_path: Path, route: str, grpo_on: str, temperature: float, share_B: list[int]
) -> None:
    trainer, rollouts = mixed(tmp_path, distill_on=route, grpo_on=grpo_on, grpo_coef=COEF, temperature=temperature)
    loss, found = gradients(trainer, rollouts)
    divergence, expected = defined(trainer, rollouts, share_B)
    assert loss.item() == pytest.approx(divergence, rel=1e-4), "GRPO has a gradient and no value"
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name].double(), gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())


def test_what_the_teacher_says_of_a_reinforced_rollout_changes_nothing(tmp_path: Path) -> None:
    trainer, rollouts = mixed(tmp_path, distill_on="wrong", grpo_on="undistilled", grpo_coef=COEF)
    key = trainer.teacher.prompts
    lies = [
        prompt if share else [7, 8, 9]
        for prompt, share in zip(rollouts.teacher_prompt_ids[key], MIXED[0][3], strict=True)
    ]
    assert lies != rollouts.teacher_prompt_ids[key]
    loss, found = gradients(trainer, rollouts)
    same_loss, same = gradients(trainer, replace(rollouts, teacher_prompt_ids={key: lies}))
    assert torch.equal(loss, same_loss) and all(torch.equal(found[name], same[name]) for name in found)


@pytest.mark.slow
def test_without_a_coefficient_rewards_change_no_bit(tmp_path: Path) -> None:
    """A reward is logged, and that is all."""
    ends = []
    for name, reward_funcs in (("with", returns([1.0, 0.0, 0.0, None])), ("without", None)):
        teacher = SameCheckpointTeacher(context="answer_only")
        trainer = make_trainer(tmp_path / name, teacher, reward_funcs=reward_funcs, num_generations=2)
        trainer.train()
        ends.append(snapshot(trainer.model))
        assert bool(logged(trainer, "reward")) == (name == "with")
    assert all(torch.equal(weights, ends[1][name]) for name, weights in ends[0].items())


# ---- a run ----------------------------------------------------------------------------------------------------------

LIKED = 200  # of 400 ids


def likes_low_ids(completion_ids: list[list[int]], log_extra: Any, **columns: Any) -> list[float]:
    shares = [sum(i < LIKED for i in ids) / max(len(ids), 1) for ids in completion_ids]
    log_extra("feedback", [f"{share:.0%} are low." for share in shares])
    return shares


def probability_of_liked(trainer: OPSDTrainer) -> float:
    with torch.no_grad():
        nexts = [trainer.model(torch.tensor([trainer.student.renderer.ids(row["prompt"])])) for row in make_rows(4)]
    return sum(out.logits[0, -1].softmax(-1)[:LIKED].sum().item() for out in nexts) / len(nexts)


def test_a_run_logs_what_its_groups_earned(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, SameCheckpointTeacher(context="own_success"), reward_funcs=likes_low_ids, num_generations=4,
        max_steps=3, per_device_train_batch_size=4, success_reward=0.6, distill_on="wrong", grpo_coef=0.1,
    )  # fmt: skip
    before = snapshot(trainer.model)
    trainer.train()
    assert changed(trainer, before)
    for name in set(gate_metrics(["likes_low_ids"])) - set(gate_metrics([])):
        values = logged(trainer, name)
        assert len(values) == 3 and all(0.0 <= value <= 1.0 for value in values), name
    assert logged(trainer, "reward") == pytest.approx(logged(trainer, "rewards/likes_low_ids"))
    assert sum(logged(trainer, "group/distilled")) > 0, "feedback was there for all"


def test_a_step_in_which_nobody_learns_changes_nothing(tmp_path: Path) -> None:
    teacher = SameCheckpointTeacher(context="own_success")
    trainer = make_trainer(tmp_path, teacher, reward_funcs=returns([0.0] * 4), num_generations=4, grpo_coef=1.0)
    before = snapshot(trainer.model)
    trainer.train()
    assert not changed(trainer, before) and logged(trainer, "group/unused") == [1.0, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize(("route", "grpo_on"), [("wrong", "undistilled"), ("right", "undistilled"), ("all", "all")])
def test_what_is_rewarded_becomes_likelier(tmp_path: Path, route: str, grpo_on: str) -> None:
    """From 0.49 to between 0.64 and 0.76 on five seeds; with the sign turned it falls."""
    trainer = make_trainer(
        tmp_path, SameCheckpointTeacher(context="own_success"), reward_funcs=likes_low_ids, num_generations=4,
        distill_on=route, grpo_on=grpo_on, grpo_coef=1.0, success_reward=0.7, max_steps=30, learning_rate=2e-2,
        per_device_train_batch_size=16, gradient_accumulation_steps=1, max_completion_length=2,
    )  # fmt: skip
    before = probability_of_liked(trainer)
    trainer.train()
    assert probability_of_liked(trainer) > before + 0.08


def test_the_command_line_takes_reward_functions(tmp_path: Path, llama_folder: str, capsys: Any) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    (tmp_path / "run.yaml").write_text(
        f"model_name_or_path: {llama_folder}\ndataset_name: {rows}\ncontext: own_success\n"
        f"output_dir: {tmp_path / 'out'}\nreward_funcs: [last_number, exact]\nnum_generations: 4\nuse_cpu: true\n"
        "bf16: false\nmax_steps: 1\nmax_completion_length: 4\nper_device_train_batch_size: 4\nreport_to: none\n"
    )
    assert read_run(tmp_path / "run.yaml").run.reward_funcs == ["last_number", "exact"]
    changed = ["--reward_funcs", "last_number", "helpers:no_such", "--reward_weights", "1", "0.5"]
    assert read_run(tmp_path / "run.yaml", changed).run.reward_funcs == ["last_number", "helpers:no_such"]
    assert main(["train", str(tmp_path / "run.yaml"), *changed]) == 2
    assert "Check both names" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "run.yaml"), "--reward_funcs", "last_number"]) == 0
    assert "4 rollouts per prompt, rewarded by last_number" in capsys.readouterr().out


# ---- refused --------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"distill_on": "wrong", "reward_funcs": None}, "there is no reward function. Pass reward_funcs="),
    ({"grpo_coef": 0.5, "reward_funcs": None}, "there is no reward function. Pass reward_funcs="),
    ({"grpo_coef": 0.5, "num_generations": 1}, "num_generations is 1. GRPO compares"),
    ({"grpo_coef": -0.5}, "must not be negative"),
    ({"num_generations": 3}, "num_generations is 3, and a step makes 4 rollouts per device"),
    ({"num_generations": 8}, "num_generations is 8, and a step makes 4 rollouts per device"),
    ({"num_generations": 0}, "num_generations is 0"),
    ({"lmbda": 0.75}, "num_generations is 4 and lmbda 0.75: off-policy rows have one completion"),
    ({"grpo_on": "undistiled", "grpo_coef": 0.5}, "Did you mean 'undistilled'"),
    ({"distill_on": "write"}, "distill_on"),
    ({"reward_weights": [1.0, 2.0]}, r"reward_weights has 2 weight\(s\) for 1 reward function"),
    ({"rows": IterableDataset.from_generator(lambda: iter(make_rows()))}, "a stream, whose shuffling would tear"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_groups_that_cannot_work_are_refused_before_a_model_loads(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    settings = {"num_generations": 4, "reward_funcs": "last_number", **settings}
    with pytest.raises((ConfigError, DataError), match=message):
        make_trainer(tmp_path, SameCheckpointTeacher(context="answer_only"), "no such model", **settings)
