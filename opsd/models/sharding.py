"""Works with models that FSDP2 shards: names, shards and full tensors of parameters, passes over a part of a model.

FSDP2 replaces parameters by DTensors after teachers were made, gathers a model's embeddings and head only inside its
forward pass, and keeps gathered what a pass gathered. Knows torch's distributed tensors; nothing of teachers, rollouts
or losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from trl.models.utils import _ForwardRedirection

# Added to parameters' names by wrappers, after teachers stored the names.
WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")

T = TypeVar("T")


def is_sharded(model: nn.Module) -> bool:
    """Tell whether FSDP2 has sharded a model."""
    return isinstance(model, FSDPModule)


def plain_name(name: str) -> str:
    """Return a parameter's name without the prefixes of wrappers."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def run_in_forward(model: nn.Module, function: Callable[[], T]) -> T:
    """Call a function inside a sharded model's forward pass, where embeddings, norm and head are gathered.

    The function must return one opaque object: FSDP2 casts tensors that leave a forward pass.
    """
    return _ForwardRedirection()(model, model, function) if is_sharded(model) else function()


def reshard(model: nn.Module) -> None:
    """Free the parameters that earlier passes of a sharded model gathered; no communication."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def shard_like_param(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a full value sharded like a parameter; each process takes its shard of its own copy, no communication."""
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value.to(mesh.device_type), mesh, placements, src_data_rank=None)


def local_shard(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, sharing its memory; the tensor itself where it is not sharded."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor; a collective where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered_on_cpu(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Return full tensors in CPU memory, gathered one after the other: a device holds one of them at a time.

    Args:
        tensors: sharded or not; where they are sharded every process must call this with the same names.
        keep: whether this process needs the result; else it is empty.
    """
    kept = {}
    for name, tensor in tensors.items():
        whole = full_tensor(tensor.detach())
        if keep:
            kept[name] = whole.cpu()
        del whole  # before the next one is gathered
    return kept


def shard_like(model: nn.Module, student: nn.Module) -> None:
    """Shard another model over the student's processes, block by block, where the student is sharded."""
    if not is_sharded(student) or is_sharded(model):
        return
    mesh = next(p for p in student.parameters() if isinstance(p, DTensor)).device_mesh
    blocks = set(getattr(model, "_no_split_modules", None) or ())
    for module in model.modules():
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


@contextmanager
def swapped_shards(pairs: list[tuple[Tensor, Tensor]], model: nn.Module) -> Iterator[None]:
    """Let sharded parameters hold other values for the length of the block.

    Values are copied in and out, shard by shard: FSDP2 gathers from its own memory, which a swapped pointer would not
    reach.

    Args:
        pairs: (parameter, value), sharded alike.
        model: the model of the parameters.
    """
    originals = [local_shard(parameter).clone() for parameter, _ in pairs]
    with torch.no_grad():
        for parameter, value in pairs:
            local_shard(parameter).copy_(local_shard(value))
    try:
        yield
    finally:
        reshard(model)
        with torch.no_grad():
            for (parameter, _), original in zip(pairs, originals, strict=True):
                local_shard(parameter).copy_(original)


def from_first_process(value: Any) -> Any:
    """Return the first process's value in all processes; a collective where there are several."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
