"""Where a teacher's weights go, whether they fit, and what it costs: said before or counted, never guessed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_llama, make_rows, make_tokenizer
from datasets import Dataset
from helpers import make_args, make_rollouts, make_student, prepared
from transformers import AutoConfig, LlamaConfig

from opsd import EMATeacher, MixtureTeacher, RoutedTeacher, SameCheckpointTeacher, SiblingTeacher
from opsd.contexts.renderer import PromptRenderer
from opsd.errors import ConfigError, OPSDWarning
from opsd.models.loading import own_device
from opsd.teachers import StudentHandle, Teacher
from opsd.teachers.placement import Placement
from opsd.training.checks import check_sharding
from opsd.training.cost import measured_cost
from opsd.training.loss import Scorer

HUGE = {"hidden_size": 65536, "intermediate_size": 262144, "num_hidden_layers": 200, "num_attention_heads": 64}


def test_a_teacher_larger_than_memory_is_refused_from_its_config_alone(tmp_path: Path) -> None:
    LlamaConfig(**HUGE, vocab_size=400, dtype="float32").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"takes [\d,]+\.\d GB of weights, and .* are free on cpu.*quantize='4bit'"):
        prepared(SiblingTeacher(str(tmp_path)), make_llama())
    assert time.monotonic() - start < 30
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tie", [True, False])
def test_the_size_that_a_config_tells_is_the_size_of_the_weights(tmp_path: Path, dtype: str, tie: bool) -> None:
    model = make_llama(tie=tie).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    real = sum(p.numel() * p.element_size() for p in model.parameters())
    config = AutoConfig.from_pretrained(tmp_path)
    assert Placement().bytes_of(config) == Placement(dtype=dtype).bytes_of(config) == real
    assert Placement(dtype="float32").bytes_of(config) == sum(p.numel() * 4 for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "bfloat17"}, "no dtype 'bfloat17'"),
        ({"dtype": "nn"}, "no dtype 'nn'"),
        ({"device": "gpu"}, "no device 'gpu'"),
        ({"quantize": "3bit"}, "must be one of 8bit, 4bit"),
        ({"quantize": "4bit", "offload": True}, "exclude each other"),
    ],
)
def test_a_placement_that_cannot_work_is_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SiblingTeacher("no/such-model", **settings)


def test_a_device_that_is_not_here_is_refused_before_the_weights_are_read(llama_folder: str) -> None:
    with pytest.raises(ConfigError, match="a teacher's device is cuda:97"):
        prepared(SiblingTeacher(llama_folder, device="cuda:97"), make_llama())


def test_settings_of_loading_are_refused_for_a_model_that_is_loaded() -> None:
    with pytest.raises(ConfigError, match="loaded already"):
        SiblingTeacher(make_llama(), dtype="bfloat16")


def test_quantisation_without_bitsandbytes_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opsd.teachers.placement.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes, which is not installed.*dtype='bfloat16'"):
        SiblingTeacher("no/such-model", quantize="8bit")


def test_dtype_and_attention_are_those_asked_for(llama_folder: str) -> None:
    teacher = prepared(SiblingTeacher(llama_folder, dtype="bfloat16", attn_implementation="eager"), make_llama())
    assert teacher.model.dtype == torch.bfloat16 and teacher.model.config._attn_implementation == "eager"
    assert not any(p.requires_grad for p in teacher.model.parameters())


OFFLOADED = [
    lambda **kw: SiblingTeacher(make_llama(3), tokenizer=make_tokenizer(), **kw),
    lambda **kw: EMATeacher(0.5, **kw),
    lambda **kw: SameCheckpointTeacher(**kw),
]


@pytest.mark.parametrize("make", OFFLOADED)
def test_offloading_changes_no_score(make: Any) -> None:
    rollouts = make_rollouts()
    found = []
    for offload in (False, True):
        teacher = prepared(make(offload=offload), make_student("full").eval())
        shown = teacher.prompts.render(rollouts)
        found.append(teacher.score(shown).logprobs(torch.tensor(rollouts.scored_ids)))
        assert all(t.device.type == "cpu" for t in teacher.tensors)
    assert torch.equal(*found)


COSTS: list[tuple[Any, float]] = [
    (lambda: EMATeacher(0.9), 1),
    (lambda: MixtureTeacher([EMATeacher(0.9), SameCheckpointTeacher()], [0.5, 0.5]), 2),
    (lambda: MixtureTeacher(EMATeacher(0.9), [0.5, 0.5], contexts=["answer_only", "worked_solution"]), 2),
    (lambda: RoutedTeacher("domain", {"even": EMATeacher(0.9), "odd": SameCheckpointTeacher()}), 1),
]


@pytest.mark.parametrize(("make", "passes"), COSTS)
def test_passes_are_counted_on_a_probe_and_leave_no_trace(tmp_path: Path, make: Any, passes: float) -> None:
    student = make_student("lora")
    teacher: Teacher = make()
    handle = StudentHandle(student, PromptRenderer(make_tokenizer()))
    teacher.prepare(handle)
    scorer = Scorer(make_args(tmp_path), teacher)
    cost = measured_cost(scorer, Dataset.from_list(make_rows()), handle, micro_batches=4)
    assert cost.passes == passes and cost.megabytes == teacher.cost.megabytes
    assert f"forward passes per step: {4 * passes:g}, per rollout: {passes:g}" in str(cost)
    assert all(view.context is None or view.context.counts.rendered == 0 for view in teacher.prompts.leaves)


def test_a_model_stays_on_the_device_of_its_process(tmp_path: Path) -> None:
    """TRL spreads the layers of one process over all GPUs, and transformers splits its batches over them."""
    gpu, cpu = torch.device("cuda:0"), torch.device("cpu")
    assert own_device(gpu, 1) == {"": "cuda:0"} and own_device(gpu, 2) is None and own_device(cpu, 1) is None
    args = make_args(tmp_path)
    args._n_gpu = 4
    with pytest.warns(OPSDWarning, match="there are 4 GPUs.*torchrun --nproc_per_node 4"):
        args._use_one_gpu()
    assert args.n_gpu == 1


def test_a_configuration_for_accelerate_is_one() -> None:
    """Keys that accelerate does not know would be dropped without a word."""
    from accelerate.commands.config.config_args import load_config_from_file

    files = sorted((Path(__file__).parent.parent / "examples" / "accelerate").glob("*.yaml"))
    kinds = {path.stem: load_config_from_file(str(path)) for path in files}
    assert {name: str(config.distributed_type).split(".")[-1] for name, config in kinds.items()} == {
        "ddp": "MULTI_GPU", "fsdp2": "FSDP",
    }  # fmt: skip
    assert kinds["fsdp2"].fsdp_config["fsdp_version"] == 2
    assert json.dumps(kinds["fsdp2"].fsdp_config)


UNSHARDED = {"fsdp": "", "fsdp_config": {}, "deepspeed": None, "seq_kd": False}
REFUSED = [
    ({"fsdp": "full_shard", "fsdp_config": {"version": 1}}, {}, "FSDP 1 flattens"),
    ({}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP 1 flattens"),
    ({"fsdp": "full_shard", "fsdp_config": {"version": 2}, "seq_kd": True}, {}, "with seq_kd the teacher samples"),
    ({"fsdp": True, "fsdp_config": {"cpu_offload": True}}, {}, "keep parameters in CPU memory"),
    ({}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "in CPU memory"),
    ({"deepspeed": {"zero_optimization": {"stage": 2}}}, {}, "DeepSpeed restores a checkpoint on a path of its own"),
    ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed restores a checkpoint"),
]


@pytest.mark.parametrize(("settings", "environment", "message"), REFUSED)
def test_sharding_that_teachers_cannot_follow_is_refused(
    monkeypatch: pytest.MonkeyPatch, settings: dict, environment: dict, message: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        check_sharding(SimpleNamespace(**{**UNSHARDED, **settings}))


def test_fsdp_2_is_accepted_and_is_what_fsdp_alone_means() -> None:
    for settings in ({"fsdp": "full_shard", "fsdp_config": {"version": 2}}, {"fsdp": True}):
        check_sharding(SimpleNamespace(**{**UNSHARDED, **settings}))
