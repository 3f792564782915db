"""The loss with a head that FSDP2 has sharded over two real processes, against one process that sees all tokens.

FSDP takes the mean of gradients over processes, so each process's weights are multiplied by their number, as the
trainer does it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROCESSES = 2
WORKER = """
import json, sys
import os
from itertools import product
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode
from opsd.models.head import Head
from opsd.losses import Divergence, Objective, Tokens
from opsd.signals import HiddenSignal

TINY_MB = 1e-5  # one token per chunk

def counted(mode):
    return {str(op).split(".")[-1]: count for op, count in mode.get_comm_counts().items()}

def apart(a, b):
    return float((a - b).abs().max()) if a.numel() else 0.0

def problem(rows):
    torch.manual_seed(0)
    layer = nn.Linear(5, rows, bias=False, dtype=torch.float64)
    states = torch.randn(2, 11, 5, dtype=torch.float64)
    return layer, *states, torch.randn(rows, 5, dtype=torch.float64), torch.rand(11, dtype=torch.float64)

def compute(weight, teacher_weight, hidden, teacher, weight_N, recompute):
    hidden = hidden.clone().requires_grad_()
    signal = HiddenSignal(teacher, Head(teacher_weight))
    objective = Objective(Divergence(1.0), loss_budget_mb=TINY_MB, recompute_loss=recompute)
    with CommDebugMode() as forward:
        loss = objective(hidden, Head(weight), signal, Tokens(weight_N)).loss
    with CommDebugMode() as backward:
        loss.backward()
    return loss.detach(), hidden.grad, counted(forward), counted(backward)

def check(rows, first, recompute, trained):
    layer, hidden, teacher, teacher_weight, weight_N = problem(rows)
    whole = layer.weight.detach().clone().requires_grad_()
    one_loss, one_grad, *_ = compute(whole, teacher_weight, hidden, teacher, weight_N, recompute)
    layer.requires_grad_(trained)
    fully_shard(layer, mesh=mesh)
    assert isinstance(layer.weight, DTensor) and layer.weight.placements == (Shard(0),)
    share = slice(0, first) if rank == 0 else slice(first, None)
    mine = [x[share] for x in (hidden, teacher, world * weight_N)]
    loss, grad, forward, backward = compute(layer.weight, teacher_weight, *mine, recompute)
    dist.all_reduce(loss)
    found = dict(rows=rows, first=first, recompute=recompute, trained=trained, tokens=len(mine[0]),
                 forward=forward, backward=backward,
                 loss=apart(loss / world, one_loss), hidden=apart(grad / world, one_grad[share]))
    if trained:
        assert isinstance(layer.weight.grad, DTensor) and layer.weight.grad.placements == (Shard(0),)
        found["head"] = apart(layer.weight.grad.full_tensor(), whole.grad)
    else:
        assert layer.weight.grad is None
    return found

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh("cpu", (world,))
found = [check(*case) for case in product((32, 31, 1), (7, 11), (False, True), (True, False))]
open(f"{sys.argv[1]}/{rank}.json", "w").write(json.dumps(found))
dist.barrier()
os._exit(0)  # a thread of gloo can abort an interpreter that is being torn down
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What both processes found: head rows that divide and that do not, one rank without tokens, one and two passes."""
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)]
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(folder / "worker.py"), str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [case for rank in range(PROCESSES) for case in json.loads((folder / f"{rank}.json").read_text())]


@pytest.mark.slow
def test_a_sharded_head_gives_the_loss_and_gradients_of_one_process(found: list[dict]) -> None:
    """A gradient summed where FSDP takes means would train the head with twice its rate."""
    assert {case["rows"] for case in found} == {32, 31, 1}
    for case in found:
        assert max(case[key] for key in ("loss", "hidden", "head") if key in case) < 1e-12, case


def test_a_sharded_head_is_gathered_once_a_loss_and_not_once_a_chunk(found: list[dict]) -> None:
    for case in found:
        assert case["forward"] == {"all_gather_into_tensor": 1}, case
        assert case["backward"] == ({"reduce_scatter_tensor": 1} if case["trained"] else {}), case


def test_a_process_without_tokens_takes_part_in_every_collective(found: list[dict]) -> None:
    """One that stayed away from the gradient's reduction would leave the others waiting."""
    empty = [case for case in found if case["tokens"] == 0]
    assert len(empty) == 3 * 2 * 2 and all(case["forward"] for case in empty)
    assert all(case["backward"] for case in empty if case["trained"])
