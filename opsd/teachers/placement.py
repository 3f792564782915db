"""Loads another model as teacher: its device, precision and quantisation, and whether it fits, before it is loaded.

Knows configs, devices and memory; nothing of teachers.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import psutil
import torch
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig

from opsd.errors import ConfigError, not_one_of
from opsd.models.causal import empty_causal_model, load_causal_model

QUANTISED = {"8bit": 1.0, "4bit": 0.5}  # bytes per weight of the quantised layers
GIGABYTE = 2**30


@dataclass(frozen=True)
class Placement:
    """The device, precision and quantisation of a model that is loaded beside the student.

    Args:
        dtype: dtype to load in, such as "bfloat16"; "auto" takes the checkpoint's.
        device: the device it scores on, such as "cuda:1"; None is the student's device.
        offload: keep it in CPU memory; it is moved to its device only while it scores.
        quantize: "8bit" or "4bit" by bitsandbytes, which must be installed; None loads it as it is.
        attn_implementation: "sdpa", "flash_attention_2", …; None lets transformers choose.

    Raises:
        ConfigError: settings that cannot work together, or not on this machine.

    Example:
        >>> Placement(dtype="bfloat16", device="cuda:1").load("Qwen/Qwen3-8B", student)
    """

    dtype: str | torch.dtype = "auto"
    device: str | None = None
    offload: bool = False
    quantize: str | None = None
    attn_implementation: str | None = None

    def __post_init__(self) -> None:
        known = isinstance(getattr(torch, str(self.dtype), self.dtype), torch.dtype)
        if self.dtype != "auto" and not known:
            raise ConfigError(f"there is no dtype {self.dtype!r}. Use auto, float32, bfloat16 or float16.")
        try:
            torch.device(self.device or "cpu")
        except RuntimeError as error:
            raise ConfigError(f"there is no device {self.device!r}. Use cpu, cuda or cuda:1.") from error
        if self.quantize is None:
            return
        if self.quantize not in QUANTISED:
            raise ConfigError(not_one_of("quantize", self.quantize, QUANTISED))
        if self.offload:
            raise ConfigError(
                "offload and quantize exclude each other: bitsandbytes keeps quantised weights on their device. A "
                "4-bit teacher is small; leave offload out."
            )
        if find_spec("bitsandbytes") is None:
            raise ConfigError(
                f"quantize={self.quantize!r} needs bitsandbytes, which is not installed. `pip install bitsandbytes`, "
                "or load the teacher in bfloat16: dtype='bfloat16'."
            )

    def device_for(self, student: nn.Module) -> torch.device:
        """Return the device on which the model scores.

        Raises:
            ConfigError: this machine has no such device.
        """
        device = torch.device(self.device) if self.device else next(student.parameters()).device
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(
                f"a teacher's device is {device}, and this machine has {torch.cuda.device_count()} GPUs. Name another "
                "device, or leave it out: the student's."
            )
        return device

    def load(self, source: str, student: nn.Module, **kwargs: Any) -> nn.Module:
        """Load a model, frozen, in eval mode, onto its device.

        Args:
            source: a folder or a hub id.
            student: the student, whose device is the default.
            kwargs: `revision`, `trust_remote_code`.

        Raises:
            ConfigError: it does not fit, which its config tells before a weight is read.
        """
        device = self.device_for(student)
        self.check_fits(source, device, **kwargs)
        if self.quantize:
            kwargs["quantization_config"] = BitsAndBytesConfig(**{f"load_in_{self.quantize}": True})
            kwargs["device_map"] = {"": device}
        if self.attn_implementation:
            kwargs["attn_implementation"] = self.attn_implementation
        # safetensors only: a pickle can run code when it is opened.
        model = load_causal_model(source, dtype=self.dtype, use_safetensors=True, **kwargs)
        return self.put(model, student)

    def put(self, model: nn.Module, student: nn.Module) -> nn.Module:
        """Freeze a model and move it to the device where it is kept between passes."""
        model.requires_grad_(False).eval()
        # A model that was split over devices, or quantised, is placed already.
        if hasattr(model, "hf_device_map") or getattr(model, "is_quantized", False):
            return model
        return model.to("cpu" if self.offload else self.device_for(student))

    def check_fits(self, source: str, device: torch.device, **kwargs: Any) -> None:
        """Compare the size of the weights, computed from the config, with the free memory.

        Raises:
            ConfigError: too little memory is free.
        """
        try:
            config = AutoConfig.from_pretrained(source, **kwargs)
        except (OSError, ValueError):
            return  # the config of an adapter's folder is its base's, elsewhere; loading names what is wrong
        if getattr(config, "quantization_config", None):
            return  # quantised already: smaller than its config's dtype suggests, by a factor only its method knows
        needed = self.bytes_of(config, trust_remote_code=bool(kwargs.get("trust_remote_code")))
        where = torch.device("cpu") if self.offload else device
        free = torch.cuda.mem_get_info(where)[0] if where.type == "cuda" else psutil.virtual_memory().available
        if needed > free:
            raise ConfigError(
                f"teacher {source!r} takes {needed / GIGABYTE:,.1f} GB of weights, and {free / GIGABYTE:,.1f} GB are "
                f"free on {where}. Loading it would end in an out-of-memory error. Use a smaller one, "
                "dtype='bfloat16', quantize='4bit', offload=True, or another device."
            )

    def bytes_of(self, config: Any, *, trust_remote_code: bool = False) -> float:
        """Return the size of a model's weights in bytes, from its config alone."""
        model: Any = empty_causal_model(config, trust_remote_code=trust_remote_code)
        head = model.get_output_embeddings()
        unquantised = {id(p) for module in (head, model.get_input_embeddings()) if module for p in module.parameters()}
        dtype = self.dtype if isinstance(self.dtype, torch.dtype) else getattr(torch, self.dtype, None)
        each = (dtype or config.dtype or torch.float32).itemsize
        small = QUANTISED.get(self.quantize or "", each)
        return sum(p.numel() * (each if id(p) in unquantised else small) for p in model.parameters())
