"""The number format of a run: chosen by what the machine has, stored with the run, and kept on resume."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers import logged, make_student, make_trainer

from opsd import OPSDConfig, SameCheckpointTeacher
from opsd.errors import OPSDWarning
from opsd.models.loading import without_autocast
from opsd.training import checkpoints
from opsd.training.machine import choose_bf16, hardware

BF16, NO_BF16 = {"avx512_bf16": True}, {"avx512_f": True}
CHECKPOINTS: dict[str, Any] = {"bf16": None, "max_steps": 1, "save_strategy": "steps", "save_steps": 1}


def set_cpu(monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool]) -> None:
    """Let torch report another CPU."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)


@pytest.mark.parametrize(
    ("capabilities", "bf16"),
    [(BF16, True), ({"amx_bf16": True, "avx512_bf16": False}, True), (NO_BF16, False), ({}, False)],
)
def test_a_cpu_with_bfloat16_instructions_trains_in_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], bf16: bool
) -> None:
    set_cpu(monkeypatch, capabilities)
    assert choose_bf16(use_cpu=True) is bf16


@pytest.mark.parametrize(
    ("capabilities", "words"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": True, "amx_bf16": True}, ", AMX"),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": True}, ", AVX-512 with bfloat16"),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, ", AVX-512"),
        ({"avx2": True}, ", AVX2"),
    ],
)
def test_the_hardware_names_a_cpus_instructions(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], words: str
) -> None:
    """Machines of one name differ: of two that are called AMD EPYC, one multiplied bfloat16 1,500 times as fast."""
    set_cpu(monkeypatch, capabilities)
    assert hardware()["cpu"].endswith(words)


def test_torch_without_its_fast_kernels_trains_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wheels for macOS have no oneDNN: bfloat16 would be emulated, whatever the CPU has."""
    set_cpu(monkeypatch, BF16)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert choose_bf16(use_cpu=True) is False


def test_a_torch_without_the_public_query_is_asked_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = choose_bf16(use_cpu=True)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: expected)
    assert choose_bf16(use_cpu=True) is expected


def test_a_cpu_where_bf16_wins_needs_no_other_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers refuses bf16 without a GPU unless use_cpu is set; a user who set nothing must not meet that."""
    set_cpu(monkeypatch, BF16)
    args = OPSDConfig(str(tmp_path))
    assert args.bf16 and args.use_cpu == (not torch.accelerator.is_available())


@pytest.mark.parametrize("bf16", [True, False, None])
@pytest.mark.parametrize("capabilities", [BF16, NO_BF16])
def test_bfloat16_that_a_cpu_emulates_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], bf16: bool | None
) -> None:
    set_cpu(monkeypatch, capabilities)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        OPSDConfig(str(tmp_path), use_cpu=True, bf16=bf16)
    is_named = any("this CPU has no instructions for bfloat16" in str(warning.message) for warning in caught)
    assert is_named == (bf16 is True and capabilities is NO_BF16)


@pytest.mark.parametrize("first", [True, False])
def test_a_resumed_run_keeps_its_format_on_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    set_cpu(monkeypatch, BF16 if first else NO_BF16)
    make_trainer(tmp_path, **CHECKPOINTS).train()
    assert json.loads((tmp_path / checkpoints.NUMBER_FORMAT).read_text()) == {"bf16": first}
    set_cpu(monkeypatch, NO_BF16 if first else BF16)
    trainer = make_trainer(tmp_path, **{**CHECKPOINTS, "max_steps": 2, "allow_changes": ["max_steps"]})
    assert trainer.args.bf16 is first
    assert trainer.accelerator.mixed_precision == ("bf16" if first else "no")
    with pytest.warns(OPSDWarning, match="the run goes on with other versions or hardware"):
        trainer.train(resume_from_checkpoint=True)
    assert json.loads((tmp_path / checkpoints.NUMBER_FORMAT).read_text()) == {"bf16": first}


def test_a_format_that_the_user_sets_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_cpu(monkeypatch, BF16)
    make_trainer(tmp_path, **CHECKPOINTS).train()
    assert make_trainer(tmp_path, **{**CHECKPOINTS, "bf16": False}).args.bf16 is False


def test_a_stored_format_without_a_checkpoint_is_another_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.store_number_format(tmp_path, True)
    set_cpu(monkeypatch, NO_BF16)
    assert make_trainer(tmp_path, bf16=None).args.bf16 is False


def test_making_a_config_reads_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.store_number_format(tmp_path, True)
    (tmp_path / "checkpoint-1").mkdir()
    set_cpu(monkeypatch, NO_BF16)
    assert OPSDConfig(str(tmp_path), use_cpu=True).bf16 is False


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


@pytest.mark.parametrize("student", ["full", "lora"])
def test_bfloat16_reaches_sampling_scoring_and_the_loss(tmp_path: Path, student: str, monkeypatch) -> None:
    """accelerate wraps `forward`, and the loss goes around it: without our own autocast bf16 would do nothing."""
    import opsd.teachers.local
    import opsd.training.loss
    from opsd.models.passes import scored_hidden

    trainer = make_trainer(tmp_path, SameCheckpointTeacher(context="answer_only"), student, bf16=True, max_steps=1)
    seen: dict[str, torch.dtype] = {}

    def spy(name: str):  # type: ignore[no-untyped-def]
        def hidden(*args, **kwargs):  # type: ignore[no-untyped-def]
            seen[name] = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
            return scored_hidden(*args, **kwargs)

        return hidden

    monkeypatch.setattr(opsd.training.loss, "scored_hidden", spy("student"))
    monkeypatch.setattr(opsd.teachers.local, "scored_hidden", spy("teacher"))
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
