"""Teachers of a student that FSDP2 shards over two real processes, against the same run in one piece.

The student is sharded by accelerate's own function, the way its launcher does it, on gloo: what FSDP2 computes is the
same on a CPU. Every strategy trains for some steps on replayed rollouts; then scores, students and teachers' states
must be those of the run in one piece.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from helpers import LEAVE, RUNS

WORKER = """
import json, os, sys
sys.path.insert(0, {tests!r})
from dataclasses import replace
from types import SimpleNamespace
import torch, torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from helpers import MAKE_TEACHER, RUNS, make_args, make_rollouts, make_student, move
from conftest import make_llama, make_tokenizer
from peft import LoraConfig, get_peft_model
from opsd.contexts.renderer import PromptRenderer
from opsd.models.sharding import full_tensor, local_shard, run_in_forward
from opsd.teachers import StudentHandle
from opsd.teachers.checks import saved_state
from opsd.training.loss import Scorer

os.environ.update(FSDP_VERSION="2", FSDP_TRANSFORMER_CLS_TO_WRAP="LlamaDecoderLayer")
CPU = torch.device("cpu")
STEPS = 4

def saved_head():
    "The head trains beside the adapter, as a copy that PEFT saves whole: with the adapter off another one is in use."
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    return get_peft_model(make_llama(tie=False), config)

def shard(student):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
                                            reshard_after_forward=True, cpu_ram_efficient_loading=False)
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", is_main_process=rank == 0, device=CPU,
        torch_device_mesh={("fsdp",): device_mesh}, parallelism_config=SimpleNamespace(fsdp_dim_names=["fsdp"]))
    return fsdp2_prepare_model(accelerator, student)

def run(strategy, kind, sharded):
    "Train on replayed rollouts: all rows in one piece, or each process its own of a sharded student."
    student = saved_head() if kind == "saved head" else make_student(kind)
    teacher = MAKE_TEACHER[strategy]()
    listed = {} if teacher.lists is None else {"support": "teacher_top_k", "support_k": teacher.lists}
    loss = Scorer(make_args(folder, ref_kl_coef=0.1, **listed), teacher)
    loss.prepare(StudentHandle(student, PromptRenderer(make_tokenizer())), [2])
    if sharded:
        student = shard(student)
        teacher.shard()
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.1)
    rollouts = loss.prepare_rollouts(make_rollouts(8))
    if strategy in ("ema", "routed"):  # nothing of the second process's rows is scored, one kind of rows is not there
        rollouts = loss.prepare_rollouts(make_rollouts(8).mask_rows([n % 2 == 1 for n in range(8)]))
    rollouts = rollouts.with_num_loss_tokens(rollouts.num_scorable)
    mine = rollouts.select(list(range(8))[rank::world]) if sharded else rollouts
    processes = world if sharded else 1
    history, sent = [], 0
    for step in range(1, STEPS + 1):
        student.train()
        before = {n: local_shard(p).clone() for n, p in student.named_parameters()}
        scored = loss.score(mine)
        for n, p in student.named_parameters():
            assert torch.equal(local_shard(p), before[n]), f"{n} was left changed by the teacher's pass"
        record = run_in_forward(student, lambda: Box(loss(student, scored, CPU, processes))).value
        record.loss.backward()
        optimizer.step(); optimizer.zero_grad()
        with CommDebugMode() as communication:
            teacher.after_step(step)
            history.append({"step": step, "entropy": 5.0, "completions/mean_length": 6.0})
            teacher.before_step(step, history)
        sent += sum(communication.get_comm_counts().values())
    signal = loss.teacher.score(mine)
    ids = torch.tensor(mine.scored_ids, dtype=torch.long)
    values = dict(zip(token_keys(mine), signal.logprobs(ids).tolist()))
    weights = {n: full_tensor(p.detach()).clone() for n, p in student.named_parameters()}
    state = saved_state(teacher)
    buffers = {id(b) for b in getattr(getattr(teacher, "model", None), "buffers", tuple)()}
    cut = all(isinstance(t, DTensor) for t in teacher.tensors if id(t) not in buffers)
    return SimpleNamespace(values=values, weights=weights, state=state, sent=sent, cut=cut)

class Box:
    "One opaque object: FSDP2 casts tensors that leave a forward pass."
    def __init__(self, value): self.value = value

def token_keys(rollouts):
    rows = zip(rollouts.rows, rollouts.loss_mask)
    return [(str(row["prompt"]), n) for row, mask in rows for n, on in enumerate(mask) if on]

def apart(a, b):
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    return max((float((a[n].double() - b[n].double()).abs().max()) for n in a), default=0.0)

folder = sys.argv[1]
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
device_mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("fsdp",))
found = []
for strategy, kind in [*RUNS, ("same_checkpoint", "saved head")]:
    torch.manual_seed(0)
    one = run(strategy, kind, False)
    torch.manual_seed(0)
    two = run(strategy, kind, True)
    torch.manual_seed(0)
    started = saved_head() if kind == "saved head" else make_student(kind)
    start = {n: p.detach() for n, p in started.named_parameters()}
    found.append(dict(strategy=strategy, kind=kind, sent=two.sent, cut=two.cut, tokens=len(two.values),
        scores=max((abs(two.values[k] - one.values[k]) for k in two.values), default=0.0),
        students=apart(two.weights, one.weights), states=apart(two.state, one.state),
        trained=apart(one.weights, start)))
    if rank == 0:
        print(found[-1], flush=True)
json.dump(found, open(os.path.join(folder, f"found-{rank}.json"), "w"))
dist.barrier()
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("sharded")
    script = folder / "worker.py"
    script.write_text(WORKER.replace("{tests!r}", repr(str(Path(__file__).parent))) + LEAVE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, str(script), str(folder)], capture_output=True, text=True, env=environment, timeout=400
        )

    done = run()
    if "SIGSEGV" in done.stderr:
        # Seen once in some twenty runs, on an overloaded machine, and not explained. The crash is shown with its trace,
        # and a second one fails.
        warnings.warn(f"a process of the sharded run crashed:\n{done.stderr[-6000:]}", UserWarning, stacklevel=2)
        done = run()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return [case for rank in range(2) for case in json.loads((folder / f"found-{rank}.json").read_text())]


@pytest.mark.slow
def test_every_strategy_was_sharded(found: list[dict]) -> None:
    assert {(case["strategy"], case["kind"]) for case in found} == {*RUNS, ("same_checkpoint", "saved head")}
    assert any(case["tokens"] == 0 for case in found), "no process was without a scorable row"


def test_a_sharded_run_is_the_run_in_one_piece(found: list[dict]) -> None:
    """Scores, student and teacher's state; a pass that kept gathered weights, or a copy of the wrong shard, fails."""
    for case in found:
        assert case["trained"] > 1e-3, case
        assert case["scores"] <= 1e-4 and case["students"] <= 2e-5 and case["states"] <= 2e-5, case


def test_teachers_follow_shard_by_shard_and_send_nothing(found: list[dict]) -> None:
    """A gate's verdict is sent (two messages for each of two renewals); weights never are."""
    for case in found:
        assert case["sent"] <= (4 if case["strategy"] == "snapshot" else 0) and case["cut"], case
