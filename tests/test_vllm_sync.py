"""What a sampling engine gets: W + ΔW, computed beside a base that is never written.

The engine is TRL's own `VLLMGeneration` in server mode. Its transport stands for NCCL and HTTP: it holds a model,
loads what arrives by name, and samples from it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_gpt2, make_llama, make_rows, make_tokenizer
from datasets import Dataset
from helpers import logged, make_args, move
from peft import IA3Config, LoHaConfig, LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from trl.generation import vllm_generation
from trl.trainer import distillation_trainer

from opsd import OPSDTrainer, SameCheckpointTeacher
from opsd.doctor import examine
from opsd.errors import ConfigError
from opsd.evaluation.result import EvaluationResult
from opsd.models.generation import generate
from opsd.training.vllm_sync import check_mergeable, merged_parameters, prepare_engine

LINEAR = ["q_proj", "v_proj", "down_proj"]


def untied() -> nn.Module:
    return make_llama(tie=False)


def with_biases() -> nn.Module:
    return make_llama(attention_bias=True, mlp_bias=True)


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **settings})


# Case: a base, adapter configurations (all active), and whether TRL gives the same names.
MERGED: dict[str, tuple[Callable[[], nn.Module], list[PeftConfig], bool]] = {
    "no adapter": (make_llama, [], True),
    "lora": (make_llama, [lora()], True),
    "rslora": (make_llama, [lora(use_rslora=True)], True),
    "dora": (make_llama, [lora(use_dora=True)], True),
    "bias of the base": (with_biases, [lora(bias="all")], True),
    "bias of lora": (with_biases, [lora(lora_bias=True)], True),
    "conv1d": (make_gpt2, [lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)], True),
    "dora on conv1d": (make_gpt2, [lora(target_modules=["c_fc"], fan_in_fan_out=True, use_dora=True)], True),
    "embedding": (untied, [lora(target_modules=["embed_tokens", "q_proj"])], True),
    "modules to save": (untied, [lora(modules_to_save=["lm_head", "norm"])], True),
    "some tokens": (make_llama, [lora(trainable_token_indices={"embed_tokens": [3, 7]})], False),
    "parameter": (make_llama, [lora(target_modules=[], target_parameters=["up_proj.weight"])], True),
    "two adapters": (make_llama, [lora(), lora(use_dora=True, target_modules=["q_proj", "k_proj"])], True),
    "ia3": (make_llama, [IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])], True),
    "loha": (make_llama, [LoHaConfig(r=2, alpha=4, target_modules=LINEAR)], True),
}


def adapted(case: str, dtype: torch.dtype) -> nn.Module:
    """A model whose trainable parameters training has moved."""
    make, configs, _ = MERGED[case]
    torch.manual_seed(0)
    model: Any = make().to(dtype).eval()
    for number, config in enumerate(configs):
        name = "default" if number == 0 else f"adapter{number}"
        if number == 0:
            model = get_peft_model(model, copy.deepcopy(config))
        else:
            model.add_adapter(name, copy.deepcopy(config))
            model.base_model.set_adapter(["default", name])
    move(model, by=0.02)
    return model


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("case", MERGED)
def test_a_bfloat16_base_is_bit_equal_after_syncs_and_peft_agrees(case: str) -> None:
    """TRL merges in place and takes the adapter out again: a bfloat16 base drifts with every sync."""
    model = adapted(case, torch.bfloat16)
    before, parameters = bits(model), list(model.parameters())
    for _ in range(3):
        sent = {name: value.clone() for name, value in merged_parameters(model)}
    assert same(bits(model), before)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True)), "an optimizer would lose them"
    exact = copy.deepcopy(model).float()
    merged = exact.merge_and_unload() if MERGED[case][1] else exact
    assert same(sent, {name: p.detach().to(sent[name].dtype) for name, p in merged.named_parameters()})


@pytest.mark.parametrize("case", MERGED)
def test_what_is_sent_computes_what_the_student_computes(case: str) -> None:
    model = adapted(case, torch.float32)
    receiver = MERGED[case][0]().eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, receiver(ids).logits, atol=0.05)
        sent = dict(merged_parameters(model))
        assert sent.keys() == dict(receiver.named_parameters()).keys()
        receiver.load_state_dict(sent, strict=False)
        assert torch.allclose(model(ids).logits, receiver(ids).logits, atol=1e-4)


@pytest.mark.parametrize("case", [case for case, (_, _, trl_agrees) in MERGED.items() if trl_agrees])
def test_names_and_order_are_those_of_trl(case: str) -> None:
    model = adapted(case, torch.float32)
    engine = Engine(model)
    assert [name for name, _ in merged_parameters(model)] == [name for name, _ in engine._iter_named_params()]


def test_autocast_does_not_round_what_is_merged() -> None:
    model = adapted("lora", torch.float32)
    plain = {name: value.clone() for name, value in merged_parameters(model)}
    with torch.autocast("cpu", torch.bfloat16):
        assert same(dict(merged_parameters(model)), plain)


REFUSED = {
    "lora with a bias on layers without": (make_llama, lora(lora_bias=True), "Impossible to merge"),
    "activated lora": (make_llama, lora(alora_invocation_tokens=[3]), "aLoRA|does not support"),
    "embedding that is tied": (make_llama, lora(target_modules=["embed_tokens"]), "tie_word_embeddings"),
    "head that is tied": (make_llama, lora(modules_to_save=["lm_head"]), "tie_word_embeddings"),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_that_no_copy_can_hold_is_refused(case: str) -> None:
    make, config, reason = REFUSED[case]
    model = get_peft_model(make(), config)
    before = bits(model)
    with pytest.raises(ConfigError, match=reason):
        check_mergeable(model)
    assert same(bits(model), before)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("case", MERGED)
def test_an_adapter_that_can_be_merged_is_accepted(case: str) -> None:
    check_mergeable(adapted(case, torch.bfloat16))


def test_a_quantised_base_is_refused() -> None:
    model = adapted("lora", torch.float32)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match="quantised"):
        check_mergeable(model)


# ---- TRL's engine, and runs that sample from it ----------------------------------------------------------------------


class Server:
    """The far end of TRL's client: a model that gets its weights by name, and samples."""

    def __init__(self, logprobs_mode: str = "processed_logprobs"):
        self.model = make_llama(9).eval()
        self.logprobs_mode = logprobs_mode
        self.updates = 0
        self.was_autocast = False

    def get_server_info(self) -> dict[str, Any]:
        return {"model_config": {"logprobs_mode": self.logprobs_mode}}

    def update_named_params(self, metadata: list[Any], named: Iterator[tuple[str, Tensor]]) -> None:
        arrived = {name: value.clone() for name, value in named}
        assert metadata == [(n, str(v.dtype).removeprefix("torch."), list(v.shape)) for n, v in arrived.items()]
        assert not self.model.load_state_dict(arrived, strict=False).unexpected_keys
        self.updates += 1

    def reset_prefix_cache(self) -> None:
        pass

    def generate(
        self, prompts: list[list[int]], temperature: float, max_tokens: int, logprobs: int | None, **settings: Any
    ) -> dict[str, Any]:
        self.was_autocast |= torch.is_autocast_enabled("cpu")
        completions, values = [], []
        stops = settings["generation_kwargs"]["stop_token_ids"]
        for prompt in prompts:
            ids = list(prompt)
            values.append([])
            for _ in range(max_tokens):
                with torch.no_grad():
                    logits = self.model(torch.tensor([ids])).logits[0, -1].float()
                log_p = (logits / (temperature or 1.0)).log_softmax(-1)
                ids.append(int(log_p.exp().multinomial(1)) if temperature else int(log_p.argmax()))
                values[-1].append([float(log_p[ids[-1]])])
                if ids[-1] in stops:
                    break
            completions.append(ids[len(prompt) :])
        return {
            "prompt_ids": prompts,
            "completion_ids": completions,
            "logprobs": None if logprobs is None else values,
            "logprob_token_ids": None,
        }


class Engine(vllm_generation.VLLMGeneration):
    """TRL's, with another transport."""

    server = Server()

    def __init__(self, model: nn.Module, accelerator: Any = None, processing_class: Any = None, **settings: Any):
        if accelerator is None:
            from accelerate import Accelerator

            accelerator = Accelerator(cpu=True)
        super().__init__(model, accelerator, processing_class, **settings)

    def _init_vllm(self) -> None:
        self.vllm_client = self.server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()
    monkeypatch.setattr(Engine, "server", server)
    monkeypatch.setattr(distillation_trainer, "VLLMGeneration", Engine)
    monkeypatch.setattr(distillation_trainer, "is_vllm_available", lambda *_: True)
    return server


def trainer_with_vllm(folder: Path, model: nn.Module, evaluation: Any = None, **changes: Any) -> OPSDTrainer:
    args = make_args(folder, use_vllm=True, vllm_mode="server", gradient_accumulation_steps=1, **changes)
    rows = Dataset.from_list(make_rows())
    teacher = SameCheckpointTeacher(context="answer_only")
    return OPSDTrainer(
        model, teacher, args=args, train_dataset=rows, processing_class=make_tokenizer(), evaluation=evaluation
    )


def test_trl_itself_lets_a_bfloat16_base_drift() -> None:
    """The reason for all of this. If TRL stops merging in place, this file may go."""
    model = adapted("lora", torch.bfloat16)
    before = bits(model)
    Engine(model, mode="server").sync_weights()
    assert not same(bits(model), before)


def test_a_sync_through_trl_leaves_the_base_as_it_was(server: Server) -> None:
    model = adapted("lora", torch.bfloat16)
    before = bits(model)
    engine = Engine(model, mode="server")
    assert prepare_engine(engine, keep_logprobs=False) is None
    for _ in range(3):
        engine.sync_weights()
    assert server.updates == 3 and same(bits(model), before)
    merged = copy.deepcopy(model).float().merge_and_unload().bfloat16()
    assert same(bits(server.model.bfloat16()), bits(merged))


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_a_run_with_an_engine_samples_from_the_student_of_each_step(tmp_path: Path, server: Server, bf16: bool) -> None:
    """Importance ratios near 1 say that the engine holds the weights that train; its forward is not under autocast."""
    model = get_peft_model(make_llama(), lora())
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer = trainer_with_vllm(tmp_path, model, max_steps=3, importance_clip=5.0, bf16=bf16, temperature=0.7)
    trainer.train()
    assert server.updates == 3 and not server.was_autocast
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
    assert logged(trainer, "importance/ratio") == pytest.approx([1.0] * 3, abs=0.02 if bf16 else 1e-4)


def test_evaluation_asks_the_engine_and_gets_the_answers_of_the_model(tmp_path: Path, server: Server) -> None:
    """It asked `generate`, over 90 % of a step on a GPU. Shares of processes and weights are as for rollouts."""
    rows = [{**row, "prompt": [{"role": "user", "content": f"Other {n}?"}]} for n, row in enumerate(make_rows(5))]
    plan = {"test": rows, "grader": "last_number", "samples": 1, "max_new_tokens": 7}
    model = get_peft_model(make_llama(), lora())
    move(model, by=0.05)
    trainer = trainer_with_vllm(tmp_path / "engine", model, max_steps=1, importance_clip=5.0, evaluation=plan)
    student, prompts = trainer.student, [trainer.student.renderer.ids(row["prompt"]) for row in rows]
    expected = generate(model, prompts, student.tokenizer, max_new_tokens=7, batch_size=2)
    before = server.updates
    assert student.complete(prompts, max_new_tokens=7) == expected and server.updates == before + 1
    trainer.train()
    answers = EvaluationResult.load(tmp_path / "engine" / "evaluation" / "before.json").greedy
    assert [answer.length for answer in answers] == [len(ids) for ids in expected]
    # Rollouts come from the student again, though its teacher answered through the engine before step 1.
    assert logged(trainer, "importance/ratio") == pytest.approx([1.0], abs=1e-4)


@pytest.mark.parametrize("kind", ["adapter off", "a copy"])
def test_a_self_teacher_answers_through_the_engine(kind: str, tmp_path: Path, server: Server) -> None:
    """With its own weights: those of the base, or those that it swaps in."""
    model = get_peft_model(make_llama(), lora())
    if kind == "a copy":
        move(model, by=0.05)  # an adapter that arrives trained is copied
    trainer = trainer_with_vllm(tmp_path, model)
    rows = trainer.train_dataset.select(range(3))
    prompts = [trainer.teacher.prompts.ids(row) for row in rows]
    expected = generate(model, prompts, make_tokenizer(), max_new_tokens=6, batch_size=3)
    move(model, by=0.3)  # training goes on
    assert generate(model, prompts, make_tokenizer(), max_new_tokens=6, batch_size=3) != expected
    assert trainer.teacher.sample(rows, max_new_tokens=6, batch_size=3) == expected
    assert server.updates == 1


def test_the_doctor_looks_at_what_the_engine_draws(tmp_path: Path, server: Server) -> None:
    trainer = trainer_with_vllm(tmp_path, make_llama(), max_completion_length=16)
    assert [finding.status for finding in examine(trainer, only=["sampling"]).findings] == ["pass"]
    generate_at = server.generate
    server.generate = lambda *args, temperature, **kwargs: generate_at(*args, temperature=0.3, **kwargs)  # type: ignore[method-assign]
    found = examine(trainer, only=["sampling"]).findings
    assert found[0].status == "fail" and "vLLM samples with other probabilities" in found[0].saw


@pytest.mark.parametrize("mode", ["raw_logprobs", "raw_logits", "processed_logits"])
def test_a_server_with_other_logprobs_is_refused_where_they_are_used(tmp_path: Path, server: Server, mode: str) -> None:
    server.logprobs_mode = mode
    with pytest.raises(ConfigError, match=f"--logprobs-mode {mode}.*--logprobs-mode processed_logprobs"):
        trainer_with_vllm(tmp_path, make_llama(), importance_clip=2.0)
    trainer_with_vllm(tmp_path, make_llama())


def test_a_refused_adapter_is_refused_before_step_1(tmp_path: Path, server: Server) -> None:
    with pytest.raises(ConfigError, match="cannot be sent to vLLM"):
        trainer_with_vllm(tmp_path, get_peft_model(make_llama(), lora(lora_bias=True)))
    assert server.updates == 0
