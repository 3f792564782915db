"""Where another model's weights go, in which precision, and whether they fit; decided before they are loaded.

Knows configs, devices and memory; nothing of teachers.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import psutil
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from opsd.errors import ConfigError, not_one_of

QUANTISED = {"8bit": 1.0, "4bit": 0.5}  # bytes per weight of the quantised layers
GIGABYTE = 2**30


@dataclass(frozen=True)
class Placement:
    """How a model is loaded and where it lives.

    Args:
        dtype: dtype to load in, such as "bfloat16"; "auto" takes the checkpoint's.
        device: where it lives, such as "cuda:1"; None is the student's device.
        offload: keep it in CPU memory; it visits its device only while it scores.
        quantize: "8bit" or "4bit" by bitsandbytes, which must be installed; None loads it as it is.
        attn_implementation: "sdpa", "flash_attention_2", …; None lets transformers choose.

    Raises:
        ConfigError: settings that cannot work together, or here.
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

    def on(self, student: nn.Module) -> torch.device:
        """Return the device on which the model scores.

        Raises:
            ConfigError: it is not here.
        """
        device = torch.device(self.device) if self.device else next(student.parameters()).device
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(
                f"a teacher was to live on {device}, and {torch.cuda.device_count()} GPUs are here. Name another "
                "device, or leave it out: the student's."
            )
        return device

    def load(self, source: str, student: nn.Module, **kwargs: Any) -> nn.Module:
        """Load a model, frozen, in eval mode, where it belongs.

        Args:
            source: a folder or a hub id.
            student: the model beside which it will live.
            kwargs: `revision`, `trust_remote_code`.

        Raises:
            ConfigError: it does not fit, said from its config before a weight is read.
        """
        device = self.on(student)
        self.check_fits(source, device, **kwargs)
        if self.quantize:
            kwargs["quantization_config"] = BitsAndBytesConfig(**{f"load_in_{self.quantize}": True})
            kwargs["device_map"] = {"": device}
        if self.attn_implementation:
            kwargs["attn_implementation"] = self.attn_implementation
        # safetensors only: a pickle can run code when it is opened.
        model = AutoModelForCausalLM.from_pretrained(source, dtype=self.dtype, use_safetensors=True, **kwargs)
        return self.put(model, student)

    def put(self, model: nn.Module, student: nn.Module) -> nn.Module:
        """Freeze a model and move it to where it rests between passes."""
        model.requires_grad_(False).eval()
        # A model that was split over devices, or quantised, already is where it belongs.
        if hasattr(model, "hf_device_map") or getattr(model, "is_quantized", False):
            return model
        return model.to("cpu" if self.offload else self.on(student))

    def check_fits(self, source: str, device: torch.device, **kwargs: Any) -> None:
        """Compare what a config says the weights will take with the memory that is free.

        Raises:
            ConfigError: too little is free.
        """
        try:
            config = AutoConfig.from_pretrained(source, **kwargs)
        except (OSError, ValueError):
            return  # a folder with an adapter only has its base's config elsewhere; loading will say what is wrong
        if getattr(config, "quantization_config", None):
            return  # quantised already: it takes less than its config's dtype says, and how much only its method knows
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
        """Return the size of a model's weights, from its config alone."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        head = model.get_output_embeddings()
        kept = {id(p) for module in (head, model.get_input_embeddings()) if module for p in module.parameters()}
        dtype = self.dtype if isinstance(self.dtype, torch.dtype) else getattr(torch, self.dtype, None)
        each = (dtype or config.dtype or torch.float32).itemsize
        small = QUANTISED.get(self.quantize or "", each)
        return sum(p.numel() * (each if id(p) in kept else small) for p in model.parameters())
