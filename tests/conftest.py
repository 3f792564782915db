"""Small real models for every test: a trained byte-level tokenizer with a chat template, two-layer transformers."""

from __future__ import annotations

import os

# Before anything imports torch: no hub, and one thread, which is fastest for models this small.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking %}{{ '<think>\n' }}{% endif %}{% endif %}"
)
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
SENTENCES = [
    "What is the sum of twelve and seven? The correct answer is nineteen.",
    "A correct solution, for your eyes only: first add the tens, then the ones.",
    "You are a helpful assistant. Answer the question in your own words.",
    "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 + - = ( ) hint feedback document rule",
]


def make_tokenizer(vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on a few sentences; deterministic."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def make_llama(seed: int = 0, vocab_size: int = 400, tie: bool = True, **overrides: object) -> LlamaForCausalLM:
    """Two-layer Llama with lively logits (std 0.2, so that contexts and tokens make a visible difference)."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": vocab_size,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.2,
            "tie_word_embeddings": tie,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **overrides,
        }
    )
    return LlamaForCausalLM(config)


def make_gpt2(seed: int = 0, vocab_size: int = 400) -> GPT2LMHeadModel:
    """Two-layer GPT-2: learned positions, so padding on the wrong side shows."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=512,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config)


def make_rows(n: int = 12) -> list[dict[str, object]]:
    """Conversational rows of differing lengths with an answer and a solution."""
    return [
        {
            "prompt": [{"role": "user", "content": f"What is {i} + {i * 7 % 5}?" + " Say it." * (i % 3)}],
            "answer": str(i + i * 7 % 5),
            "solution": f"First take {i}, then add {i * 7 % 5}.",
            "domain": "odd" if i % 2 else "even",
        }
        for i in range(n)
    ]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def rows() -> list[dict[str, object]]:
    return make_rows()


@pytest.fixture
def dataset(rows: list[dict[str, object]]) -> Dataset:
    return Dataset.from_list(rows)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved tiny model with its tokenizer, as a user would have on disk."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    make_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)
