"""Rollouts come from the student's whole distribution and end at the first end token; where they do not, a run says so.

A checkpoint's own generation settings, the user's, and the end tokens of both.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama, make_rows, make_tokenizer
from datasets import Dataset
from helpers import logged, make_args, make_student, make_trainer
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig
from trl import DistillationTrainer

from opsd import SameCheckpointTeacher, SiblingTeacher
from opsd.errors import ConfigError, OPSDWarning
from opsd.models.generation import generate, stop_ids_of
from opsd.training.sampling import SETTINGS, TRANSFORMERS, VLLM, Agreement

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
        ({"top_k": 2.5}, "top_k must"),
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
    """TRL cuts what transformers samples, and nothing that vLLM does."""
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(DistillationTrainer, "_generate_single_turn", lambda *a, **k: [[5, 2, 0, 2], [5, 6], []])
    assert trainer._generate_single_turn([[1]] * 3, None, {}) == [[5, 2], [5, 6], []]


def test_an_end_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="eos_token_id 4000 is no token of this model, which embeds 400"):
        make_trainer(tmp_path, generation_kwargs={"eos_token_id": 4000})


# ---- the check in every run -----------------------------------------------------------------------------------------


def lines_of(folder: Path, capsys: pytest.CaptureFixture[str], **settings: Any) -> tuple[Any, str]:
    rows = Dataset.from_list(make_rows(64))
    trainer = make_trainer(
        folder, "ema", rows=rows, per_device_train_batch_size=8, max_completion_length=16, **settings
    )
    trainer.train()
    return trainer, capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 1.7}, {"lmbda": 0.5, "seq_kd": True}, {"bf16": True}, {"skip_first_tokens": 3}],
    ids=str,
)
def test_a_run_on_its_own_samples_says_nothing(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, out = lines_of(tmp_path, capsys, max_steps=4, **settings)
    assert "not the student's own distribution" not in out
    assert "not checked" not in out
    gaps = logged(trainer, "sampling_gap")
    assert len(gaps) == 4 and all(gaps) and abs(sum(gaps) / 4) < 0.3


def true_gap(model: Any, prompts: list[list[int]], completions: list[list[int]]) -> float:
    """The mean of −log p − H over all tokens of completions, from the definition."""
    values = []
    for prompt, ids in zip(prompts, completions, strict=True):
        with torch.no_grad():
            log_p = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        values += (-log_p.gather(-1, torch.tensor(ids)[:, None])[:, 0] + (log_p.exp() * log_p).sum(-1)).tolist()
    return sum(values) / len(values)


def colder(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model whose `generate` samples at another temperature than it is asked for."""
    original = model.generate

    def generate(*args: Any, generation_config: GenerationConfig, **kwargs: Any) -> Any:
        generation_config.temperature = 0.3
        return original(*args, generation_config=generation_config, **kwargs)

    monkeypatch.setattr(model, "generate", generate)
    return model


@pytest.mark.filterwarnings("ignore:lmbda is")
@pytest.mark.parametrize("lmbda", [1.0, 0.5, 0.25])
def test_the_metric_is_a_mean_over_the_students_own_tokens(
    lmbda: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens of others counted as 0: with lmbda 0.25 it was -0.855 in place of -1.80."""
    rows = Dataset.from_list([{**row, "completion": "It is 7."} for row in make_rows(16)])
    settings: dict[str, Any] = {"learning_rate": 0.0, "lmbda": lmbda, "logging_steps": 2, "max_completion_length": 8}
    settings |= {"per_device_train_batch_size": 4, "rows": rows}
    trainer, own = make_trainer(tmp_path, "ema", colder(make_llama(), monkeypatch), **settings), []
    sample = trainer._sample

    def listening(*args: Any) -> Any:
        rollouts = sample(*args)
        own.append(rollouts.select([n for n, is_own in enumerate(rollouts.on_policy) if is_own]))
        return rollouts

    monkeypatch.setattr(trainer, "_sample", listening)
    trainer.train()
    prompts = [list(ids) for rollouts in own for ids in rollouts.prompt_ids]
    completions = [list(ids) for rollouts in own for ids in rollouts.completion_ids]
    assert len(prompts) == 16 * lmbda
    expected = true_gap(trainer.student.model, prompts, completions)
    assert expected < -1 and logged(trainer, "sampling_gap") == [pytest.approx(expected, rel=1e-4)]


# Settings by which a healthy run has a gap that is not 0, and what the run says.
UNCHECKED: dict[str, dict[str, Any]] = {
    "mask_tokens": {"mask_tokens": ["="]},
    "mask_special_tokens": {"mask_special_tokens": True},
    "mask_truncated_completions": {
        "mask_truncated_completions": True,
        "generation_kwargs": {"eos_token_id": list(range(100, 300))},
    },
    "distill_on 'wrong'": {"distill_on": "wrong", "reward_funcs": ["exact"]},
    "a context that reads rollouts": {"teacher": "own_success", "reward_funcs": ["exact"], "num_generations": 2},
    "contrast_context": {"contrast_context": "worked_solution"},
    "lmbda is 0": {"lmbda": 0.0},
}


@pytest.mark.filterwarnings("ignore:lmbda is")
@pytest.mark.parametrize("cause", UNCHECKED)
def test_a_run_that_scores_no_fair_sample_says_that_nothing_is_checked(
    cause: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They said nothing; with mask_truncated_completions a healthy run logged a gap of -0.048, not -0.0007."""
    settings = {"teacher": "answer_only", **UNCHECKED[cause]}
    settings["teacher"] = SameCheckpointTeacher(context=settings["teacher"])
    rows = Dataset.from_list([{**row, "completion": "It is 7."} for row in make_rows(16)])
    trainer = make_trainer(tmp_path, rows=rows, **settings)
    trainer.train()
    out = capsys.readouterr().out
    assert out.count("sampling    not checked: ") == 1 and cause in out.partition("not checked: ")[2]
    assert not logged(trainer, "sampling_gap") and "not the student's own distribution" not in out


def test_a_contrast_is_checked_where_the_loss_sees_all_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"contrast_context": "worked_solution", "keep_fraction": 0.5}
    trainer, out = lines_of(tmp_path, capsys, student=colder(make_llama(), monkeypatch), **settings)
    assert "not checked" not in out and out.count("not the student's own distribution") == 1
    assert logged(trainer, "sampling_gap")[0] < -1


@pytest.mark.parametrize("settings", [{"min_p": 0.3}, {"top_k": 5}, {"top_p": 0.5}], ids=str)
def test_a_run_on_other_samples_says_so_once_and_why(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(OPSDWarning):
        trainer, out = lines_of(tmp_path, capsys, **settings)
    assert out.count("not the student's own distribution") == 1
    assert f"{next(iter(settings))} {next(iter(settings.values()))} reshape" in out
    assert abs(logged(trainer, "sampling_gap")[0]) > 0.3


def test_a_run_says_so_where_generate_and_the_forward_pass_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out = lines_of(tmp_path, capsys, student=colder(make_llama(), monkeypatch))
    assert "give different probabilities: its cache" in out


def test_tokens_of_others_and_tools_do_not_count(tmp_path: Path) -> None:
    from opsd.losses import LossOutput
    from opsd.rollouts import Rollouts
    from opsd.training.sampling import SamplingCheck

    rollouts = Rollouts(
        make_rows(2), [[1], [1]], [[5, 6, 7], [8, 9]], loss_mask=[[1, 0, 1], [1, 1]], on_policy=[True, False]
    )
    record = LossOutput(torch.zeros(()), torch.zeros(4), torch.full((4,), 2.0), {"logprob": torch.tensor([-3.0] * 4)})
    check = SamplingCheck(make_args(tmp_path), unchecked="", notify=print)
    metrics = check(record, rollouts).metrics
    assert metrics["sampling_gap"].tolist() == metrics["own_tokens"].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert check.agreement.tokens == 2


@pytest.mark.parametrize("spread", [0.5, 2.0, 5.0, 12.0])
@pytest.mark.parametrize("tokens", [8, 60, 500])
def test_samples_of_the_distribution_itself_agree_with_its_entropy(spread: float, tokens: int) -> None:
    """At an entropy near 0 the surprises that make up the mean are rare: a sample without one is no sign of a fault."""
    generator = torch.Generator().manual_seed(0)
    log_s = (spread * torch.randn(64, 200, generator=generator)).log_softmax(-1)
    entropy = -(log_s.exp() * log_s).sum(-1)
    for _ in range(50):
        rows = torch.randint(64, (tokens,), generator=generator)
        ids = torch.multinomial(log_s[rows].exp(), 1, generator=generator)
        agreement = Agreement()
        agreement.add(-log_s[rows].gather(-1, ids)[:, 0] - entropy[rows], entropy[rows])
        assert not agreement.differs, agreement.describe()
