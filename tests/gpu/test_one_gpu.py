"""What only a GPU shows; skipped where there is none. `make gpu` runs it in under ten minutes, and names the card.

Number formats, the compiled loss and the kernel against the float64 twin, quantised students, FlashAttention, vLLM's
rollouts, and how often the host waits for the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama, make_rows, make_tokenizer
from datasets import Dataset
from helpers import LORA, MAKE_TEACHER, changed, logged, make_args, make_rollouts, make_trainer, snapshot
from losses_cases import DIVERGENCE_CASES, name_of, problem
from losses_twin import TOLERANCE, is_close, measured, reference
from peft import LoraConfig
from torch import nn
from transformers import BitsAndBytesConfig

from opsd import EMATeacher, OPSDTrainer, SameCheckpointTeacher
from opsd.doctor import examine
from opsd.losses import Objective
from opsd.rollouts import Rollouts

DEVICE = "cuda"
# Times that the host waits for the device in a micro-batch with one teacher of this process: transformers asks in each
# forward pass whether positions are packed, and the loss whether all tokens have a weight.
WAITS = 3
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; run it there with `make gpu`"),
]


@pytest.fixture(scope="module", autouse=True)
def _card(request: pytest.FixtureRequest) -> None:
    """Print what these tests ran on."""
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    reporter: Any = request.config.pluginmanager.get_plugin("terminalreporter")
    if reporter:
        reporter.write_line(f"GPU: {torch.cuda.get_device_name(0)}, {memory:.0f} GiB, torch {torch.__version__}")


def make_model(**changes: Any) -> nn.Module:
    """A tiny model with heads of 64, which FlashAttention and vLLM take."""
    return make_llama(**{"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, **changes})


def start(folder: Path, teacher: Any = None, **changes: Any) -> OPSDTrainer:
    teacher = teacher or SameCheckpointTeacher(context="answer_only")
    return make_trainer(folder, teacher, make_model(), **{"use_cpu": False, **changes})


def saved_model(folder: Path) -> str:
    make_model().bfloat16().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    return str(folder / "model")


def start_by_name(folder: Path, changes: dict[str, Any], **arguments: Any) -> OPSDTrainer:
    """A run whose model is loaded by its name, as a command loads it."""
    return OPSDTrainer(
        saved_model(folder),
        SameCheckpointTeacher(context="answer_only"),
        args=make_args(folder / "run", **{"use_cpu": False, "bf16": True, **changes}),
        train_dataset=Dataset.from_list(make_rows()),
        **arguments,
    )


def on(value: Any, move: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same record with all its tensors moved."""
    if isinstance(value, torch.Tensor):
        return move(value)
    if isinstance(value, list | tuple):
        return [on(each, move) for each in value]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: on(getattr(value, f.name), move) for f in fields(value) if f.init})
    return value


# ---- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("divergence", DIVERGENCE_CASES[::5], ids=name_of)
def test_the_loss_agrees_with_the_twin(divergence: Any, fused: bool) -> None:
    objective, case = Objective(divergence, compile_loss=fused, loss_budget_mb=0.01), problem(33, v=61, head="bias")
    case = on(case, lambda x: x.float() if x.is_floating_point() else x)
    expected = reference(objective, case)
    result = measured(objective, on(case, lambda x: x.to(DEVICE)))
    of_value, of_gradient = TOLERANCE[torch.float32]
    for name, value in expected.values.items():
        assert is_close(result.values[name].cpu(), value, max(of_value, 1e-5)), name
    for name, gradient in expected.gradients.items():
        assert is_close(result.gradients[name].cpu(), gradient, max(of_gradient, 1e-5)), name


def loss_and_gradient(folder: Path, bf16: bool) -> tuple[float, torch.Tensor]:
    trainer = start(folder, bf16=bf16)
    rollouts = trainer.scorer.prepare_rollouts(make_rollouts(8))
    loss = trainer.compute_loss(trainer.model, trainer._scored(rollouts.with_num_loss_tokens(rollouts.num_scorable)))
    loss.backward()
    gradient = torch.cat([p.grad.flatten().float() for p in trainer.model.parameters() if p.grad is not None])
    return float(loss.detach()), gradient


def test_bfloat16_autocast_gives_the_gradient_of_float32(tmp_path: Path) -> None:
    (loss, exact), (rounded_loss, rounded) = (loss_and_gradient(tmp_path / str(b), b) for b in (False, True))
    assert rounded_loss == pytest.approx(loss, rel=0.03)
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.99


# ---- whole runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("teacher", ["same_checkpoint", "ema"])
def test_a_run_trains_on_the_gpu(teacher: str, bf16: bool, tmp_path: Path) -> None:
    context = "answer_only"
    made = EMATeacher(0.9, context=context) if teacher == "ema" else SameCheckpointTeacher(context=context)
    trainer = start(tmp_path, made, bf16=bf16, max_steps=3)
    assert {p.device.type for p in trainer.model.parameters()} == {DEVICE}
    findings = examine(trainer, only=["alignment"], rows=4).findings
    assert [finding.status for finding in findings] == ["pass", "pass"], [finding.saw for finding in findings]
    before = snapshot(trainer.model)
    trainer.train()
    assert len(logged(trainer, "loss")) == 3 and changed(trainer, before)


def test_the_base_under_an_adapter_is_bfloat16(tmp_path: Path) -> None:
    trainer = start_by_name(tmp_path, {"max_steps": 2}, peft_config=LoraConfig(**LORA))
    dtypes = {p.requires_grad: p.dtype for p in trainer.model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    before = snapshot(trainer.model)
    trainer.train()
    assert all("lora" in name for name in changed(trainer, before))


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_a_quantised_student_trains_its_adapter(tmp_path: Path) -> None:
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    trainer = start_by_name(tmp_path, {"max_steps": 2}, peft_config=LoraConfig(**LORA), quantization_config=quantised)
    before = snapshot(trainer.model)
    trainer.train()
    moved = changed(trainer, before)
    assert moved and all("lora" in name for name in moved)


@pytest.mark.skipif(find_spec("flash_attn") is None, reason="needs flash-attn")
def test_flash_attention_agrees_with_its_teacher(tmp_path: Path) -> None:
    """It refuses float32, so that all that probes the model must run under the run's autocast."""
    attention = {"attn_implementation": "flash_attention_2", "dtype": "float32"}
    trainer = start_by_name(tmp_path, {"max_steps": 2, "model_init_kwargs": attention})
    findings = examine(trainer, only=["alignment"], rows=4).findings
    assert [finding.status for finding in findings] == ["pass", "pass"], [finding.saw for finding in findings]
    trainer.train()
    assert len(logged(trainer, "loss")) == 2


@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vllm")
@pytest.mark.parametrize("teacher", MAKE_TEACHER)
def test_rollouts_of_vllm_are_the_students_own(
    teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Each engine lives until this process ends, so each gets a small share of the memory.
    engine = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.05, "max_steps": 3}
    settings = {**engine, "use_cpu": False, "bf16": True, "max_completion_length": 32, "importance_clip": 2.0}
    trainer = make_trainer(tmp_path / "run", MAKE_TEACHER[teacher](), saved_model(tmp_path), **settings)
    trainer.train()
    assert len(logged(trainer, "loss")) == 3
    assert "not the student's own distribution" not in capsys.readouterr().out


# ---- speed ----------------------------------------------------------------------------------------------------------


def waits_of(step: Callable[[], Any]) -> list[str]:
    """Where the host waited for the device."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{each.filename}:{each.lineno}" for each in caught if "synchroniz" in str(each.message)]


def test_the_host_waits_a_few_times_in_a_micro_batch(tmp_path: Path) -> None:
    trainer = start(tmp_path, bf16=True, gradient_accumulation_steps=4)
    trainer.model.train()
    rollouts: Rollouts = trainer.scorer.prepare_rollouts(make_rollouts(8))

    def micro_batch() -> None:
        inputs = trainer._scored(rollouts.with_num_loss_tokens(rollouts.num_scorable))
        trainer.compute_loss(trainer.model, inputs).backward()

    micro_batch()  # compiles and allocates
    found = waits_of(micro_batch)
    assert len(found) <= WAITS, found
