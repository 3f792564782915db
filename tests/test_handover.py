"""A run after SFT: the tokenizer and the chat template are those that SFT trained with, wherever it left them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHATML, make_llama, make_rows, make_tokenizer
from datasets import Dataset
from helpers import LORA, make_args, make_student, prepared
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import SFTConfig, SFTTrainer

from opsd import OPSDTrainer, SameCheckpointTeacher, SiblingTeacher
from opsd.cli import main
from opsd.errors import ConfigError
from opsd.models.loading import load_model

OPEN, CLOSE = "<|think|>", "<|answer|>"


def template(start: str, end: str) -> str:
    return CHATML.replace("<|im_start|>", start).replace("<|im_end|>", f"{end}<|im_end|>")


PROMPT = make_rows(1)[0]["prompt"]


def train_sft(base: str, folder: Path, chat_template: str, lora: bool) -> SFTTrainer:
    rows = [{**row, "completion": [{"role": "assistant", "content": row["answer"]}]} for row in make_rows(4)]
    args = SFTConfig(
        str(folder), max_steps=1, per_device_train_batch_size=2, chat_template_path=chat_template, report_to="none",
        use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    # A whole head, for TRL's SFT cannot train single rows of one; the rows of new tokens are in the embeddings.
    config = LoraConfig(**LORA, modules_to_save=["lm_head"]) if lora else None
    sft = SFTTrainer(base, args=args, train_dataset=Dataset.from_list(rows), peft_config=config)
    sft.train()
    sft.save_model()
    return sft


def start(folder: Path, model: Any, **settings: Any) -> OPSDTrainer:
    rows, teacher = Dataset.from_list(make_rows()), SameCheckpointTeacher(context="answer_only")
    return OPSDTrainer(model, teacher, args=make_args(folder, max_steps=1), train_dataset=rows, **settings)


HANDED_ON: dict[str, Callable[[SFTTrainer], tuple[Any, dict[str, Any]]]] = {
    "the trainer": lambda sft: (sft, {}),
    "its model and tokenizer": lambda sft: (sft.model, {"processing_class": sft.processing_class}),
    "its folder": lambda sft: (sft.args.output_dir, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_prompts_are_rendered_with_the_chat_template_of_sft(tmp_path: Path, llama_folder: str, lora: bool) -> None:
    """`OPSDTrainer(sft.model, …)` rendered prompts with the template of the base that SFT had loaded."""
    (tmp_path / "sft.jinja").write_text(template("(", ")"))
    sft = train_sft(llama_folder, tmp_path / "sft", str(tmp_path / "sft.jinja"), lora)
    question = PROMPT[0]["content"]
    with pytest.raises(ConfigError, match=r"OPSDTrainer\(sft, …\).*processing_class=sft.processing_class"):
        start(tmp_path / "refused", sft.model)
    for name, hand_on in HANDED_ON.items():
        model, settings = hand_on(sft)
        trainer = start(tmp_path / name, model, **settings)
        text = trainer.processing_class.decode(trainer.student.renderer.ids(PROMPT))
        assert text == f"(user\n{question})<|im_end|>\n(assistant\n", name
        trainer.train()
        trainer.save_model()
        assert (tmp_path / name / "chat_template.jinja").read_text() == template("(", ")")


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_tokens_that_sft_added_keep_their_trained_rows(tmp_path: Path, lora: bool) -> None:
    make_llama(tie=False).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    other = make_tokenizer()
    other.add_special_tokens({"additional_special_tokens": [OPEN, CLOSE]})
    other.chat_template = template(OPEN, CLOSE)
    other.save_pretrained(tmp_path / "other")
    sft = train_sft(str(tmp_path / "base"), tmp_path / "sft", str(tmp_path / "other"), lora)
    ids = torch.tensor([sft.processing_class.convert_tokens_to_ids([OPEN, CLOSE])])
    expected = sft.model(ids.to(sft.model.device)).logits
    for name, hand_on in HANDED_ON.items():
        model, settings = hand_on(sft)
        trainer = start(tmp_path / name, model, **settings)
        assert set(ids[0].tolist()) <= set(trainer.student.renderer.ids(PROMPT)), name
        torch.testing.assert_close(trainer.model(ids).logits, expected, msg=name)


def adapter_of(base: str, folder: Path, tokenizer: Any = None) -> str:
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(**LORA)).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


def with_more_tokens(count: int = 2) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<|new_{i}|>" for i in range(count)])
    return tokenizer


def of_words() -> PreTrainedTokenizerFast:
    words = {"<|pad|>": 0, "<|im_end|>": 1, "What": 2, "<|im_start|>": 3}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="What")))


def qwen_without_tokenizer(base: str, folder: Path) -> str:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=400, num_key_value_heads=2, **sizes)).save_pretrained(folder)
    return str(folder)


FOLDERS: dict[str, tuple[Callable[[str, Path], str], str]] = {
    "a model without a tokenizer": (
        qwen_without_tokenizer,
        r"has weights and no tokenizer.*processing_class=.*\.save_pretrained",
    ),
    "an adapter without a tokenizer": (
        adapter_of,
        r"has weights and no tokenizer.*its base, .*, is not taken.*processing_class=.*\.save_pretrained",
    ),
    "an adapter with tokens that have no rows": (
        lambda base, folder: adapter_of(base, folder, with_more_tokens()),
        r"2 token\(s\) more than its base .* has rows \(400\), first '<\|new_0\|>'.*save_embedding_layers=True",
    ),
    "an adapter with another tokenizer": (
        lambda base, folder: adapter_of(base, folder, of_words()),
        r"must mean the same by the same ids, and token .* has id",
    ),
}


@pytest.mark.parametrize(("make", "message"), FOLDERS.values(), ids=FOLDERS)
def test_a_folder_whose_tokenizer_is_missing_or_does_not_fit_is_refused(
    make: Callable[[str, Path], str], message: str, tmp_path: Path, llama_folder: str, capsys: Any
) -> None:
    """transformers makes a tokenizer of one token for a Qwen2 folder that has none; PEFT draws rows at random."""
    folder = make(llama_folder, tmp_path / "model")
    for use in (lambda: start(tmp_path / "run", folder), lambda: load_model(folder)):
        with pytest.raises(ConfigError, match=message):
            use()
    Dataset.from_list(make_rows()).to_json(tmp_path / "rows.jsonl")
    command = f"eval {folder} --dataset_name {tmp_path}/rows.jsonl --grader last_number"
    assert main(command.split()) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_the_way_out_that_is_named_works(tmp_path: Path, llama_folder: str) -> None:
    folder = adapter_of(llama_folder, tmp_path / "adapter")
    assert start(tmp_path / "a", folder, processing_class=make_tokenizer()).processing_class.chat_template == CHATML
    make_tokenizer().save_pretrained(folder)
    assert start(tmp_path / "b", folder).processing_class.chat_template == CHATML


def test_a_base_whose_own_tokenizer_has_a_token_without_a_row_takes_adapters(tmp_path: Path) -> None:
    """Gemma 3 1B is such a base: its tokenizer has an id for images, and its embeddings end before it."""
    make_llama().save_pretrained(tmp_path / "base")
    with_more_tokens(1).save_pretrained(tmp_path / "base")
    _, tokenizer = load_model(adapter_of(str(tmp_path / "base"), tmp_path / "adapter", with_more_tokens(1)))
    assert len(tokenizer) == 401


def test_an_adapter_on_a_base_without_a_tokenizer_needs_only_its_own(tmp_path: Path) -> None:
    base = qwen_without_tokenizer("", tmp_path / "base")
    _, tokenizer = load_model(adapter_of(base, tmp_path / "adapter", make_tokenizer()))
    assert len(tokenizer) == 400


def test_a_hub_id_without_a_tokenizer_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    """transformers makes a tokenizer of one token for it."""
    monkeypatch.chdir(tmp_path)
    model = Qwen2ForCausalLM.from_pretrained(qwen_without_tokenizer("", Path("some/model")))
    monkeypatch.setattr("opsd.models.loading.check_has_tokenizer", lambda model: None)  # a hub id is no folder
    for use in (
        lambda: load_model("some/model"),
        lambda: start(tmp_path / "run", "some/model"),
        lambda: start(tmp_path / "run", model, processing_class=AutoTokenizer.from_pretrained("some/model")),
    ):
        with pytest.raises(ConfigError, match=r"tokenizer of some/model has 1 token\(s\), all of them special"):
            use()


@pytest.mark.parametrize("student", ["full", "lora"])
def test_a_loaded_model_without_its_tokenizer_is_refused(tmp_path: Path, student: str) -> None:
    with pytest.raises(ConfigError, match="a loaded model needs processing_class"):
        start(tmp_path, make_student(student))


def test_a_loaded_teacher_without_its_tokenizer_is_refused(llama_folder: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    with pytest.raises(ConfigError, match=r"SiblingTeacher\(model, tokenizer=…\)"):
        prepared(SiblingTeacher(model), make_llama())


def test_a_teacher_folder_without_a_tokenizer_is_refused(tmp_path: Path, llama_folder: str) -> None:
    shutil.copytree(llama_folder, tmp_path / "teacher", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ConfigError, match="has weights and no tokenizer"):
        prepared(SiblingTeacher(str(tmp_path / "teacher")), make_llama())


def test_an_empty_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no model: neither weights nor a tokenizer"):
        prepared(SiblingTeacher(str(tmp_path)), make_llama())
