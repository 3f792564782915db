"""Another model as teacher, and what is settled before step 1: its size, its code, its weights, its passes.

The settings of a placement and plain costs are in test_placement.py; here is what goes beyond one plain Llama.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import make_gpt2, make_llama, make_rows, make_tokenizer
from datasets import Dataset
from helpers import LORA, changed, make_args, make_rollouts, make_student, make_trainer, prepared, snapshot
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, LlamaConfig, dynamic_module_utils

from opsd import (
    EMATeacher,
    LiveTeacher,
    MixtureTeacher,
    OPSDTrainer,
    PastCheckpointTeacher,
    RoutedTeacher,
    SameCheckpointTeacher,
    SiblingTeacher,
)
from opsd.contexts.renderer import PromptRenderer
from opsd.errors import ConfigError
from opsd.teachers import StudentHandle, Teacher
from opsd.teachers.placement import Placement
from opsd.training.cost import measured_cost
from opsd.training.loss import Scorer

# ---- whether it fits ----------------------------------------------------------------------------------------------

WIDE = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "vocab_size": 400}
PER_LAYER = 2 * (4 * 8192**2 + 3 * 8192 * 28672)  # bytes in bfloat16


def write_config(folder: Path, bytes_wanted: float, **settings: Any) -> str:
    """A folder with a tokenizer and a config of about this size, and no weights."""
    layers = round(bytes_wanted / PER_LAYER)
    LlamaConfig(**WIDE, num_hidden_layers=layers, dtype="bfloat16", **settings).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


AROUND: dict[str, Callable[[str], Teacher]] = {
    "past checkpoint": PastCheckpointTeacher,
    "offloaded": lambda folder: SiblingTeacher(folder, offload=True),
    "in a mixture": lambda folder: MixtureTeacher([LiveTeacher(), SiblingTeacher(folder)], [0.5, 0.5]),
    "in a route": lambda folder: RoutedTeacher("domain", {"even": SiblingTeacher(folder), "odd": LiveTeacher()}),
}


@pytest.mark.parametrize("how", AROUND)
def test_a_teacher_that_does_not_fit_is_refused_wherever_it_is_part_of(tmp_path: Path, how: str) -> None:
    """There are no weights to load: what is said comes from the config, at once."""
    needed = 3.0 * psutil.virtual_memory().total
    teacher, start = AROUND[how](write_config(tmp_path, needed)), time.monotonic()
    with pytest.raises(ConfigError) as error:
        prepared(teacher, make_llama())
    said = str(error.value)
    assert time.monotonic() - start < 20
    size = float(said.split(" takes ")[1].split(" GB")[0].replace(",", ""))
    assert size * 2**30 == pytest.approx(needed, rel=0.1)
    assert all(way in said for way in ("dtype='bfloat16'", "quantize='4bit'", "offload=True", "a smaller one"))


def test_a_checkpoint_that_is_quantised_already_is_not_measured_as_if_it_were_not(tmp_path: Path) -> None:
    """Its config names the dtype of what is not quantised: four times too much, and a teacher that fits was refused."""
    twice = 2.0 * psutil.virtual_memory().available
    for stored, fits in (({}, False), ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, True)):
        folder = write_config(tmp_path / str(fits), twice, **stored)
        if fits:
            Placement().check_fits(folder, torch.device("cpu"))
        else:
            with pytest.raises(ConfigError, match="GB are free on cpu"):
                Placement().check_fits(folder, torch.device("cpu"))


@pytest.mark.parametrize("make", [make_gpt2, lambda: make_llama(tie=False), lambda: make_llama(attention_bias=True)])
def test_the_size_from_a_config_is_that_of_the_weights_in_every_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], nn.Module]
) -> None:
    """Quantised, embeddings and head keep their dtype: bitsandbytes leaves them out."""
    model = make()
    model.save_pretrained(tmp_path)
    config, count = AutoConfig.from_pretrained(tmp_path), sum(p.numel() for p in model.parameters())
    assert Placement().bytes_of(config) == Placement(dtype=torch.float32).bytes_of(config) == 4 * count
    assert Placement(dtype="bfloat16").bytes_of(config) == Placement(dtype=torch.float16).bytes_of(config) == 2 * count
    monkeypatch.setattr("opsd.teachers.placement.find_spec", lambda name: name)
    own = {id(p): p.numel() for p in (model.get_input_embeddings().weight, model.get_output_embeddings().weight)}
    for quantize, each in (("8bit", 1.0), ("4bit", 0.5)):
        found = Placement(dtype="bfloat16", quantize=quantize).bytes_of(config)
        assert found == pytest.approx(2 * sum(own.values()) + each * (count - sum(own.values())))


# ---- its code and its weights -------------------------------------------------------------------------------------


def write_model_with_code(folder: Path) -> str:
    """A tiny Llama under a name that only the code beside its weights knows."""
    make_llama(3).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": names}))
    return str(folder)


def test_code_that_came_with_the_weights_runs_where_asked_for_and_only_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measuring whether it fits builds the model too, and did not know that it was asked for."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *args: "n")  # transformers asks on a terminal
    folder = write_model_with_code(tmp_path / "model")
    renderer = PromptRenderer(make_tokenizer())
    teacher = SiblingTeacher(folder)
    teacher.prepare(StudentHandle(make_llama(), renderer, trust_remote_code=True))
    assert type(teacher.model).__name__ == "OwnModel"
    with pytest.raises(ValueError, match="trust_remote_code"):
        SiblingTeacher(folder).prepare(StudentHandle(make_llama(), renderer))


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: get_peft_model(model, LoraConfig(**LORA))])
def test_a_sibling_that_shares_what_the_student_trains_is_refused(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """PEFT puts an adapter into the very model it is given: frozen as a teacher, the student could not learn."""
    base = make_llama()
    student = wrap(base)
    trainable = [name for name, p in student.named_parameters() if p.requires_grad]
    with pytest.raises(ConfigError, match=r"was given as the sibling.*Use SameCheckpointTeacher"):
        prepared(SiblingTeacher(base, tokenizer=make_tokenizer()), student)
    assert [name for name, p in student.named_parameters() if p.requires_grad] == trainable
    prepared(SiblingTeacher(make_llama(), tokenizer=make_tokenizer()), student)  # the way out: loaded a second time


def test_an_offloaded_sibling_under_several_contexts_says_the_same(llama_folder: str) -> None:
    said = []
    for offload in (False, True):
        sibling = SiblingTeacher(llama_folder, offload=offload, attn_implementation="eager")
        mixture = prepared(MixtureTeacher(sibling, [0.5, 0.5], contexts=["answer_only", None]), make_llama(1).eval())
        rollouts = mixture.prompts.render(make_rollouts())
        said.append(mixture.score(rollouts).logprobs(torch.tensor(rollouts.scored_ids)))
    assert torch.equal(*said)


# ---- adapters that the loss would go around -----------------------------------------------------------------------

VIRTUAL = {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}
AROUND_THE_LOSS: list[tuple[Any, str]] = [
    (PromptTuningConfig(**VIRTUAL), "PromptTuningConfig trains virtual tokens"),
    (PrefixTuningConfig(**VIRTUAL), "PrefixTuningConfig trains virtual tokens"),
    (PromptEncoderConfig(**VIRTUAL, encoder_hidden_size=8), "PromptEncoderConfig trains virtual tokens"),
    (LoraConfig(r=2, target_modules=["q_proj", "lm_head"]), "the adapter is on the head"),
    (LoraConfig(r=2, target_modules="lm_head"), "the adapter is on the head"),
    (LoraConfig(r=2, target_modules=["embed_out"]), "the adapter is on the head"),
]


@pytest.mark.parametrize(("config", "why"), AROUND_THE_LOSS)
def test_an_adapter_that_the_loss_would_go_around_is_refused_before_a_model_is_looked_for(
    tmp_path: Path, config: Any, why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        OPSDTrainer("no/such-model", args=make_args(tmp_path), peft_config=config)


def test_a_second_adapter_of_a_student_that_arrives_is_checked_too(tmp_path: Path) -> None:
    student = get_peft_model(make_llama(tie=False), LoraConfig(**LORA))
    student.add_adapter("other", LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError, match="the adapter is on the head"):
        make_trainer(tmp_path, None, student)


def test_a_head_that_is_trained_whole_is_trained(tmp_path: Path) -> None:
    """The way out that the refusal names."""
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    trainer = make_trainer(
        tmp_path, EMATeacher(0.5, context="answer_only"), get_peft_model(make_llama(tie=False), config)
    )
    before = snapshot(trainer.model)
    trainer.train()
    assert any("lm_head.modules_to_save" in name for name in changed(trainer, before))


# ---- what it costs ------------------------------------------------------------------------------------------------

COSTS: dict[str, tuple[Callable[[], Teacher], dict[str, Any], float]] = {
    "a checkpoint of this run": (lambda: PastCheckpointTeacher("checkpoint-3"), {}, 1),
    "three teachers": (
        lambda: MixtureTeacher([LiveTeacher(), EMATeacher(0.9), SameCheckpointTeacher()], [0.5, 0.3, 0.2]),
        {},
        3,
    ),
    "three contexts": (
        lambda: MixtureTeacher(LiveTeacher(), [0.5, 0.3, 0.2], contexts=["answer_only", "worked_solution", None]),
        {},
        3,
    ),
    "a route to two contexts": (
        lambda: RoutedTeacher(
            "domain",
            {"even": MixtureTeacher(LiveTeacher(), [0.5, 0.5], contexts=["answer_only", None]), "odd": EMATeacher(0.9)},
        ),
        {},
        1.5,
    ),
    "with an anchor": (lambda: EMATeacher(0.9), {"ref_kl_coef": 0.1}, 2),
    "with a contrast": (lambda: EMATeacher(0.9, context="answer_only"), {"contrast_context": "worked_solution"}, 2),
}


@pytest.mark.parametrize("name", COSTS)
def test_the_passes_of_everyone_who_scores_are_counted_on_rows_from_all_over(tmp_path: Path, name: str) -> None:
    """Rows are sorted by domain here: a probe of the first few would ask one route only."""
    make, settings, passes = COSTS[name]
    rows = sorted(make_rows(16), key=lambda row: str(row["domain"]))
    handle = StudentHandle(make_student("lora"), PromptRenderer(make_tokenizer()))
    loss = Scorer(make_args(tmp_path, **settings), make())
    loss.prepare(handle, [2])
    cost = measured_cost(loss, Dataset.from_list(rows), handle, micro_batches=2)
    drawn = 0.3 if "route" in name else 0.0  # half of the rows are of each domain, and eight are drawn
    assert cost.passes == pytest.approx(passes, abs=drawn)
    assert f"per step: {2 * cost.passes:g}, per rollout: {cost.passes:g}" in str(cost)
    assert measured_cost(loss, None, handle).passes is None
