"""Sets up FSDP 2 so that sums keep float32, and so that every save holds a model that loads.

Knows accelerate's plugin for FSDP; nothing of teachers, rollouts or losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import MixedPrecisionPolicy, StateDictType


def _plugin(accelerator: Accelerator) -> Any:
    return getattr(accelerator.state, "fsdp_plugin", None)


def keep_float32_sums(accelerator: Accelerator) -> None:
    """Let FSDP 2 sum gradients in float32 and leave the loss as it is; call it before the model is prepared.

    Under bfloat16 accelerate asks for bfloat16 three times: for computation, for the sum of gradients over processes
    and for what leaves a forward pass. The second rounds every gradient, and micro-batches that wait for one another
    are summed in it too; the third rounds the loss that is logged. Here only the first is kept, and gradients are
    reduced after each micro-batch: they wait in shards, and no process holds a whole float32 gradient.
    """
    plugin = _plugin(accelerator)
    if plugin is None:
        return
    policy = plugin.mixed_precision_policy or MixedPrecisionPolicy()
    plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)
    accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True


@contextmanager
def whole_state_dict(accelerator: Accelerator) -> Iterator[None]:
    """Save one whole model for the length of the block, also where checkpoints are written in shards.

    With `SHARDED_STATE_DICT` transformers' `save_model` writes no model at all: neither a run's folder nor a checkpoint
    of it could be loaded, evaluated or merged. What a resumed run reads stays in shards.
    """
    plugin = _plugin(accelerator)
    if plugin is None:
        yield
        return
    before = plugin.state_dict_type
    plugin.state_dict_type = StateDictType.FULL_STATE_DICT
    try:
        yield
    finally:
        plugin.state_dict_type = before
