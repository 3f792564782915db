"""Hashes of texts and of tokenizers, by which runs and scores are compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase


def digest_of(texts: Iterable[str]) -> str:
    """Return a hash of texts in order."""
    digest = hashlib.sha256()
    for text in texts:
        add_text(digest, text)
    return digest.hexdigest()[:16]


def add_text(digest: Any, text: str) -> None:
    """Add a text to a hash of hashlib."""
    digest.update(text.encode("utf-8", "surrogatepass") + b"\0")


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of a tokenizer: its words, how it cuts text into them, and its special tokens."""
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    rules = json.loads(tokenizer.backend_tokenizer.to_str()) if hasattr(tokenizer, "backend_tokenizer") else {}
    for name in ("truncation", "padding"):  # set anew by each call
        rules.pop(name, None)
    special = tokenizer.special_tokens_map
    return digest_of(json.dumps(each, default=str, sort_keys=True) for each in (words, rules, special))
