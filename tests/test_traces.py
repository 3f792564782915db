"""Traces: a bounded sample of rollouts, with the numbers that the loss was computed from."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_rows
from datasets import Dataset
from helpers import make_trainer

from opsd import EMATeacher, RoutedTeacher, SameCheckpointTeacher
from opsd.errors import CheckpointError
from opsd.health.rollout import TracedRollout
from opsd.health.traces import TraceFiles, files_in, read_traces


def run(folder: Path, **settings: Any) -> list[TracedRollout]:
    teacher = EMATeacher(0.9, context="answer_only")
    trainer = make_trainer(folder, teacher, **{"max_steps": 3, "learning_rate": 0.0, **settings})
    trainer.train()
    return list(read_traces(folder))


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_a_trace_has_what_student_and_teacher_gave_each_token(micro_batches: int, tmp_path: Path) -> None:
    """From the definition: two forward passes of one rollout each. At a learning rate of 0 both models stay."""
    teacher = EMATeacher(0.9, context="answer_only")
    sizes = {"per_device_train_batch_size": 8 // micro_batches, "gradient_accumulation_steps": micro_batches}
    trainer = make_trainer(tmp_path, teacher, max_steps=2, learning_rate=0.0, **sizes)
    trainer.train()
    traced, encode = list(read_traces(tmp_path)), trainer.student.tokenizer.encode
    assert len(traced) == 16 and {rollout.step for rollout in traced} == {1, 2}
    for rollout in traced[::3]:
        sides = []
        for prompt in (rollout.prompt, rollout.context):
            ids = encode(prompt, add_special_tokens=False)
            with torch.no_grad():
                logits = trainer.model(torch.tensor([ids + list(rollout.ids)])).logits[0, len(ids) - 1 : -1]
            sides.append(logits.double().log_softmax(-1))
        log_s, log_t = sides
        sampled = torch.tensor(rollout.ids)[:, None]
        expected = {
            "divergence": (log_s.exp() * (log_s - log_t)).sum(-1), "entropy": -(log_s.exp() * log_s).sum(-1),
            "logprob": log_s.gather(-1, sampled)[:, 0], "teacher_logprob": log_t.gather(-1, sampled)[:, 0],
        }  # fmt: skip
        for name, values in expected.items():
            assert getattr(rollout, name) == pytest.approx(values.tolist(), abs=1e-4), name
        assert "The correct answer is" in rollout.context and "The correct answer is" not in rollout.prompt
        assert rollout.text == trainer.student.tokenizer.decode(list(rollout.ids))


def test_a_step_keeps_as_many_as_asked_and_no_run_more_than_its_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(run(tmp_path / "two", trace_rollouts=2)) == 6
    assert run(tmp_path / "none", trace_rollouts=0) == [] and not (tmp_path / "none" / "traces").exists()
    small = run(tmp_path / "small", trace_mb=1e-4, save_strategy="steps", save_steps=1)
    assert {rollout.step for rollout in small} == {1, 3}  # the first file and the last one
    assert capsys.readouterr().out.count("every second file is removed, then and later. Raise trace_mb") == 1


def test_siblings_are_traced_in_pairs(tmp_path: Path) -> None:
    """A random sample of a large batch has hardly two rollouts of a prompt, and none can be compared."""
    made = run(tmp_path, num_generations=4, per_device_train_batch_size=8, trace_rollouts=4, max_steps=1)
    assert sorted(Counter(rollout.prompt for rollout in made).values()) == [2, 2]


def test_what_no_teacher_saw_has_no_divergence(tmp_path: Path) -> None:
    def low(completion_ids: Any, **columns: Any) -> list[float]:
        return [float(ids[0] < 200) for ids in completion_ids]

    settings = {"reward_funcs": low, "num_generations": 4, "distill_on": "wrong", "grpo_coef": 0.1}
    made = run(tmp_path, per_device_train_batch_size=8, trace_rollouts=8, max_steps=2, **settings)
    assert {rollout.reward for rollout in made} == {0.0, 1.0}
    for rollout in made:
        unknown = [math.isnan(value) for value in (*rollout.divergence, *rollout.teacher_logprob)]
        assert all(unknown) if rollout.reward else not any(unknown)
        assert not any(math.isnan(value) for value in rollout.logprob)


def test_rewards_and_cut_rollouts_are_known(tmp_path: Path) -> None:
    def low(completion_ids: Any, **columns: Any) -> list[float]:
        return [float(ids[0] < 200) for ids in completion_ids]

    trainer = make_trainer(tmp_path, EMATeacher(0.9, context="answer_only"), max_steps=2, reward_funcs=low)
    trainer.train()
    for rollout in read_traces(tmp_path):
        assert rollout.reward == float(rollout.ids[0] < 200)
        assert rollout.ended == (rollout.ids[-1] == trainer.student.tokenizer.eos_token_id)
    assert all(math.isnan(rollout.reward) for rollout in run(tmp_path / "ungraded"))


def test_a_resumed_run_has_the_traces_of_a_run_without_a_stop(tmp_path: Path) -> None:
    settings = {"max_steps": 4, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
    whole = run(tmp_path / "whole", **settings)
    teacher = EMATeacher(0.9, context="answer_only")
    make_trainer(tmp_path / "two", teacher, **settings).train()  # writes steps 3 and 4, which then come again
    trainer = make_trainer(tmp_path / "two", EMATeacher(0.9, context="answer_only"), **settings)
    for path in (tmp_path / "two").glob("checkpoint-4/*"):
        path.unlink()
    trainer.train(resume_from_checkpoint=True)
    again = list(read_traces(tmp_path / "two"))
    assert [(r.step, list(r.ids)) for r in again] == [(r.step, list(r.ids)) for r in whole]
    assert [r.divergence for r in again] == [pytest.approx(r.divergence, abs=1e-5) for r in whole]


def test_a_new_run_removes_the_traces_of_the_old_one_and_a_stretch_is_cut(tmp_path: Path) -> None:
    made = run(tmp_path / "run")
    files = TraceFiles(tmp_path / "other", megabytes=1)
    files.write(made)
    files.begin(2)
    assert {rollout.step for rollout in read_traces(tmp_path / "other")} == {1, 2}
    assert [(first, last) for first, last, _ in files_in(files.folder)] == [(1, 2)]
    files.begin(0)
    assert not files_in(files.folder)
    files.write([replace(made[0], step=9)])
    files_in(files.folder)[0][2].write_bytes(b"PAR1 half a file")
    with pytest.raises(CheckpointError, match=r"steps-000009-000009.parquet is damaged"):
        list(read_traces(tmp_path / "other"))


def test_each_row_has_the_prompt_of_its_own_teacher(tmp_path: Path) -> None:
    rows = Dataset.from_list([{**row, "kind": "ab"[n % 2]} for n, row in enumerate(make_rows(16))])
    answer, plain = EMATeacher(0.9, context="answer_only"), SameCheckpointTeacher()
    trainer = make_trainer(tmp_path, RoutedTeacher("kind", {"a": answer, "b": plain}), rows=rows, max_steps=3)
    trainer.train()
    told = ["The correct answer is" in rollout.context for rollout in read_traces(tmp_path)]
    assert any(told) and not all(told)


def test_a_disk_that_is_full_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "traces").write_text("a file where the folder should be")
    trainer = make_trainer(tmp_path, "ema", max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2 and "traces      not written" in capsys.readouterr().out


def test_tokens_that_are_not_scored_are_there_without_numbers(tmp_path: Path) -> None:
    for traced in run(tmp_path, skip_first_tokens=2):
        assert all(math.isnan(nats) for nats in traced.divergence[:2])
        assert not any(math.isnan(nats) for nats in traced.divergence[2:])
        assert len(traced.tokens) == len(traced.ids) == len(traced.divergence)


def test_a_run_that_breaks_off_keeps_its_traces(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, EMATeacher(0.9, context="answer_only"), max_steps=5)
    norm = trainer._get_grad_norm

    def breaking(model: Any, grad_norm: Any = None) -> Any:
        if trainer.state.global_step == 3:
            raise MemoryError
        return norm(model, grad_norm)

    trainer._get_grad_norm = breaking  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        trainer.train()
    assert {rollout.step for rollout in read_traces(tmp_path)} == {1, 2, 3, 4}
