"""The loop on a real tiny model: what it samples, trains and logs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import make_llama, make_rows, make_tokenizer
from datasets import Dataset, IterableDataset
from helpers import (
    LORA,
    MAKE_TEACHER,
    RUNS,
    changed,
    logged,
    make_args,
    make_rollouts,
    make_student,
    make_trainer,
    move,
    snapshot,
)
from peft import LoraConfig, get_peft_model
from transformers import LlamaModel

from opsd import (
    EMATeacher,
    OPSDTrainer,
    PrivilegedContext,
    SameCheckpointTeacher,
    SiblingTeacher,
)
from opsd.errors import DataError, OPSDWarning
from opsd.rollouts import PAD
from opsd.training.schedules import on_policy_rows


@pytest.mark.parametrize(("teacher", "student"), RUNS)
def test_training_moves_the_trainable_weights_and_nothing_else(tmp_path: Path, teacher: str, student: str) -> None:
    trainer = make_trainer(tmp_path, MAKE_TEACHER[teacher](), student)
    before = snapshot(trainer.model)
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert changed(trainer, before) and changed(trainer, before) <= trainable
    assert all(d > 0 for d in logged(trainer, "divergence"))


@pytest.mark.slow
def test_the_student_comes_closer_to_its_teacher(tmp_path: Path) -> None:
    """A flipped sign, a detached student or swapped sides would move it away."""
    trainer = make_trainer(
        tmp_path, SiblingTeacher(make_llama(5), tokenizer=make_tokenizer()), max_steps=30, learning_rate=5e-3, seed=1
    )
    trainer.train()
    kl = logged(trainer, "divergence")
    assert sum(kl[-5:]) < 0.7 * sum(kl[:5]), kl


def test_without_a_context_a_frozen_copy_teaches_nothing_at_step_one(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, None, "arriving adapter", max_steps=1)
    trainer.train()
    assert abs(logged(trainer, "divergence")[0]) <= 1e-6
    assert logged(trainer, "grad_norm")[0] <= 1e-5


def test_logged_loss_is_the_mean_divergence_of_all_scored_tokens(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, SameCheckpointTeacher(context="answer_only"))
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx(logged(trainer, "divergence"), rel=1e-4)
    assert all(tokens > 0 for tokens in logged(trainer, "scored_tokens"))
    assert all(m >= d for m, d in zip(logged(trainer, "divergence/max"), logged(trainer, "divergence"), strict=True))


def test_accumulation_gives_the_gradients_of_one_big_batch(tmp_path: Path) -> None:
    """Invariant 7 on replayed rollouts: 4 × 1 equals 1 × 4."""
    gradients = []
    rollouts = make_rollouts(4)
    for size, steps in ((4, 1), (1, 4)):
        trainer = make_trainer(
            tmp_path / str(size),
            SameCheckpointTeacher(context="answer_only"),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        trainer.model.train()
        whole = trainer.teacher.prompts.render(rollouts).sorted_by_length().with_num_loss_tokens(rollouts.num_scorable)
        for part in whole.split(steps):
            trainer.compute_loss(trainer.model, trainer._scored(part)).backward()
        gradients.append({n: p.grad.clone() for n, p in trainer.model.named_parameters()})
    for name, g in gradients[0].items():
        assert torch.allclose(g, gradients[1][name], rtol=1e-4, atol=1e-7), name


@pytest.mark.slow
def test_text_conversational_and_chat_rows_train(tmp_path: Path) -> None:
    text = [{"prompt": f"{i} plus one is", "answer": str(i + 1)} for i in range(8)]
    chat = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "Yes."}], "answer": "yes"}
        for i in range(8)
    ]
    for name, rows in (("text", text), ("chat", chat), ("conversational", make_rows(8))):
        trainer = make_trainer(
            tmp_path / name, SameCheckpointTeacher(context="answer_only"), rows=Dataset.from_list(rows)
        )
        trainer.train()
        assert logged(trainer, "divergence")[0] > 0, name


def test_a_streaming_dataset_trains_and_names_a_missing_column_before_step_one(tmp_path: Path) -> None:
    stream = IterableDataset.from_generator(lambda: iter(make_rows(12)))
    trainer = make_trainer(tmp_path / "a", SameCheckpointTeacher(context="answer_only"), rows=stream)
    trainer.train()
    assert trainer.state.global_step == 2
    with pytest.raises(DataError, match="document"):
        make_trainer(tmp_path / "b", SameCheckpointTeacher(context="document"), rows=stream)


def test_evaluation_reports_the_divergence_and_keeps_the_training_mode(tmp_path: Path) -> None:
    trainer = OPSDTrainer(
        make_llama(),
        SameCheckpointTeacher(context="answer_only"),
        args=make_args(tmp_path, eval_strategy="steps", eval_steps=1),
        train_dataset=Dataset.from_list(make_rows()),
        eval_dataset=Dataset.from_list(make_rows(17)[12:]),
        processing_class=make_tokenizer(),
    )
    trainer.train()
    assert len(logged(trainer, "eval_loss")) == 2 and all(v > 0 for v in logged(trainer, "eval_divergence"))


@pytest.mark.parametrize(("lmbda", "steps"), [(0.0, 4), (0.3, 10), (0.5, 4), (0.75, 4), (1.0, 3)])
def test_lmbda_is_the_share_of_rows_that_are_on_policy(lmbda: float, steps: int) -> None:
    assert sum(on_policy_rows(4, lmbda, step) for step in range(steps)) == round(lmbda * 4 * steps)


def test_off_policy_rows_use_their_own_completion_ids_and_never_generate(tmp_path: Path, monkeypatch) -> None:
    rows = Dataset.from_list([{**r, "completion": "It is so.", "completion_ids": [7, 8, 9]} for r in make_rows()])
    with pytest.warns(OPSDWarning, match="exposure bias"):
        trainer = make_trainer(tmp_path, SameCheckpointTeacher(context="answer_only"), rows=rows, lmbda=0.0)
    monkeypatch.setattr(trainer.model, "generate", lambda *a, **k: pytest.fail("generated"))
    trainer.model.train()
    rollouts = trainer._generate_and_score_completions(list(rows)[:4])
    assert list(rollouts.completion_ids) == [[7, 8, 9]] * 4


def test_a_text_completion_ends_its_turn_and_a_long_one_is_counted(tmp_path: Path) -> None:
    rows = Dataset.from_list([{**r, "completion": "No." if i % 2 else "No. " * 9} for i, r in enumerate(make_rows())])
    with pytest.warns(OPSDWarning):
        trainer = make_trainer(tmp_path, SameCheckpointTeacher(context="answer_only"), rows=rows, lmbda=0.0)
    trainer.model.train()
    rollouts = trainer._generate_and_score_completions(list(rows)[:4])
    assert rollouts.completion_ids[1][-1] == make_tokenizer().eos_token_id
    assert len(rollouts.completion_ids[0]) == 6
    assert trainer._averages["train"].tallies["off_policy/shortened"].result == 0.5


def test_a_run_that_evaluates_trains_on_the_same_rollouts(tmp_path: Path) -> None:
    """Evaluation samples, and moved the random state that training goes on with."""
    eval_rows = Dataset.from_list(make_rows(15)[12:])
    divergences = []
    for kind in ("no", "steps"):
        settings = {"max_steps": 3, "eval_rows": eval_rows, "eval_strategy": kind, "eval_steps": 1}
        trainer = make_trainer(tmp_path / kind, EMATeacher(0.5, context="answer_only"), **settings)
        trainer.train()
        divergences.append(logged(trainer, "divergence"))
    assert divergences[0] == divergences[1]


def test_seq_kd_takes_the_teachers_own_samples(tmp_path: Path) -> None:
    with pytest.warns(OPSDWarning):
        trainer = make_trainer(
            tmp_path, SiblingTeacher(make_llama(5), tokenizer=make_tokenizer()), lmbda=0.0, seq_kd=True
        )
    trainer.model.train()
    torch.manual_seed(0)
    rollouts = trainer._generate_and_score_completions(make_rows(4))
    torch.manual_seed(0)
    expected = trainer.teacher.sample(make_rows(4), max_new_tokens=6, do_sample=True, temperature=1.0, batch_size=4)
    assert list(rollouts.completion_ids) == expected


def test_lmbda_below_one_without_completions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="completion"):
        make_trainer(tmp_path, None, lmbda=0.5)


def test_scored_tokens_are_the_generated_tokens(tmp_path: Path) -> None:
    """Invariant 5: the very ids that `generate` returned reach both sides."""
    trainer = make_trainer(tmp_path, SameCheckpointTeacher(context="worked_solution"))
    sampled: list[list[int]] = []
    original = trainer._generate_single_turn

    def spy(*args, **kwargs):  # type: ignore[no-untyped-def]
        sampled.extend(ids := original(*args, **kwargs))
        return ids

    trainer._generate_single_turn = spy
    trainer.model.train()
    rollouts = trainer._generate_and_score_completions(make_rows(4))
    assert list(rollouts.completion_ids) == sampled
    student, teacher = rollouts.pad("cpu"), rollouts.pad("cpu", trainer.teacher.prompts)
    assert student.scored_ids_N.equal(teacher.scored_ids_N)
    assert len(student.scored_ids_N) == sum(map(len, sampled))


@pytest.mark.parametrize(("teacher", "student"), RUNS)
def test_nan_in_padding_changes_nothing(tmp_path: Path, teacher: str, student: str) -> None:
    """Invariant 2 end to end: states of padded positions are NaN on both sides, loss and gradients are the same."""
    results = []
    for poison in (False, True):
        model = make_student(student)
        trainer = make_trainer(tmp_path / str(poison), MAKE_TEACHER[teacher](), model)
        here = [each for each in trainer.teacher.members if each.lists is None]
        sides = [model, *(each.model for each in here)]  # type: ignore[attr-defined]
        backbones = {id(m): m for side in sides for m in side.modules() if isinstance(m, LlamaModel)}

        def hook(module, args, kwargs, output):  # type: ignore[no-untyped-def]
            is_padding_BL1 = (kwargs["input_ids"] == PAD)[..., None]  # the tiny tokenizer's texts have no such id
            output.last_hidden_state = output.last_hidden_state.masked_fill(is_padding_BL1, float("nan"))
            return output

        for backbone in backbones.values() if poison else ():
            backbone.register_forward_hook(hook, with_kwargs=True)
        loss = trainer.compute_loss(model, trainer._scored(trainer.scorer.prepare_rollouts(make_rollouts())))
        loss.backward()
        results.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (loss, grads), (poisoned_loss, poisoned) = results
    assert torch.equal(loss, poisoned_loss) and math.isfinite(loss) and grads
    for name, g in grads.items():
        assert torch.equal(g, poisoned[name]), name


def test_a_step_without_any_scored_token_changes_nothing(tmp_path: Path) -> None:
    rows = Dataset.from_list([{**r, "completion_ids": [5]} for r in make_rows()])
    with pytest.warns(OPSDWarning):
        trainer = make_trainer(tmp_path, None, rows=rows, lmbda=0.0)
    trainer._completion_ids = lambda row: []
    before = snapshot(trainer.model)
    trainer.train()
    assert not changed(trainer, before)


def test_dropout_of_an_arriving_adapter_is_off(tmp_path: Path) -> None:
    """Rollouts and the teacher see none; with it the same weights would disagree by half a nat."""
    torch.manual_seed(0)
    student = get_peft_model(make_llama(), LoraConfig(**LORA, lora_dropout=0.5))
    move(student)
    trainer = make_trainer(tmp_path, None, student, max_steps=1)
    trainer.train()
    assert abs(logged(trainer, "divergence")[0]) <= 1e-6


def test_how_often_a_context_was_shortened_is_logged(tmp_path: Path) -> None:
    context = PrivilegedContext("worked_solution", truncate="solution", max_prompt_tokens=150)
    rows = Dataset.from_list([{**r, "solution": "add " * 300} for r in make_rows()])
    trainer = make_trainer(tmp_path, SameCheckpointTeacher(context=context), rows=rows)
    trainer.train()
    assert logged(trainer, "context/shortened") == [1.0, 1.0]


def test_completions_are_logged_when_asked(tmp_path: Path, capsys) -> None:
    """TRL's files and its tables for `report_to` are kept; what it prints is the display's."""
    make_trainer(tmp_path, None, log_completions=True, max_steps=1).train()
    assert capsys.readouterr().out.count("student's prompt") == 1
    assert list((tmp_path / "completions").glob("*.parquet"))


def test_the_start_says_teacher_cost_and_divergence(tmp_path: Path, capsys) -> None:
    make_trainer(tmp_path, EMATeacher(0.99, context="answer_only"), "lora")
    out = capsys.readouterr().out
    assert "teacher ← 0.99 · teacher + 0.01 · student" in out
    assert (
        "answer_only" in out and "reverse KL(student ‖ teacher)" in out and "MB of weights beside the student's" in out
    )


def test_moving_the_helper_really_moves(tmp_path: Path) -> None:
    """Guards the helper that many tests rely on."""
    model = make_student("lora")
    before = snapshot(model)
    move(model)
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
