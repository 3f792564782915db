"""What trains is float32: refuses weights that would train in 16 bits, and widens adapters that arrive in them.

bfloat16 keeps 8 bits of a weight, so at TRL's default learning rate of 1e-6 nearly every update is rounded away. Under
autocast the products are computed in 16 bits all the same. Knows a model and settings; nothing of teachers.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import AutoConfig

from opsd.errors import ConfigError
from opsd.models.loading import is_adapter
from opsd.teachers.weight_copy import adapter_parameters

WIDE = (torch.float32, torch.float64)
REASON = (
    "An update below 1/512 of a bfloat16 weight is rounded away: at a learning rate of 1e-6, 98 % of the weights do "
    "not move in 100 steps; and gradients of float16 weights cannot be unscaled. Load the model in float32 "
    "(model_init_kwargs={'dtype': 'float32'}, --dtype float32, or model.float()); with bf16=True its products are "
    "computed in bfloat16 all the same. Or train an adapter on it: peft_config=LoraConfig(…), --use_peft."
)


def choose_dtype(model: Any, args: Any, peft_config: PeftConfig | None) -> None:
    """Refuse to load weights in 16 bits and train them in full; load a frozen bfloat16 base as it is on a GPU.

    TRL widens it to float32, which autocast then casts again at every token that is sampled.

    Args:
        model: the student's name; a loaded one goes to `widen_adapter`.
        args: training arguments, whose `model_init_kwargs` may name a dtype, and get one for a base under bfloat16
            autocast on a GPU; TRL's default is float32.
        peft_config: an adapter's settings, or None where the weights themselves train.

    Raises:
        ConfigError: names the dtype.
    """
    if not isinstance(model, str):
        return
    if is_adapter(model):
        peft_config = PeftConfig.from_pretrained(model)
    if peft_config is not None:
        given, on_gpu = args.model_init_kwargs or {}, args.device.type not in ("cpu", "mps")
        if "dtype" not in given and args.bf16 and on_gpu and _freezes_base(peft_config):
            base = peft_config.base_model_name_or_path if is_adapter(model) else model
            if _dtype_of(base, args) == torch.bfloat16:  # of another checkpoint it would round the weights
                args.model_init_kwargs = {**given, "dtype": "bfloat16"}
        return
    dtype = (args.model_init_kwargs or {}).get("dtype", "float32")
    dtype = _dtype_of(model, args) if dtype in ("auto", None) else dtype
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and dtype not in WIDE:
        raise ConfigError(f"weights that train must be float32, and model_init_kwargs loads them in {dtype}. {REASON}")


def _dtype_of(model: Any, args: Any) -> torch.dtype | None:
    """Return the dtype that a checkpoint's config names; None where it names none, or there is none."""
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=args.trust_remote_code).dtype
    except (OSError, ValueError):
        return None  # loading the model names what is wrong


def _freezes_base(peft_config: PeftConfig) -> bool:
    """Tell whether all that trains is the adapter's own: weights of the base that train must be float32."""
    beside = (getattr(peft_config, name, None) for name in ("modules_to_save", "trainable_token_indices"))
    return not any(beside) and getattr(peft_config, "bias", "none") == "none"


def widen_adapter(student: nn.Module) -> str | None:
    """Make the parameters of an adapter float32, in place.

    Returns:
        A line for the user, or None where nothing had to be widened.

    Raises:
        ConfigError: parameters that train in 16 bits and are not an adapter's.
    """
    narrow = {name: p for name, p in student.named_parameters() if p.requires_grad and p.dtype not in WIDE}
    # The layers of an adapter cast their input to their parameters' dtype; modules that are saved whole do not.
    of_adapter = adapter_parameters(student, saved_modules=False)
    beside = [name for name, p in narrow.items() if p not in of_adapter]
    if beside:
        where = "beside the adapter (modules_to_save, bias, unfrozen)" if of_adapter else "of this model"
        raise ConfigError(
            f"weights that train must be float32, and {len(beside)} tensors {where} are {narrow[beside[0]].dtype} "
            f"(first: {beside[0]}). {REASON}"
        )
    if not narrow:
        return None
    dtypes = {str(p.dtype).removeprefix("torch.") for p in narrow.values()}
    for p in narrow.values():
        p.data = p.data.to(torch.float32)
    return f"adapter: {len(narrow)} tensors came in {', '.join(sorted(dtypes))}, and train in float32"
