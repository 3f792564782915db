"""Checks that a model's folder has its own tokenizer, and that an adapter's tokenizer fits its base.

Without these checks transformers makes a tokenizer of one token for a folder that has none (Qwen2, GPT-2), and PEFT
gives tokens that were added in fine-tuning new, random rows. Knows files; loads no weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from opsd.errors import ConfigError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Every kind of tokenizer has one of these: `tokenizers`, BPE and WordPiece, sentencepiece, tiktoken, Mistral's.
TOKENIZER_FILES = ("tokenizer*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")


def is_adapter(model: str) -> bool:
    """Tell whether a model's name is a folder that holds a PEFT adapter."""
    return (Path(model) / ADAPTER_CONFIG).is_file()


def _setting(adapter: str, name: str) -> Any:
    return json.loads((Path(adapter) / ADAPTER_CONFIG).read_text("utf-8")).get(name)


def _lacks_tokenizer(model: str) -> bool:
    """Tell whether a model's name is a folder without a tokenizer; transformers names what a hub id lacks."""
    folder = Path(model)
    return folder.is_dir() and not any(path for pattern in TOKENIZER_FILES for path in folder.glob(pattern))


def check_has_tokenizer(model: str) -> None:
    """Refuse a folder without a tokenizer.

    Raises:
        ConfigError: with the line that writes the tokenizer into the folder.
    """
    if not _lacks_tokenizer(model):
        return
    weights = ("*.safetensors", "*.bin", "*.gguf", ADAPTER_CONFIG)
    if not any(path for pattern in weights for path in Path(model).glob(pattern)):
        raise ConfigError(
            f"the folder {model} holds no model: neither weights nor a tokenizer. Give a folder that `save_pretrained` "
            "or a run wrote, or a hub id."
        )
    base = _setting(model, "base_model_name_or_path") if is_adapter(model) else ""
    source = f" The tokenizer of its base, {base}, is not taken: fine-tuning may have changed it." if base else ""
    raise ConfigError(
        f"the folder {model} has weights and no tokenizer, and only what they were trained with gives the ids and the "
        f"chat template that they know.{source} Give it: processing_class=…; or write it there once: "
        f"AutoTokenizer.from_pretrained({base or 'ITS SOURCE'!r}).save_pretrained({model!r})."
    )


def check_is_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer without a vocabulary, as transformers makes one where a hub id has none.

    Raises:
        ConfigError: all its tokens are special ones.
    """
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise ConfigError(
            f"the tokenizer of {tokenizer.name_or_path} has {len(tokenizer)} token(s), all of them special: the place "
            "has no tokenizer files, and every prompt would be empty. Give the tokenizer that the model was trained "
            "with: processing_class=…; or another model."
        )


def check_adapter_vocabulary(adapter: str, tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> None:
    """Refuse an adapter whose tokenizer does not fit its base.

    Args:
        adapter: the adapter's folder.
        tokenizer: the one it is used with.
        kwargs: for `from_pretrained`: `trust_remote_code`.

    Raises:
        ConfigError: a token has another id than in the base's tokenizer, or tokens were added for which neither the
            base nor the adapter has rows.
    """
    base, vocabulary = _setting(adapter, "base_model_name_or_path"), tokenizer.get_vocab()
    if not base:
        return  # loading names what is wrong
    kwargs["revision"] = _setting(adapter, "revision")
    of_base = {} if _lacks_tokenizer(base) else AutoTokenizer.from_pretrained(base, **kwargs).get_vocab()
    if moved := min((token for token, i in of_base.items() if vocabulary.get(token, i) != i), default=None):
        raise ConfigError(
            f"the adapter {adapter} and its base {base} must mean the same by the same ids, and token {moved!r} has id "
            f"{vocabulary[moved]} in the adapter's tokenizer and {of_base[moved]} in its base's. The prompts would be "
            "other tokens for the weights. Give the tokenizer that the adapter was trained with: processing_class=…"
        )
    rows = AutoConfig.from_pretrained(base, **kwargs).get_text_config().vocab_size
    added = sorted((i, token) for token, i in vocabulary.items() if i >= rows and token not in of_base)
    if added and not _has_rows(Path(adapter) / ADAPTER_WEIGHTS, added[-1][0] + 1):
        raise ConfigError(
            f"the adapter {adapter} was saved with a tokenizer that has {len(added)} token(s) more than its base "
            f"{base} has rows ({rows}), first {added[0][1]!r}, and without rows for them: they would be drawn at "
            "random. Save it again with the embeddings: trainer.model.save_pretrained(…, save_embedding_layers=True)."
        )


def _has_rows(weights: Path, count: int) -> bool:
    """Tell whether an adapter's file holds embeddings of `count` tokens, or the rows of single tokens."""
    if not weights.is_file():
        return True  # loading names what is wrong
    with safe_open(weights, framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    embeddings = [shape for name, shape in shapes.items() if "lora_" not in name and shape[0] >= count]
    return bool(embeddings) or any("trainable_tokens" in name for name in shapes)
