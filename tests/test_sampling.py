"""Rollouts come from the student's whole distribution and end at the first end token.

A checkpoint's own generation settings, the user's, and the end tokens of both.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama, make_rows, make_tokenizer
from helpers import make_args, make_student, make_trainer
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig
from trl import DistillationTrainer

from opsd import SiblingTeacher
from opsd.errors import ConfigError, OPSDWarning
from opsd.models.generation import generate, stop_ids_of
from opsd.training.sampling import SETTINGS, TRANSFORMERS, VLLM

# What checkpoints carry in generation_config.json, and what else transformers fills an explicit config from.
CARRIED: dict[str, Any] = {
    "min_p": 0.5,
    "typical_p": 0.2,
    "top_p": 0.3,
    "top_k": 2,
    "top_h": 0.2,
    "epsilon_cutoff": 0.2,
    "eta_cutoff": 0.5,
    "temperature": 0.1,
    "repetition_penalty": 5.0,
    "encoder_repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "min_new_tokens": 5,
    "suppress_tokens": list(range(3, 390)),
    "begin_suppress_tokens": list(range(3, 390)),
    "bad_words_ids": [[token] for token in range(3, 390)],
    "sequence_bias": {(token,): 20.0 for token in range(5)},
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 7,
    "exponential_decay_length_penalty": (1, 5.0),
    "guidance_scale": 3.0,
    "num_beams": 2,
    "length_penalty": 3.0,
    "num_return_sequences": 2,
    "do_sample": False,
    "use_cache": False,
    "max_length": 5,
}


def rollouts_of(folder: Path, model: Any, **settings: Any) -> list[list[int]]:
    """The rollouts of a run's first step."""
    trainer = make_trainer(folder, None, model, max_completion_length=8, **settings)
    torch.manual_seed(0)
    trainer.model.train()
    return list(trainer._sample(make_rows(4), 4).completion_ids)


# ---- a checkpoint's own settings ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    return rollouts_of(tmp_path_factory.mktemp("plain"), make_llama())


@pytest.mark.parametrize("name", CARRIED)
def test_a_setting_that_a_checkpoint_carries_does_not_reach_rollouts(
    name: str, tmp_path: Path, plain: list[list[int]]
) -> None:
    """transformers fills an explicit config from the model's: with min_p 0.3 rollouts had 3.76 nats, not 5.34."""
    model = make_llama()
    setattr(model.generation_config, name, CARRIED[name])
    before = copy.deepcopy(model.generation_config)
    assert rollouts_of(tmp_path, model) == plain
    assert getattr(model.generation_config, name) == getattr(before, name)


@pytest.mark.parametrize("inside", [True, False])
def test_a_peft_models_settings_do_not_reach_rollouts_either(inside: bool, tmp_path: Path) -> None:
    """PEFT hands settings that stand on its wrapper to the model inside."""
    torch.manual_seed(0)
    model = make_student("lora")
    expected = rollouts_of(tmp_path / "plain", model)
    holder = model.get_base_model() if inside else model
    holder.generation_config = GenerationConfig(
        eos_token_id=2, suppress_tokens=list(range(3, 390)), repetition_penalty=5.0
    )
    assert rollouts_of(tmp_path / "carried", model) == expected
    assert holder.generation_config.repetition_penalty == 5.0


def test_the_tables_of_the_tests_and_of_the_settings_cover_each_other() -> None:
    assert set(SETTINGS) - {"vllm_structured_outputs_regex"} | set(TRANSFORMERS) <= {*CARRIED, "watermarking_config"}


# ---- the user's settings --------------------------------------------------------------------------------------------

RESHAPING: dict[str, dict[str, Any]] = {
    "top_p": {"top_p": 0.9},
    "top_k": {"top_k": 20},
    "min_p": {"min_p": 0.1},
    "repetition_penalty": {"repetition_penalty": 1.1},
    "typical_p": {"generation_kwargs": {"typical_p": 0.9}},
    "suppress_tokens": {"generation_kwargs": {"suppress_tokens": [7]}},
    "min_new_tokens": {"generation_kwargs": {"min_new_tokens": 2}},
    "presence_penalty": {"use_vllm": True, "generation_kwargs": {"presence_penalty": 0.5}},
    "vllm_structured_outputs_regex": {"use_vllm": True, "vllm_structured_outputs_regex": "a+"},
}
ESTIMATES: dict[str, dict[str, Any]] = {
    "support 'sampled'": {"support": "sampled"},
    "reward_to_go 'discounted'": {"reward_to_go": "discounted"},
    "grpo_coef 1": {"grpo_coef": 1.0, "num_generations": 2},
}


@pytest.mark.parametrize("name", RESHAPING)
def test_a_reshaped_distribution_is_named_in_a_warning(name: str, tmp_path: Path) -> None:
    with pytest.warns(OPSDWarning, match=f"{name} .*whole distribution"):
        make_args(tmp_path, **RESHAPING[name])


@pytest.mark.parametrize("cause", ESTIMATES)
@pytest.mark.parametrize("name", RESHAPING)
def test_a_loss_of_sampled_tokens_refuses_a_reshaped_distribution(name: str, cause: str, tmp_path: Path) -> None:
    """With top_p 0.9 its gradient was off by 8 %, and nothing said so."""
    with pytest.raises(ConfigError, match=rf"{name} .* cannot go with {cause}") as error:
        make_args(tmp_path, **RESHAPING[name], **ESTIMATES[cause])
    assert "Leave these sampling settings out" in str(error.value)


@pytest.mark.parametrize("cause", ESTIMATES)
def test_neutral_values_are_no_reshaping(cause: str, tmp_path: Path) -> None:
    neutral = {"typical_p": 1.0, "no_repeat_ngram_size": 0, "suppress_tokens": [], "use_cache": True}
    settings = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "temperature": 0.7}
    make_args(tmp_path, **settings, generation_kwargs=neutral, **ESTIMATES[cause])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_p": 1.5}, "top_p must be a number above 0 and up to 1, and is 1.5"),
        ({"top_p": 0.0}, "top_p must"),
        ({"top_p": float("nan")}, "top_p must"),
        ({"top_k": -1}, "top_k must be a whole number of at least 0"),
        ({"top_k": 2.5}, "top_k takes a whole number"),
        ({"min_p": -0.1}, "min_p must"),
        ({"min_p": 2.0}, "min_p must"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must"),
        ({"temperature": 0.0}, "temperature must"),
        ({"generation_kwargs": {"typical_p": 3}}, "typical_p must"),
        ({"generation_kwargs": {"temperature": 0.5}}, "'temperature', which is set by the setting temperature"),
        ({"generation_kwargs": {"top_p": 0.5}}, "which is set by the setting top_p"),
        ({"generation_kwargs": {"max_new_tokens": 5}}, "the setting max_completion_length"),
        ({"generation_kwargs": {"num_return_sequences": 2}}, "the setting num_generations"),
        ({"generation_kwargs": {"stop_strings": ["x"]}}, "eos_token_id"),
        ({"generation_kwargs": {"num_beams": 4}}, "'num_beams', and rollouts sampled by transformers take no such"),
        ({"generation_kwargs": {"do_sample": False}}, "'do_sample'"),
        ({"generation_kwargs": {"typical_q": 0.5}}, "Did you mean 'typical_p'"),
        ({"generation_kwargs": {"presence_penalty": 0.5}}, "'presence_penalty'"),
        ({"generation_kwargs": {"typical_p": 0.5}, "use_vllm": True}, "sampled by vLLM"),
        ({"generation_kwargs": {"seed": 0}, "use_vllm": True}, "'seed'"),
        ({"generation_kwargs": {"eos_token_id": "<|im_end|>"}}, "must be a token id"),
        ({"generation_kwargs": {"eos_token_id": [3, -1]}}, "must be a token id"),
        ({"generation_kwargs": "typical_p=0.5"}, "generation_kwargs must be a mapping"),
        ({"generation_kwargs": '{"typical_p": 3}'}, "typical_p must"),
    ],
)  # fmt: skip
def test_a_value_or_name_that_cannot_work_is_refused(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        make_args(tmp_path, **settings)


def test_the_users_settings_reach_rollouts_and_none_means_neutral(tmp_path: Path, plain: list[list[int]]) -> None:
    """`top_k: null` would have become transformers' own 50."""
    assert rollouts_of(tmp_path / "none", make_llama(), top_k=None, top_p=None, min_p=None) == plain
    with pytest.warns(OPSDWarning):
        first = rollouts_of(tmp_path / "one", make_llama(), top_k=1)
    with pytest.warns(OPSDWarning):
        second = rollouts_of(tmp_path / "two", make_llama(), generation_kwargs={"suppress_tokens": list(range(3, 400))})
    tokenizer, model = make_tokenizer(), make_llama()
    prompts = [
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        for row in make_rows(4)
    ]
    assert first == generate(model, prompts, tokenizer, max_new_tokens=8, batch_size=4)  # greedy
    assert {token for ids in second for token in ids} <= {0, 1, 2}


def test_keys_of_both_engines_are_told_apart() -> None:
    assert not set(TRANSFORMERS) & set(VLLM) and not (set(TRANSFORMERS) | set(VLLM)) & set(SETTINGS)


# ---- ends -----------------------------------------------------------------------------------------------------------

ENDS = list(range(100, 300))  # half of the vocabulary: most rollouts end early


@pytest.mark.parametrize("where", ["generation_kwargs", "model", "adapter"])
def test_nothing_after_the_first_end_is_part_of_a_completion(where: str, tmp_path: Path) -> None:
    """45 of 80 scored tokens were padding behind an end from generation_kwargs."""
    model, settings = make_llama(), {}
    if where == "generation_kwargs":
        settings = {"generation_kwargs": {"eos_token_id": ENDS}}
    else:
        model.generation_config.eos_token_id = ENDS
    if where == "adapter":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    trainer = make_trainer(tmp_path, None, model, max_completion_length=8, per_device_train_batch_size=4, **settings)
    ends = {*ENDS, 2}
    completions = trainer._sample(make_rows(12), 12).completion_ids
    for ids in completions:
        assert not ends & set(ids[:-1]) and (len(ids) == 8 or ids[-1] in ends)
    assert any(len(ids) < 8 for ids in completions)
    # The same ends for the token selection, the doctor, evaluation, teachers' samples and the saved model.
    assert set(trainer.eos_token_ids) == trainer.scorer.selection.end_ids == ends
    assert stop_ids_of(trainer.student.model, make_tokenizer()) == ends
    answers = trainer.teacher.sample(make_rows(4), max_new_tokens=8, batch_size=4, do_sample=True, seed=0)
    assert all(not ends & set(ids[:-1]) for ids in answers)


def test_another_models_samples_end_where_the_students_end(tmp_path: Path) -> None:
    teacher = SiblingTeacher(make_llama(5), tokenizer=make_tokenizer(), context="answer_only")
    make_trainer(tmp_path, teacher, make_llama(), generation_kwargs={"eos_token_id": ENDS})
    answers = teacher.sample(make_rows(6), max_new_tokens=8, batch_size=6, do_sample=True, seed=0)
    assert all(not set(ENDS) & set(ids[:-1]) for ids in answers) and any(ids[-1] in ENDS for ids in answers)


def test_a_vllm_engine_gets_all_ends(tmp_path: Path) -> None:
    """vLLM reads the ends of the folder it loads: it knows neither generation_kwargs nor a model changed in Python."""
    from opsd.training.sampling import prepare_sampling

    class Engine:
        generation_kwargs: dict[str, Any] | None = None

    with pytest.warns(OPSDWarning, match="min_tokens"):
        args = make_args(tmp_path, use_vllm=True, generation_kwargs={"eos_token_id": 7, "min_tokens": 1})
    prepare_sampling(args, make_llama(), make_tokenizer(), engine := Engine())
    assert engine.generation_kwargs == {"min_tokens": 1, "stop_token_ids": [2, 7]}


def test_completions_of_any_engine_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL cuts nothing that vLLM samples, and a row that has ended goes on until others have."""
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(DistillationTrainer, "_generate_single_turn", lambda *a, **k: [[5, 2, 0, 2], [5, 6], []])
    monkeypatch.setattr("opsd.training.sampling.complete_batch", lambda *a: [[5, 6, 2, 0], [7]])
    assert trainer._generate_single_turn([[1]] * 2, None, {}) == [[5, 6, 2], [7]]
    trainer.use_vllm = True
    assert trainer._generate_single_turn([[1]] * 3, None, {}) == [[5, 2], [5, 6], []]


def test_an_end_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="eos_token_id 4000 is no token of this model, which embeds 400"):
        make_trainer(tmp_path, generation_kwargs={"eos_token_id": 4000})
