"""Whole runs that accelerate shards with FSDP 2 over two real processes on CPUs (gloo), in bfloat16.

accelerate offers FSDP on GPUs only, by a test of the kind of its processes; the worker names another kind, and all
that follows is what a GPU run does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import LEAVE

WORKER = """
import json, os, sys
sys.path.insert(0, {tests!r})
import weakref
import torch, torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from conftest import make_llama, make_rows, make_tokenizer
from datasets import Dataset
from helpers import logged, make_args, make_student
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, TrainerCallback
from opsd import EMATeacher, OPSDTrainer
from opsd.models.sharding import full_tensor
from opsd.training.vllm_sync import merged_parameters

folder = sys.argv[1]
EMA_NAMES = "opsd_teacher.safetensors"

class Gradients(TrainerCallback):
    "Share of the gradient's values that bfloat16 can hold, and whether it waits in shards between micro-batches."
    shares, waits = [], []
    def on_substep_end(self, args, state, control, model=None, **kwargs):
        self.waits.append(all(isinstance(p.grad, DTensor) for p in model.parameters() if p.requires_grad))
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        values = torch.cat([p.grad.to_local().flatten() for p in model.parameters() if p.grad is not None])
        values = values[values != 0]
        self.shares.append(float((values == values.bfloat16()).float().mean()))

class Gathered:
    "Counts the whole tensors that are alive while FSDP gathers another."
    most, alive = 0, []
    def __enter__(self):
        self.original = DTensor.full_tensor
        def full(tensor, *args, **kwargs):
            Gathered.alive = [ref for ref in Gathered.alive if ref() is not None]
            whole = self.original(tensor, *args, **kwargs)
            Gathered.alive.append(weakref.ref(whole))
            Gathered.most = max(Gathered.most, len(Gathered.alive))
            return whole
        DTensor.full_tensor = full
    def __exit__(self, *error):
        DTensor.full_tensor = self.original

def make(name, student, kind, **changes):
    fsdp = dict(version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP", reshard_after_forward=True,
                transformer_layer_cls_to_wrap=["LlamaDecoderLayer"], state_dict_type=kind,
                cpu_ram_efficient_loading=False)
    args = make_args(os.path.join(folder, name), bf16=True, max_steps=2, save_strategy="steps", save_steps=1, fsdp=True,
                     fsdp_config=fsdp, max_grad_norm=1e6, **changes)
    args.device
    PartialState().distributed_type = DistributedType.MULTI_XPU
    return OPSDTrainer(make_student(student), EMATeacher(0.9, context="answer_only"), args=args,
                       train_dataset=Dataset.from_list(make_rows()), processing_class=make_tokenizer(),
                       callbacks=[Gradients()])

def apart(a, b):
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    return max(float((a[n].double() - b[n].double()).abs().max()) for n in a)

def whole(model):
    return {n: full_tensor(p.detach()).clone() for n, p in model.named_parameters()}

found = {}
for student, kind in (("full", "SHARDED_STATE_DICT"), ("full", "FULL_STATE_DICT"), ("lora", "SHARDED_STATE_DICT")):
    name = f"{student} {kind}"
    Gradients.shares, Gradients.waits = [], []
    trainer = make(name, student, kind)
    trainer.train()
    result = found[name] = dict(
        sharded=all(isinstance(p, DTensor) for p in trainer.model.parameters()), shares=list(Gradients.shares),
        waits=list(Gradients.waits),
        loss=logged(trainer, "loss"), divergence=logged(trainer, "divergence"))
    Gathered.most = 0
    with Gathered():
        trainer._save_checkpoint(trainer.model, None)  # step 2's again
    result["gathered"] = Gathered.most
    trainer.save_model()
    dist.barrier()
    here, path = whole(trainer.model), os.path.join(folder, name)
    for place in (os.path.join(path, "checkpoint-2"), path):
        if student == "full":
            loaded = AutoModelForCausalLM.from_pretrained(place)
        else:
            loaded = PeftModel.from_pretrained(make_llama(0), place)
        result.setdefault("saved", []).append(apart(dict(loaded.named_parameters()), here))
    if student == "lora":
        merged = {n: p.detach() for n, p in loaded.merge_and_unload().named_parameters()}
        result["sent"] = apart(dict(merged_parameters(trainer.model)), merged)
        result["whole after"] = apart(whole(trainer.model), here)
    copies = {n: full_tensor(v) for n, v in trainer.teacher.state_dict().items()}
    result["teacher"] = apart(load_file(os.path.join(path, "checkpoint-2", EMA_NAMES)), copies)
    again = make(name, student, kind)
    again.train(resume_from_checkpoint=os.path.join(path, "checkpoint-1"))
    result["resumed"] = apart(whole(again.model), here)
ahead = make("ahead", "full", "SHARDED_STATE_DICT", importance_clip=2.0,
             gradient_accumulation_steps=1, steps_per_generation=2)
ahead.train()
found["ahead"] = dict(staleness=logged(ahead, "staleness"), ratio=logged(ahead, "importance/ratio"))
json.dump(found, open(os.path.join(folder, f"found-{dist.get_rank()}.json"), "w"))
dist.barrier()
os._exit(0)  # a thread of gloo can abort an interpreter that is being torn down
"""


@pytest.fixture(scope="module")
def of_all(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What both processes found, per run."""
    folder = tmp_path_factory.mktemp("runs")
    script = folder / "worker.py"
    script.write_text(WORKER.replace("{tests!r}", repr(str(Path(__file__).parent))) + LEAVE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script), str(folder)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    results = [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2)]
    return [{"run": run, "rank": rank, **case} for rank in range(2) for run, case in results[rank].items()]


@pytest.fixture(scope="module")
def found(of_all: list[dict]) -> list[dict]:
    """What both processes found of runs that sample for one step."""
    return [case for case in of_all if case["run"] != "ahead"]


@pytest.mark.slow
def test_the_logged_loss_is_the_divergence_in_float32(found: list[dict]) -> None:
    """FSDP 2 casts what leaves a forward pass: 0.33984 was logged where the loss was 0.34009."""
    for case in found:
        assert case["sharded"] and len(case["loss"]) == 2
        assert case["loss"] == pytest.approx(case["divergence"], rel=1e-6), case


@pytest.mark.slow
def test_gradients_are_summed_in_float32(found: list[dict]) -> None:
    """Over processes and over micro-batches; in bfloat16 every value is one that bfloat16 can hold."""
    for case in found:
        assert len(case["shares"]) >= 2 and max(case["shares"]) < 0.7, case


@pytest.mark.slow
def test_gradients_wait_for_the_next_micro_batch_in_shards(found: list[dict]) -> None:
    """Without a reduction after each, every process would hold a whole gradient in float32."""
    for case in found:
        assert case["waits"] and all(case["waits"]), case


@pytest.mark.slow
def test_a_save_holds_one_gathered_tensor_of_the_teacher_at_a_time(found: list[dict]) -> None:
    """The process that writes keeps them in CPU memory, which is this test's device too; the other keeps none."""
    for case in found:
        assert case["teacher"] == 0.0
        assert case["rank"] == 0 or case["gathered"] == 1, case


@pytest.mark.slow
def test_a_sharded_run_saves_models_that_load(found: list[dict]) -> None:
    """The last checkpoint and the run's folder; with SHARDED_STATE_DICT transformers' `save_model` writes nothing."""
    for case in found:
        assert case["saved"] == [0.0, 0.0], case


@pytest.mark.slow
def test_a_sharded_run_resumes_to_the_same_weights(found: list[dict]) -> None:
    for case in found:
        assert case["resumed"] == 0.0, case


@pytest.mark.slow
def test_an_engine_gets_merged_weights_of_a_sharded_adapter(found: list[dict]) -> None:
    for case in (case for case in found if "sent" in case):
        assert case["sent"] <= 1e-6 and case["whole after"] == 0.0, case


@pytest.mark.slow
def test_samples_of_older_weights_have_a_ratio_in_a_sharded_run(of_all: list[dict]) -> None:
    """The student's scores of its samples are a pass of the sharded model, between its training passes."""
    for case in (case for case in of_all if case["run"] == "ahead"):
        assert case["staleness"] == [0.0, 1.0]
        assert case["ratio"][0] == pytest.approx(1.0, abs=1e-4) and case["ratio"][1] != case["ratio"][0], case
