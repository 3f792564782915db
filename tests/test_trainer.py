"""The loop on a real tiny model: what it samples, trains, logs, refuses, saves and resumes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import make_llama, make_rows, make_tokenizer
from datasets import Dataset, IterableDataset
from helpers import LORA, STUDENTS, make_args, make_rollouts, make_student, make_trainer, move, snapshot
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from opsd import (
    EMATeacher,
    LiveTeacher,
    OPSDConfig,
    OPSDTrainer,
    PrivilegedContext,
    SameCheckpointTeacher,
    SiblingTeacher,
    shipped,
)
from opsd.errors import CheckpointError, ConfigError, DataError, NonFiniteLossError, OPSDWarning, TemplateError
from opsd.models import without_autocast
from opsd.sampler import EpochSampler

MAKE_TEACHER = {
    "same_checkpoint": lambda: SameCheckpointTeacher(context="answer_only"),
    "live": lambda: LiveTeacher(context="worked_solution"),
    "ema": lambda: EMATeacher(0.8, context="answer_only"),
    "sibling": lambda: SiblingTeacher(make_llama(5), tokenizer=make_tokenizer(), context="answer_only"),
}


def logged(trainer: OPSDTrainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def changed(trainer: OPSDTrainer, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}


# ---- learning ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("teacher", MAKE_TEACHER)
def test_training_moves_the_trainable_weights_and_nothing_else(tmp_path: Path, teacher: str, student: str) -> None:
    trainer = make_trainer(tmp_path, MAKE_TEACHER[teacher](), student)
    before = snapshot(trainer.model)
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert changed(trainer, before) and changed(trainer, before) <= trainable
    assert all(d > 0 for d in logged(trainer, "divergence"))


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
        whole = trainer.teacher.show(rollouts).sorted_by_length().normalised_by(rollouts.num_scorable)
        for part in whole.split(steps):
            trainer.compute_loss(trainer.model, trainer._scored(part)).backward()
        gradients.append({n: p.grad.clone() for n, p in trainer.model.named_parameters()})
    for name, g in gradients[0].items():
        assert torch.allclose(g, gradients[1][name], rtol=1e-4, atol=1e-7), name


# ---- rows -------------------------------------------------------------------------------------------------------


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
    with pytest.raises(TemplateError, match="document"):
        make_trainer(tmp_path / "b", SameCheckpointTeacher(context="document"), rows=stream)


def test_evaluation_reports_the_divergence_and_keeps_the_training_mode(tmp_path: Path) -> None:
    trainer = OPSDTrainer(
        make_llama(),
        SameCheckpointTeacher(context="answer_only"),
        args=make_args(tmp_path, eval_strategy="steps", eval_steps=1),
        train_dataset=Dataset.from_list(make_rows()),
        eval_dataset=Dataset.from_list(make_rows(5)),
        processing_class=make_tokenizer(),
    )
    trainer.train()
    assert len(logged(trainer, "eval_loss")) == 2 and all(v > 0 for v in logged(trainer, "eval_divergence"))


# ---- lmbda ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lmbda", "steps"), [(0.0, 4), (0.3, 10), (0.5, 4), (0.75, 4), (1.0, 3)])
def test_lmbda_is_the_share_of_rows_that_are_on_policy(tmp_path: Path, lmbda: float, steps: int) -> None:
    rows = Dataset.from_list([{**r, "completion_ids": [7, 8, 9]} for r in make_rows()])
    with pytest.warns(OPSDWarning) if lmbda < 0.5 else _nothing():
        trainer = make_trainer(tmp_path, SameCheckpointTeacher(context="answer_only"), rows=rows, lmbda=lmbda)
    sampled = 0
    for step in range(steps):
        trainer.state.global_step = step
        sampled += trainer._on_policy_rows(4)
    assert sampled == round(lmbda * 4 * steps)


class _nothing:  # noqa: N801
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


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
    assert trainer._metrics["train"]["off_policy/shortened"] == [0.5]


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


# ---- invariants in the loop -------------------------------------------------------------------------------------


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
    student, teacher = rollouts.pad("cpu"), rollouts.pad("cpu", "same_checkpoint")
    assert student.scored_ids_N.equal(teacher.scored_ids_N)
    assert len(student.scored_ids_N) == sum(map(len, sampled))


def test_nan_in_padding_changes_nothing(tmp_path: Path) -> None:
    """Invariant 2 end to end: states of padded positions are NaN, loss and gradients are the same."""
    results = []
    for poison in (False, True):
        model = make_llama()
        trainer = make_trainer(tmp_path / str(poison), SameCheckpointTeacher(context="answer_only"), model)

        def hook(module, args, kwargs, output):  # type: ignore[no-untyped-def]
            mask = kwargs["attention_mask"].bool() if kwargs["attention_mask"].dim() == 2 else None
            if mask is not None:
                output.last_hidden_state = output.last_hidden_state.masked_fill(~mask[..., None], float("nan"))
            return output

        if poison:
            model.model.register_forward_hook(hook, with_kwargs=True)
        loss = trainer.compute_loss(model, trainer._scored(trainer.teacher.show(make_rollouts())))
        loss.backward()
        results.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    (loss, grads), (poisoned_loss, poisoned) = results
    assert torch.equal(loss, poisoned_loss) and math.isfinite(loss)
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


# ---- checkpoints and resume -------------------------------------------------------------------------------------

RESUME = [("ema", "full"), ("ema", "lora"), ("ema", "arriving adapter"), ("same_checkpoint", "full"),
          ("same_checkpoint", "arriving adapter"), ("live", "lora")]  # fmt: skip


@pytest.mark.parametrize("stop", [2, 5])  # in epoch 0 and in epoch 1: three steps make an epoch of twelve rows
@pytest.mark.parametrize(("teacher", "student"), RESUME)
def test_a_resumed_run_is_the_run_without_the_stop(tmp_path: Path, teacher: str, student: str, stop: int) -> None:
    """Invariant 6: weights, teacher, random state and log, to the last bit."""
    settings = {"max_steps": 7, "save_strategy": "steps", "save_steps": 1, "learning_rate": 5e-3}
    whole = make_trainer(tmp_path / "whole", MAKE_TEACHER[teacher](), student, **settings)
    whole.train()
    random_state = torch.get_rng_state()
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{stop}", tmp_path / "again" / f"checkpoint-{stop}")
    torch.manual_seed(123)
    again = make_trainer(tmp_path / "again", MAKE_TEACHER[teacher](), student, **settings)
    again.train(resume_from_checkpoint=True)
    for (name, a), (_, b) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    for name, value in whole.teacher.state_dict().items():
        assert torch.equal(value, again.teacher.state_dict()[name]), name
    assert logged(whole, "divergence") == logged(again, "divergence")
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_average_follows_every_step_of_a_run_and_is_in_that_steps_checkpoint(tmp_path: Path) -> None:
    """A teacher that is never told of a step, or told after the save, fails here."""
    trainer = make_trainer(tmp_path, MAKE_TEACHER["ema"](), max_steps=3, save_strategy="steps", save_steps=1)
    average = {name: value.clone() for name, value in trainer.teacher.state_dict().items()}
    trainer.train()
    for step in (1, 2, 3):
        student = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        saved = load_file(tmp_path / f"checkpoint-{step}" / "opsd_teacher.safetensors")
        for name in average:
            average[name] = 0.8 * average[name] + 0.2 * student[name]
            assert torch.allclose(saved[name], average[name], atol=1e-7), (step, name)
    assert any(not torch.equal(average[name], student[name]) for name in average)


def test_epochs_have_orders_of_their_own_and_repeat_batches_for_accumulation() -> None:
    epoch = 0
    sampler = EpochSampler(10, batch_size=4, repeats=2, shuffle=True, seed=3, epoch=lambda: epoch)
    first = list(sampler)
    assert first == list(sampler) and len(first) == len(sampler) == 16
    assert first[:4] == first[4:8] and len(set(first)) == 8
    epoch = 1
    assert list(sampler) != first


def test_the_teacher_stays_out_of_the_final_model(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, EMATeacher(0.9, context="answer_only"), "lora", save_strategy="steps", save_steps=1
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert not list((tmp_path / "final").glob("**/*teacher*"))
    assert [p.name for p in (tmp_path / "final").rglob("adapter_model.safetensors")] == ["adapter_model.safetensors"]
    assert (tmp_path / "checkpoint-1" / "opsd_teacher.safetensors").is_file()


def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, capsys) -> None:
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, MAKE_TEACHER["ema"](), **settings).train()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text("{")
    again = make_trainer(tmp_path, MAKE_TEACHER["ema"](), **settings)
    again.train(resume_from_checkpoint=True)
    assert "checkpoint-3 was passed over: its trainer_state.json is cut short" in capsys.readouterr().out


def test_a_foreign_checkpoint_or_other_settings_are_refused_on_resume(tmp_path: Path) -> None:
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, EMATeacher(0.9, context="answer_only"), **settings).train()
    for other in (EMATeacher(0.99, context="answer_only"), EMATeacher(0.9, context="hint"), LiveTeacher()):
        rows = Dataset.from_list([{**r, "hint": "x"} for r in make_rows()])
        with pytest.raises(CheckpointError, match="made by a run with other settings"):
            make_trainer(tmp_path, other, rows=rows, **settings).train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-1" / "opsd_teacher.json").unlink()
    with pytest.raises(CheckpointError, match="not a checkpoint of opsd"):
        make_trainer(tmp_path, EMATeacher(0.9, context="answer_only"), **settings).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-1")
        )


def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path, None, max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(CheckpointError, match="already holds a run"):
        make_trainer(tmp_path, None).train()


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written to"):
        make_trainer(tmp_path / "file" / "run", None).train()


def test_resuming_from_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        make_trainer(tmp_path, None).train(resume_from_checkpoint=True)


# ---- what breaks ------------------------------------------------------------------------------------------------


def test_nan_in_the_loss_stops_before_the_update_and_names_step_and_rows(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, MAKE_TEACHER["same_checkpoint"](), max_steps=4, save_strategy="steps", save_steps=1
    )

    class Break(torch.nn.Module):
        calls = 0

    original = trainer.teacher.score

    def score(rollouts):  # type: ignore[no-untyped-def]
        signal = original(rollouts)
        Break.calls += 1
        if Break.calls == 5:
            signal.hidden_ND[0] = float("nan")
        return signal

    trainer.teacher.score = score
    with pytest.raises(NonFiniteLossError, match=r"step 3.*NaN or infinite in 1 row[\s\S]*What is"):
        trainer.train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_a_prompt_beyond_the_models_context_is_refused_by_row_before_step_one(tmp_path: Path) -> None:
    rows = Dataset.from_list([*make_rows(7), {**make_rows(1)[0], "solution": "long " * 600}])
    for context in ("worked_solution", PrivilegedContext("worked_solution", max_prompt_tokens=200)):
        with pytest.raises(DataError, match=r"row 7: .*tokens"):
            make_trainer(tmp_path, SameCheckpointTeacher(context=context), rows=rows)


def test_a_dataset_smaller_than_one_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 3 row"):
        make_trainer(tmp_path, None, rows=Dataset.from_list(make_rows(3))).train()


def test_a_frozen_adapter_is_refused(tmp_path: Path) -> None:
    student = make_student("lora").requires_grad_(False)
    with pytest.raises(ConfigError, match="is_trainable=True"):
        make_trainer(tmp_path, None, student)


def test_a_model_whose_head_has_another_transform_is_refused(tmp_path: Path) -> None:
    model = make_llama()
    forward = model.forward

    def shifted(*a, **k):  # type: ignore[no-untyped-def]
        out = forward(*a, **k)
        out.logits = out.logits + torch.arange(out.logits.shape[-1])
        return out

    model.forward = shifted
    with pytest.raises(TypeError, match="LlamaForCausalLM: logits computed from the last hidden states"):
        make_trainer(tmp_path, None, model)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lmbda": 1.5}, "between 0 and 1"),
        ({"lmbda": float("nan")}, "between 0 and 1"),
        ({"beta": -0.2}, "between 0 and 1"),
        ({"temperature": 0.0}, "above 0"),
        ({"max_completion_length": 0}, "at least 1"),
    ],
)
def test_settings_outside_their_range_are_refused(tmp_path: Path, setting: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_args(tmp_path, **setting)


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"lmbda": 0.2}, "exposure bias"), ({"seq_kd": True}, "no effect"), ({"beta": 0.01}, "nearly vanish")],
)
def test_settings_that_are_probably_not_meant_warn(tmp_path: Path, setting: dict, message: str) -> None:
    with pytest.warns(OPSDWarning, match=message):
        make_args(tmp_path, **setting)


def test_the_number_format_is_measured_stored_and_reused(tmp_path: Path, monkeypatch) -> None:
    from opsd import precision

    monkeypatch.setattr(precision, "measure_bf16_speedup", lambda: 6.0)
    assert OPSDConfig(str(tmp_path), use_cpu=True).bf16 is True
    monkeypatch.setattr(precision, "measure_bf16_speedup", lambda: 0.01)
    assert OPSDConfig(str(tmp_path), use_cpu=True).bf16 is False
    precision.store_choice(tmp_path, True)
    assert OPSDConfig(str(tmp_path), use_cpu=True).bf16 is False, "nothing to resume yet"
    (tmp_path / "checkpoint-1").mkdir()
    assert OPSDConfig(str(tmp_path), use_cpu=True).bf16 is True
    assert json.loads((tmp_path / precision.FILE).read_text()) == {"bf16": True}


def test_a_cpu_where_bf16_wins_needs_no_further_word(tmp_path: Path, monkeypatch) -> None:
    """transformers refuses bf16 without a GPU unless use_cpu is set; a user who set nothing must not meet that."""
    from opsd import precision

    monkeypatch.setattr(precision, "measure_bf16_speedup", lambda: 6.0)
    args = OPSDConfig(str(tmp_path))
    assert args.bf16 and args.use_cpu == (not torch.accelerator.is_available())


@pytest.mark.parametrize("student", ["full", "lora"])
def test_a_student_from_a_bf16_trainer_is_taken_as_it_is(tmp_path: Path, student: str) -> None:
    """TRL's SFTTrainer leaves a bf16 wrapper on the model's forward: sharpening after SFT met it on every GPU."""
    model = make_student(student)
    AcceleratorState._reset_state()
    Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    AcceleratorState._reset_state()
    probe = torch.tensor([[5, 6, 7]])
    assert not torch.equal(model(probe).logits, without_autocast(make_student(student))(probe).logits)
    trainer = make_trainer(tmp_path, SameCheckpointTeacher(context="answer_only"), model)
    trainer.train()
    assert logged(trainer, "divergence")[0] > 0


def test_the_measurement_itself_is_quick_and_positive() -> None:
    import time

    from opsd.precision import measure_bf16_speedup

    start = time.perf_counter()
    assert measure_bf16_speedup() > 0
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("student", ["full", "lora"])
def test_bfloat16_reaches_sampling_scoring_and_the_loss(tmp_path: Path, student: str, monkeypatch) -> None:
    """accelerate wraps `forward`, and the loss goes around it: without our own autocast bf16 would do nothing."""
    import opsd.teachers.local
    import opsd.trainer
    from opsd.forward import last_hidden

    trainer = make_trainer(tmp_path, SameCheckpointTeacher(context="answer_only"), student, bf16=True, max_steps=1)
    seen: dict[str, torch.dtype] = {}

    def spy(name: str):  # type: ignore[no-untyped-def]
        def hidden(*args):  # type: ignore[no-untyped-def]
            seen[name] = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
            return last_hidden(*args)

        return hidden

    monkeypatch.setattr(opsd.trainer, "last_hidden", spy("student"))
    monkeypatch.setattr(opsd.teachers.local, "last_hidden", spy("teacher"))
    original = trainer.model.generate
    monkeypatch.setattr(
        trainer.model,
        "generate",
        lambda *a, **k: seen.update(sampling=torch.get_autocast_dtype("cpu")) or original(*a, **k),
    )
    trainer.train()
    assert seen == dict.fromkeys(("sampling", "teacher", "student"), torch.bfloat16)
    assert logged(trainer, "divergence")[0] > 0
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_dropout_of_an_arriving_adapter_is_off(tmp_path: Path) -> None:
    """Rollouts and the teacher see none; with it the same weights would disagree by half a nat."""
    torch.manual_seed(0)
    student = get_peft_model(make_llama(), LoraConfig(**LORA, lora_dropout=0.5))
    move(student)
    trainer = make_trainer(tmp_path, None, student, max_steps=1)
    trainer.train()
    assert abs(logged(trainer, "divergence")[0]) <= 1e-6


def test_a_gradient_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, MAKE_TEACHER["same_checkpoint"](), max_steps=3)
    before = snapshot(trainer.model)
    next(trainer.model.parameters()).register_hook(lambda g: g * float("inf"))
    with pytest.raises(NonFiniteLossError, match="step 1: the gradient is not finite"):
        trainer.train()
    assert not changed(trainer, before)


def test_a_run_that_broke_in_mid_step_can_be_trained_again(tmp_path: Path) -> None:
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    trainer = make_trainer(tmp_path, MAKE_TEACHER["same_checkpoint"](), **settings)
    original, calls = trainer.teacher.score, iter(range(99))
    trainer.teacher.score = lambda r: original(r) if next(calls) != 3 else _raise(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.teacher.score = original
    trainer.train(resume_from_checkpoint=True)
    whole = make_trainer(tmp_path / "whole", MAKE_TEACHER["same_checkpoint"](), **settings)
    whole.train()
    for (name, a), (_, b) in zip(whole.model.named_parameters(), trainer.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def _raise(error: BaseException) -> None:
    raise error


def test_a_stream_that_ends_before_one_step_is_an_error(tmp_path: Path) -> None:
    stream = IterableDataset.from_generator(lambda: iter(make_rows(3)))
    with pytest.raises(DataError, match="before one step of 4 rows"):
        make_trainer(tmp_path, None, rows=stream).train()


def test_another_base_model_or_template_text_is_refused_on_resume(tmp_path: Path) -> None:
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    template = tmp_path / "mine.jinja"
    source = (shipped.folder("templates") / "answer_only.jinja").read_text()
    template.write_text(source)
    teacher = lambda: SameCheckpointTeacher(context=str(template))  # noqa: E731
    make_trainer(tmp_path / "run", teacher(), **settings).train()
    with pytest.raises(CheckpointError, match="student: "):
        make_trainer(tmp_path / "run", teacher(), make_llama(9), **settings).train(resume_from_checkpoint=True)
    template.write_text(source.replace("correct", "right"))
    with pytest.raises(CheckpointError, match="digest"):
        make_trainer(tmp_path / "run", teacher(), **settings).train(resume_from_checkpoint=True)


def test_a_folder_that_holds_a_model_is_refused(tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="already holds a model"):
        make_trainer(tmp_path, None).train()


def test_a_token_in_the_settings_is_refused(tmp_path: Path) -> None:
    """transformers would pickle it into every checkpoint."""
    with pytest.raises(ConfigError, match="HF_TOKEN"):
        make_args(tmp_path, hub_token="hf_abc")


def test_how_often_a_context_was_shortened_is_logged(tmp_path: Path) -> None:
    context = PrivilegedContext("worked_solution", truncate="solution", max_prompt_tokens=150)
    rows = Dataset.from_list([{**r, "solution": "add " * 300} for r in make_rows()])
    trainer = make_trainer(tmp_path, SameCheckpointTeacher(context=context), rows=rows)
    trainer.train()
    assert logged(trainer, "context/shortened") == [1.0, 1.0]


def test_completions_are_logged_when_asked(tmp_path: Path, capsys) -> None:
    make_trainer(tmp_path, None, log_completions=True, max_steps=1).train()
    assert list((tmp_path / "completions").glob("*.parquet"))


def test_the_start_says_teacher_cost_and_divergence(tmp_path: Path, capsys) -> None:
    make_trainer(tmp_path, EMATeacher(0.99, context="answer_only"), "lora")
    out = capsys.readouterr().out
    assert "teacher ← 0.99 · teacher + 0.01 · student" in out
    assert "answer_only" in out and "reverse KL(student ‖ teacher)" in out and "MB of extra weights" in out


def test_moving_the_helper_really_moves(tmp_path: Path) -> None:
    """Guards the helper that many tests rely on."""
    model = make_student("lora")
    before = snapshot(model)
    move(model)
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
