"""Controls: each takes one thing away from a run and nothing else; gradients against autograd on the definition."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_rows
from datasets import Dataset, IterableDataset
from helpers import (
    MAKE_TEACHER,
    changed,
    logged,
    make_args,
    make_rollouts,
    make_trainer,
    snapshot,
)
from torch.nn.functional import log_softmax

from opsd import (
    ContextSchedule,
    EMATeacher,
    MixtureTeacher,
    OPSDConfig,
    OPSDTrainer,
    PrivilegedContext,
    RoutedTeacher,
    SameCheckpointTeacher,
)
from opsd.data.prepare import prepare_rows
from opsd.errors import ConfigError, DataError
from opsd.evaluation.run_folder import read_card
from opsd.rollouts import Rollouts
from opsd.teachers.one_hot import ConstantAdvantageTeacher
from opsd.training.controls import CONTROLS

ROWS = 4
LR = 0.5


def one_step(folder: Path, control: str, **changes: Any) -> tuple[OPSDTrainer, dict[str, torch.Tensor], Rollouts]:
    """Take one step of plain gradient descent on all of the rows; returns the weights before it, and its rollouts."""
    settings = {"max_steps": 1, "per_device_train_batch_size": ROWS, "gradient_accumulation_steps": 1}
    trainer = make_trainer(
        folder,
        SameCheckpointTeacher(context="worked_solution"),
        rows=Dataset.from_list(make_rows(ROWS)),
        control=control,
        bf16=False,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        **{**settings, **changes},
    )
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=LR)
    before = snapshot(trainer.model)
    trainer.train()
    assert trainer._buffered_inputs is not None
    return trainer, before, trainer._buffered_inputs[0]


def logprobs_by_hand(model: torch.nn.Module, rollouts: Rollouts) -> list[torch.Tensor]:
    """log s of every completion token, a whole forward pass per row."""
    found = []
    for prompt, completion in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True):
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        found.append(log_softmax(logits, -1)[range(len(completion)), completion])
    return found


def check_step(trainer: OPSDTrainer, before: dict[str, torch.Tensor], loss: Any) -> None:
    """Check that the step went down the gradient of `loss(model)` at the weights before it."""
    after, model = snapshot(trainer.model), trainer.model
    model.load_state_dict(before, strict=False)
    model.zero_grad()
    loss(model).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(after[name], before[name] - LR * p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", CONTROLS)
def test_control_trains_as_long_on_the_same_questions_in_the_same_order(tmp_path: Path, name: str) -> None:
    cards, orders = [], []
    for control in (None, name):
        folder = tmp_path / str(control)
        trainer = make_trainer(folder, SameCheckpointTeacher(context="worked_solution"), max_steps=2, control=control)
        seen: list[Any] = []
        made = trainer._generate_and_score_completions
        trainer._generate_and_score_completions = lambda rows, made=made, seen=seen: (  # type: ignore[method-assign]
            seen.extend(row["prompt"] for row in rows) or made(rows)
        )
        trainer.train()
        assert trainer.state.global_step == 2
        cards.append(read_card(str(folder)))
        orders.append(seen)
    assert orders[0] == orders[1] and len(orders[0]) > 0
    assert cards[0]["hashes"]["questions"] == cards[1]["hashes"]["questions"]
    assert cards[1]["settings"]["control"] == name and cards[0]["settings"]["control"] is None


@pytest.mark.parametrize("name", CONTROLS)
def test_control_wins_over_what_the_run_says_of_the_same_settings(tmp_path: Path, name: str) -> None:
    run = {
        "beta": 0.5,
        "divergence": "generalised_jsd",
        "entry_clip": 0.05,
        "lmbda": 1.0,
        "ref_kl_coef": 0.1,
        "num_generations": 2,
    }
    args = make_args(tmp_path, control=name, per_device_train_batch_size=4, **run)
    for setting, value in CONTROLS[name].settings.items():
        assert getattr(args, setting) == value
    for setting, value in run.items():
        assert setting in CONTROLS[name].settings or getattr(args, setting) == value


@pytest.mark.parametrize("name", CONTROLS)
def test_control_of_groups_keeps_steps_and_questions(tmp_path: Path, name: str) -> None:
    """Twelve rows, four rollouts a step, two of each prompt: six steps make an epoch, with and without the control."""
    groups = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "num_generations": 2}
    trainer = make_trainer(
        tmp_path,
        SameCheckpointTeacher(context="worked_solution"),
        max_steps=-1,
        num_train_epochs=1,
        control=name,
        **groups,
    )
    trainer.train()
    assert trainer.state.global_step == 6 and trainer.state.epoch == 1


@pytest.mark.parametrize("name", ["off-policy", "seq-kd"])
def test_a_teacher_that_samples_cannot_be_shown_what_rollouts_make(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="own_success"):
        make_trainer(tmp_path, SameCheckpointTeacher(context="own_success"), reward_funcs="last_number", control=name)


def test_siblings_of_another_row_are_nobodys_context(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="inserts a rollout's siblings"):
        PrivilegedContext("own_success").of_other_rows()


def test_an_attempt_stays_the_rows_own_where_its_solution_is_anothers() -> None:
    source = '{% extends "base.jinja" %}{% block user %}{{ prompt }} {{ attempt }} {{ solution }}{% endblock %}'
    assert PrivilegedContext.from_string(source).of_other_rows().fields == {"attempt", "other_solution"}


def test_a_reward_keeps_its_worth_beside_the_constant_advantage() -> None:
    rollouts = replace(make_rollouts(3), advantages=[0.5, 0.5, 0.0], distill_weight=[1.0, 0.0, 1.0])
    assert ConstantAdvantageTeacher(-1.0).adjust_rollouts(rollouts).advantages == [
        -0.5,
        0.5,
        -1.0,
    ]


def test_sft_asks_nothing_of_rows_that_only_evaluate(tmp_path: Path) -> None:
    bare = Dataset.from_list([{"prompt": [{"role": "user", "content": "Another question?"}]}])
    trainer = make_trainer(tmp_path, SameCheckpointTeacher(context="worked_solution"), control="sft", eval_rows=bare)
    assert trainer.eval_dataset.column_names == ["prompt"] and "completion" in trainer.train_dataset.column_names


def test_without_its_context_a_frozen_teacher_moves_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, SameCheckpointTeacher(context="worked_solution"), max_steps=3, control="no-context", bf16=False
    )
    before = snapshot(trainer.model)
    trainer.train()
    assert not changed(trainer, before)


def test_wrong_context_shows_each_row_the_solution_of_another(tmp_path: Path) -> None:
    trainer, _, rollouts = one_step(tmp_path, "wrong-context")
    solutions = [row["solution"] for row in make_rows(ROWS)]
    (shown,) = rollouts.teacher_prompt_ids.values()
    for row, prompt in zip(rollouts.rows, shown, strict=True):
        text = trainer.student.tokenizer.decode(prompt)
        others = [solution for solution in solutions if solution != row["solution"]]
        assert row["solution"] not in text
        assert sum(solution in text for solution in others) == 1
        assert row["prompt"][0]["content"] in text


def test_off_policy_trains_on_the_teachers_samples_with_the_methods_loss(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(OPSDTrainer, "_generate", lambda *args: pytest.fail("the student sampled"))
    trainer, before, rollouts = one_step(tmp_path, "off-policy")
    assert trainer.args.objective.divergence.describe() == make_args(tmp_path / "m").objective.divergence.describe()
    (shown,) = rollouts.teacher_prompt_ids.values()

    def reverse_kl(model: torch.nn.Module) -> torch.Tensor:
        total, count = torch.zeros(()), 0
        for prompt, told, ids in zip(rollouts.prompt_ids, shown, rollouts.completion_ids, strict=True):
            student = log_softmax(model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1], -1)
            with torch.no_grad():
                teacher = log_softmax(model(torch.tensor([told + ids])).logits[0, len(told) - 1 : -1], -1)
            total = total + (student.exp() * (student - teacher)).sum()
            count += len(ids)
        return total / count

    check_step(trainer, before, reverse_kl)


@pytest.mark.parametrize("name", ["sft", "seq-kd"])
def test_imitation_is_the_mean_negative_log_likelihood(tmp_path: Path, name: str) -> None:
    trainer, before, rollouts = one_step(tmp_path, name)

    def nll(model: torch.nn.Module) -> torch.Tensor:
        return -torch.cat(logprobs_by_hand(model, rollouts)).mean()

    check_step(trainer, before, nll)
    assert logged(trainer, "divergence")[0] == pytest.approx(nll(trainer.model).item(), rel=1e-4)


def test_sft_imitates_the_rows_and_seq_kd_the_teacher(tmp_path: Path) -> None:
    trainer, _, rollouts = one_step(tmp_path / "sft", "sft", max_completion_length=64)
    tokenizer = trainer.student.tokenizer
    for row, ids in zip(rollouts.rows, rollouts.completion_ids, strict=True):
        assert tokenizer.decode(ids[:-1]) == row["solution"] and ids[-1] == tokenizer.eos_token_id
    _, _, sampled = one_step(tmp_path / "kd", "seq-kd")
    assert all(
        tokenizer.decode(ids) != row["solution"] for row, ids in zip(sampled.rows, sampled.completion_ids, strict=True)
    )


def test_constant_advantage_pushes_down_whatever_was_sampled(tmp_path: Path) -> None:
    trainer, before, rollouts = one_step(tmp_path, "constant-advantage")
    check_step(trainer, before, lambda model: torch.cat(logprobs_by_hand(model, rollouts)).mean())


@pytest.mark.parametrize(
    ("columns", "source"),
    [
        (["answer", "solution", "demonstration", "completion"], "completion"),
        (["answer", "solution", "demonstration"], "demonstration"),
        (["answer", "solution"], "solution"),
        (["answer"], "answer"),
    ],
)
def test_sft_imitates_the_most_telling_column(columns: list[str], source: str) -> None:
    rows = Dataset.from_list([{"prompt": "q", **{name: f"the {name}" for name in columns}}] * 2)
    assert prepare_rows(rows, imitates=True)["completion"] == [f"the {source}"] * 2


def test_sft_reads_numbers_and_refuses_rows_with_nothing_to_imitate() -> None:
    numbers = prepare_rows(Dataset.from_list([{"prompt": "q", "answer": 19}]), imitates=True)
    assert numbers["completion"] == ["19"]
    needs = CONTROLS["sft"].needs
    with pytest.raises(
        DataError, match=r"imitates rows needs the column 'completion' or .* 'answer', .* has: prompt, h"
    ):
        prepare_rows(Dataset.from_list([{"prompt": "q", "hint": "h"}]), imitates=True, needs=needs)
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": "q", "answer": "1"}]))
    with pytest.raises(DataError, match="stream"):
        prepare_rows(stream, imitates=True, needs=needs)


def test_every_part_of_a_composed_teacher_loses_its_context() -> None:
    without = CONTROLS["no-context"].teacher
    mixed = without(MixtureTeacher(EMATeacher(0.8), [0.5, 0.5], contexts=["answer_only", "worked_solution"]))
    routed = without(RoutedTeacher("domain", {"odd": SameCheckpointTeacher()}, context="answer_only"))
    assert mixed.prompts.contexts == [] and len(mixed.prompts.leaves) == 2
    assert routed.prompts.contexts == []


@pytest.mark.parametrize("teacher", MAKE_TEACHER)
def test_every_teacher_can_be_shown_what_belongs_to_other_rows(teacher: str) -> None:
    method = MAKE_TEACHER[teacher]()
    wrong = CONTROLS["wrong-context"].teacher(method)
    assert type(wrong) is type(method)
    assert [sorted(c.fields) for c in wrong.prompts.contexts] == [
        [f"other_{f}" for f in sorted(c.fields)] for c in method.prompts.contexts
    ]
    assert {"other_answer", "other_solution"} >= {f for c in wrong.prompts.contexts for f in c.fields}


def test_a_schedule_shows_other_rows_at_every_level() -> None:
    levels = ["worked_solution", "answer_only", "none"]
    schedule = ContextSchedule(levels, until_step={"worked_solution": 2, "answer_only": 4})
    wrong = schedule.of_other_rows()
    row = {"prompt": "q", "solution": "s", "answer": "a", "other_solution": "o", "other_answer": "p"}
    assert [wrong.scheduled_level(row) for wrong.step in (0, 3, 5)] == levels
    assert {f for c in wrong.levels.values() if c for f in c.fields} == {"other_solution", "other_answer"}


def test_a_nested_column_is_another_rows_too(tmp_path: Path) -> None:
    context = PrivilegedContext("answer_only", fields={"answer": "reward.truth"})
    rows = [{"prompt": [{"role": "user", "content": f"q{i}"}], "reward": {"truth": f"right{i}"}} for i in range(4)]
    trainer = make_trainer(
        tmp_path, SameCheckpointTeacher(context=context), rows=Dataset.from_list(rows), control="wrong-context"
    )
    for number, row in enumerate(trainer.train_dataset):
        text = trainer.student.tokenizer.decode(trainer.teacher.prompts.ids(row))
        assert f"right{number}" not in text and "right" in text


@pytest.mark.parametrize("name", ["no-context", "wrong-context"])
def test_control_of_a_context_is_refused_where_there_is_none(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="this teacher has none"):
        make_trainer(tmp_path, SameCheckpointTeacher(), control=name)


def test_wrong_context_is_refused_where_all_rows_are_shown_the_same(tmp_path: Path) -> None:
    rule = PrivilegedContext("system_rule", values={"rule": "Be brief."})
    with pytest.raises(ConfigError, match="inserts the same text for every row"):
        make_trainer(tmp_path, SameCheckpointTeacher(context=rule), control="wrong-context")


def test_unknown_control_is_refused_with_the_nearest_and_what_each_asks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'no-context'") as raised:
        OPSDConfig(str(tmp_path), control="no_context")
    assert all(control.asks in str(raised.value) for control in CONTROLS.values())


def test_the_doctor_is_not_asked_about_a_control(tmp_path: Path) -> None:
    from opsd.doctor import examine

    with pytest.raises(ConfigError, match="this run is the control"):
        examine(make_trainer(tmp_path, SameCheckpointTeacher(context="worked_solution"), control="sft"))


def test_a_control_is_another_run_and_does_not_resume_the_method(tmp_path: Path) -> None:
    from opsd.errors import CheckpointError

    def trainer(control: str | None, steps: int) -> OPSDTrainer:
        return make_trainer(
            tmp_path,
            SameCheckpointTeacher(context="worked_solution"),
            max_steps=steps,
            save_strategy="steps",
            save_steps=1,
            control=control,
        )

    trainer(None, 1).train()
    for name in CONTROLS:
        with pytest.raises(CheckpointError, match="other settings"):
            trainer(name, 2).train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_a_sampled_demonstration_goes_on_exactly_after_a_resume(tmp_path: Path) -> None:
    def trainer(folder: str, steps: int) -> OPSDTrainer:
        teacher = EMATeacher(0.8, context="worked_solution")
        often = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
        if steps == 4 and folder == "parts":
            often["allow_changes"] = ["max_steps"]
        return make_trainer(tmp_path / folder, teacher, max_steps=steps, control="seq-kd", **often)

    whole = trainer("whole", 4)
    whole.train()
    trainer("parts", 2).train()
    again = trainer("parts", 4)
    again.train(resume_from_checkpoint=True)
    wanted, got = snapshot(whole.model), snapshot(again.model)
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert json.dumps(logged(whole, "divergence")[2:]) == json.dumps(logged(again, "divergence")[-2:])
