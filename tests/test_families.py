"""Families of models, tiny and random: teacher and student agree without a context, and three steps train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_rows, make_tokenizer
from datasets import Dataset
from helpers import LORA, make_args
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from opsd import OPSDTrainer, PastCheckpointTeacher, SameCheckpointTeacher
from opsd.doctor import examine
from opsd.errors import ConfigError, OPSDWarning
from opsd.models.causal import load_causal_model
from opsd.models.forward import backbone, last_hidden
from opsd.models.loading import load_model

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


def _sees_no_padding(model: Any) -> None:
    """Compare states of a padded row with those of the same row under a mask and explicit positions."""
    ids_BL = torch.tensor([[5, 6, 7, 8, 0, 0, 0], [9, 8, 7, 6, 5, 4, 3]])
    mask_BL = (ids_BL != 0).long()
    row_N, position_N = mask_BL.nonzero().unbind(-1)
    with torch.no_grad():
        states_ND = last_hidden(model.eval(), ids_BL, row_N, position_N)
        masked_BLD = backbone(model)(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).last_hidden_state
    assert (states_ND - masked_BLD[row_N, position_N]).abs().max() <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_agrees_with_itself_and_trains(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    _sees_no_padding(model)
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


TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
READ_IMAGES: dict[str, dict[str, Any]] = {  # model type -> the language model's and the vision tower's own settings
    "gemma3": {"text_config": {"sliding_window": 64}, "vision_config": {"num_hidden_layers": 1, **TOWER}},
    "mistral3": {"text_config": {"model_type": "mistral"}, "vision_config": {"num_hidden_layers": 1, **TOWER}},
    "qwen3_5": {
        "text_config": {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
                        "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
        "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4,
                          "out_hidden_size": 32},
    },
}  # fmt: skip


def write_image_model(family: str, folder: Path) -> Any:
    """Write a tiny checkpoint that reads images, with a tokenizer, and return the model."""
    torch.manual_seed(0)
    own = READ_IMAGES[family]
    config = AutoConfig.for_model(family, **{**own, "text_config": {**SMALL, **own["text_config"]}})
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("family", READ_IMAGES)
def test_the_language_model_of_a_checkpoint_that_reads_images(family: str, tmp_path: Path) -> None:
    """Its weights have other names there, and a class that is loaded by these finds none or writes none."""
    whole, ids_BL = write_image_model(family, tmp_path / "whole"), torch.tensor([[5, 6, 7, 8]])
    text = load_causal_model(str(tmp_path / "whole")).eval()
    text.save_pretrained(tmp_path / "text")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    with torch.no_grad():
        expected, *found = (model(input_ids=ids_BL).logits for model in (whole, text, again))
    assert all(torch.equal(logits, expected) for logits in found)
    assert type(again).__name__.endswith("ForCausalLM") and not hasattr(again.config, "vision_config")


@pytest.mark.slow
@pytest.mark.parametrize("family", READ_IMAGES)
def test_a_checkpoint_that_reads_images_trains_on_text(family: str, tmp_path: Path) -> None:
    write_image_model(family, folder := tmp_path / "whole")
    with pytest.warns(OPSDWarning, match="reads images as well: its language model is trained alone"):
        trainer = OPSDTrainer(
            str(folder),
            PastCheckpointTeacher(str(folder)),
            args=make_args(tmp_path / "run", max_steps=2),
            train_dataset=Dataset.from_list(make_rows()),
        )
    trainer.train()
    first = next(entry["divergence"] for entry in trainer.state.log_history if "divergence" in entry)
    assert abs(first) <= 1e-5  # the teacher is loaded in the same way
    trainer.save_model()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert all(torch.equal(p, saved.get_parameter(name)) for name, p in trainer.model.named_parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*reads images as well")
@pytest.mark.parametrize("family", READ_IMAGES)
def test_an_adapter_on_a_checkpoint_that_reads_images_is_loaded_again(family: str, tmp_path: Path) -> None:
    """Its base had no name in the adapter's settings."""
    write_image_model(family, folder := tmp_path / "whole")
    trainer = OPSDTrainer(
        str(folder),
        SameCheckpointTeacher(context="answer_only"),
        args=make_args(tmp_path / "run", max_steps=2),
        train_dataset=Dataset.from_list(make_rows()),
        peft_config=LoraConfig(**LORA),
    )
    trainer.train()
    trainer.save_model()
    again, _ = load_model(str(tmp_path / "run"))
    ids_BL = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected, found = (model.eval()(input_ids=ids_BL).logits for model in (trainer.model, again))
    assert torch.allclose(expected, found, atol=1e-6)


def test_vllm_refuses_a_checkpoint_of_which_it_would_load_all(tmp_path: Path) -> None:
    write_image_model("mistral3", folder := tmp_path / "whole")
    args = make_args(tmp_path / "run", use_vllm=True)
    with pytest.raises(ConfigError, match=r"vLLM would load all of it.*load_causal_model\("):
        OPSDTrainer(str(folder), "ema", args=args, train_dataset=Dataset.from_list(make_rows()))
