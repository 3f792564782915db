"""What trains is float32: 16-bit weights are refused, and adapters on them widened."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_llama, make_rows, make_tokenizer
from datasets import Dataset
from helpers import LORA, changed, make_args, make_trainer, snapshot
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from opsd import EMATeacher, OPSDTrainer
from opsd.commands.build import build_trainer
from opsd.commands.run_file import read_run
from opsd.doctor import examine
from opsd.errors import ConfigError
from opsd.training.precision import choose_dtype

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def trainer_of(folder: Path, model: Any, peft_config: LoraConfig | None = None, **changes: Any) -> OPSDTrainer:
    rows, args = Dataset.from_list(make_rows()), make_args(folder, **changes)
    tokenizer = None if isinstance(model, str) else make_tokenizer()
    return OPSDTrainer(
        model, EMATeacher(0.9, context="answer_only"), args=args, train_dataset=rows, peft_config=peft_config,
        processing_class=tokenizer,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "autocast"])
def test_a_loaded_model_in_16_bits_is_refused_where_its_weights_train(tmp_path: Path, dtype: str, bf16: bool) -> None:
    """At TRL's default learning rate nearly all of its updates were rounded away, and nothing said so."""
    with pytest.raises(ConfigError, match=rf"must be float32, and 20 tensors .* torch.{dtype} \(first: .*LoraConfig"):
        trainer_of(tmp_path, make_llama().to(HALF[dtype]), bf16=bf16)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "auto", None], ids=str)
def test_a_model_by_name_in_16_bits_is_refused_before_it_loads(tmp_path: Path, dtype: Any, monkeypatch: Any) -> None:
    make_llama().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setattr("trl.trainer.distillation_trainer.create_model_from_path", None)
    with pytest.raises(ConfigError, match=r"loads them in torch.b?float16.*--dtype float32"):
        trainer_of(tmp_path, str(tmp_path / "model"), model_init_kwargs={"dtype": dtype})


@pytest.mark.parametrize("kwargs", [None, {}, {"dtype": "float32"}], ids=str)
def test_a_model_by_name_trains_in_float32_whatever_its_file_holds(tmp_path: Path, kwargs: Any) -> None:
    make_llama().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    trainer = trainer_of(tmp_path, str(tmp_path / "model"), model_init_kwargs=kwargs)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_a_dtype_on_the_command_line_is_refused_in_the_same_way(tmp_path: Path, llama_folder: str) -> None:
    Dataset.from_list(make_rows()).to_json(tmp_path / "rows.jsonl")
    words = f"--model_name_or_path {llama_folder} --dataset_name {tmp_path}/rows.jsonl --output_dir {tmp_path}/run"
    run = read_run(None, f"{words} --context answer_only --use_cpu --bf16 false --dtype bfloat16".split())
    with pytest.raises(ConfigError, match=r"torch.bfloat16.*--use_peft"):
        build_trainer(run)


def base(dtype: torch.dtype, folder: Path) -> Any:
    make_llama().save_pretrained(folder / "base")
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)


ADAPTERS = {
    "made by the run": lambda model: (model, LoraConfig(**LORA)),
    "arrives": lambda model: (get_peft_model(model, LoraConfig(**LORA)), None),
    "arrives in 16 bits": lambda model: (get_peft_model(model, LoraConfig(**LORA), autocast_adapter_dtype=False), None),
    "with new tokens": lambda model: (
        get_peft_model(model, LoraConfig(**LORA, trainable_token_indices=[1, 2]), autocast_adapter_dtype=False),
        None,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_on_16_bit_weights_trains_in_float32(tmp_path: Path, kind: str, bf16: bool, capsys: Any) -> None:
    model, config = ADAPTERS[kind](base(torch.bfloat16, tmp_path))
    trainer = trainer_of(tmp_path, model, config, bf16=bf16)
    trains = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in trainer.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert ("tensors came in bfloat16, and train in float32" in capsys.readouterr().out) == (
        kind not in list(ADAPTERS)[:2]
    )
    before = snapshot(trainer.model)
    trainer.train()
    assert changed(trainer, before) == trains


@pytest.mark.parametrize("extra", [{"modules_to_save": ["norm"]}, {"bias": "all"}], ids=str)
def test_16_bit_weights_beside_an_adapter_are_refused(tmp_path: Path, extra: dict[str, Any]) -> None:
    model = make_llama(attention_bias=True).to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"tensors beside the adapter \(modules_to_save, bias, .*torch.bfloat16"):
        trainer_of(tmp_path, get_peft_model(model, LoraConfig(**LORA, **extra)))


def test_float32_students_are_left_as_they_are(tmp_path: Path, capsys: Any) -> None:
    model = make_llama()
    pointers = [p.data_ptr() for p in model.parameters()]
    make_trainer(tmp_path, EMATeacher(0.9, context="answer_only"), model)
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert "train in float32" not in capsys.readouterr().out


def test_the_share_of_bfloat16_weights_that_do_not_move_is_the_one_in_the_message() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {dtype: torch.nn.Parameter(torch.empty(20_000, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)}
    start = 0.02 * torch.randn(20_000, generator=generator)  # Llama's initializer_range
    for dtype, weight in weights.items():
        weight.data.copy_(start.to(torch.bfloat16))
        optimizer = torch.optim.AdamW([weight], lr=1e-6, weight_decay=0.0)
        for _ in range(100):
            weight.grad = torch.randn(20_000, generator=generator).to(dtype)
            optimizer.step()
    moved = {dtype: float((w != start.to(torch.bfloat16).to(dtype)).float().mean()) for dtype, w in weights.items()}
    assert moved[torch.float32] > 0.99 and 0.97 < 1 - moved[torch.bfloat16] < 0.99


@pytest.mark.parametrize(
    ("adapter", "given", "bf16", "device", "dtype"),
    [
        ({}, {}, True, "cuda", "bfloat16"),
        ({}, {"revision": "main"}, True, "cuda", "bfloat16"),
        ({}, {"dtype": "float32"}, True, "cuda", "float32"),
        ({}, {}, False, "cuda", None),
        ({}, {}, True, "cpu", None),
        ({"modules_to_save": ["lm_head"]}, {}, True, "cuda", None),
        ({"bias": "all"}, {}, True, "cuda", None),
    ],
    ids=str,
)
def test_a_frozen_base_in_16_bits_is_loaded_as_it_is_on_a_gpu(
    adapter: dict[str, Any], given: dict[str, str], bf16: bool, device: str, dtype: str | None, tmp_path: Path
) -> None:
    """Weights of the base that train beside the adapter stay float32, and a dtype that is named is taken."""
    settings = {"bf16": bf16, "device": torch.device(device), "trust_remote_code": False}
    for stored in (torch.bfloat16, torch.float32):
        make_llama().to(stored).save_pretrained(tmp_path / str(stored))
        args = SimpleNamespace(model_init_kwargs=dict(given), **settings)
        choose_dtype(str(tmp_path / str(stored)), args, LoraConfig(**adapter))
        # A float32 checkpoint would be rounded.
        assert args.model_init_kwargs.get("dtype") == (dtype if stored == torch.bfloat16 else given.get("dtype"))


@pytest.mark.parametrize(
    ("bf16", "line"),
    [
        (False, "weights in bfloat16, those that train in float32, no autocast"),
        (True, "weights in bfloat16, those that train in float32, bfloat16 autocast"),
    ],
)
def test_the_doctor_names_the_dtype_of_the_weights(tmp_path: Path, bf16: bool, line: str) -> None:
    """It said float32 of an adapter on bfloat16 weights."""
    model = get_peft_model(make_llama().bfloat16(), LoraConfig(**LORA))
    report = examine(make_trainer(tmp_path, student=model, bf16=bf16), only=["environment"])
    assert any(line in finding.saw for finding in report.findings), [finding.saw for finding in report.findings]
