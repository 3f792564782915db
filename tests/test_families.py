"""Ten families of models, tiny and random: teacher and student agree without a context, and three steps train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_rows, make_tokenizer
from datasets import Dataset
from helpers import make_args
from transformers import AutoConfig, AutoModelForCausalLM

from opsd import OPSDTrainer, SameCheckpointTeacher
from opsd.doctor import examine

SMALL = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2, "head_dim": 8,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {"sliding_window": 64},
    "gemma2": {"final_logit_softcapping": 3.0, "sliding_window": 64},  # a soft-cap that bends most logits
    "mistral": {"sliding_window": 64},
    "phi3": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3},  # convolutions and attention
    "granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5},
}


def make_model(family: str) -> Any:
    torch.manual_seed(0)
    settings = (
        {"vocab_size": 400, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} if family == "gpt2" else SMALL
    )
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings, **FAMILIES[family]))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_agrees_with_itself_and_trains(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = OPSDTrainer(
        model,
        SameCheckpointTeacher(context="answer_only"),
        args=make_args(tmp_path, max_steps=3),
        train_dataset=Dataset.from_list(make_rows()),
        processing_class=make_tokenizer(),
    )
    findings = examine(trainer, only=["alignment"], rows=4).findings
    assert [f.status for f in findings] == ["pass", "pass"], [f.saw for f in findings]
    assert findings[1].figures["largest_kl"] <= findings[1].figures["tolerance"] <= 1e-5
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(0 < loss < 20 for loss in losses)
    assert any(not torch.equal(before[name], p) for name, p in trainer.model.named_parameters())
