"""Loads a causal language model, also from a checkpoint that reads images: then its language model alone.

Such checkpoints (Gemma 3 and 4, Qwen3.5, Mistral 3, Llama 4) name a class with a vision tower, and save the language
model's weights under other names. Knows transformers' classes; nothing of tokenizers or adapters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from opsd.errors import UnsupportedModelError
from opsd.models.forward import backbone

# What quantisation and placement leave on the object that was loaded; trainers look for it.
MARKS = (
    "hf_device_map",
    "hf_quantizer",
    "quantization_method",
    "is_quantized",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
)


def language_config(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """Return the config of the language model inside a checkpoint that reads images; None where all of it is text."""
    inner = config.get_text_config()
    if inner is config or MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None) is None:
        return None
    return inner if MODEL_FOR_CAUSAL_LM_MAPPING.get(type(inner), None) else None


def reads_images(source: str, **kwargs: Any) -> bool:
    """Tell whether a checkpoint reads images and has a language model that can be loaded alone.

    Args:
        source: a folder or a hub id.
        kwargs: for `from_pretrained`: `revision`, `trust_remote_code`.
    """
    try:
        return language_config(AutoConfig.from_pretrained(source, **kwargs)) is not None
    except (OSError, ValueError):
        return False  # loading the model names what is wrong


def load_causal_model(source: str, **kwargs: Any) -> nn.Module:
    """Return the language model of a checkpoint.

    Args:
        source: a folder or a hub id.
        kwargs: for `from_pretrained`.

    Raises:
        UnsupportedModelError: the checkpoint reads images, and its language model cannot be taken out.
    """
    if not reads_images(source, **{name: kwargs[name] for name in ("revision", "trust_remote_code") if name in kwargs}):
        return AutoModelForCausalLM.from_pretrained(source, **kwargs)
    return _language_part(AutoModelForImageTextToText.from_pretrained(source, **kwargs), source)


def empty_causal_model(config: PreTrainedConfig, **kwargs: Any) -> nn.Module:
    """Return the language model of a config, without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(language_config(config) or config, **kwargs)


def _language_part(whole: Any, source: str) -> nn.Module:
    """Return the decoder and the head of a model that reads images, as a causal language model of its own."""
    decoder: Any = backbone(whole.get_decoder())
    config = whole.config.get_text_config()
    head, embedding = whole.get_output_embeddings(), decoder.get_input_embeddings()
    config.tie_word_embeddings = head.weight is embedding.weight  # the outer config may say otherwise
    config._name_or_path = source  # before a model is made of it: an adapter names its base by it
    text: Any = empty_causal_model(config)
    places = [name for name, child in text.named_children() if type(child) is type(decoder)]
    for name in places:
        setattr(text, name, decoder)
    text.set_output_embeddings(head)
    empty = [name for name, p in text.named_parameters() if p.is_meta]
    if not places or empty:
        raise UnsupportedModelError(
            f"{type(whole).__name__} reads images, and its language model could not be taken out of it as a "
            f"{type(text).__name__}: {empty[0] if empty else type(decoder).__name__} has no counterpart. Save the "
            "language model alone, and give that folder."
        )
    text.generation_config = whole.generation_config
    for name in MARKS:
        if name in vars(whole):
            setattr(text, name, getattr(whole, name))
    return text.train(whole.training)
