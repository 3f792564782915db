"""This machine: the number format that trains faster on it, its hardware, the memory this process has used.

Asks torch and the operating system; reads no folder and knows nothing of models or runs.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from transformers.utils import is_torch_bf16_gpu_available

# With one of these instructions bfloat16 products run several times faster than float32; without them oneDNN emulates
# bfloat16, up to hundreds of times slower.
BF16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16")
# The widest first: CPUs of one name differ in them, and so in speed.
VECTORS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 with bfloat16", "avx512_f": "AVX-512", "avx2": "AVX2"}


def cpu_has_bf16() -> bool:
    """Return whether this CPU multiplies bfloat16 matrices itself, and torch has the kernels (oneDNN) for it."""
    if not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.cpu, "get_capabilities"):  # older torch; every CPU with AMX has this one too
        return torch.cpu._is_avx512_bf16_supported()
    return any(_has(name) for name in BF16_INSTRUCTIONS)


def _has(instructions: str) -> bool:
    return hasattr(torch.cpu, "get_capabilities") and bool(torch.cpu.get_capabilities().get(instructions))


def choose_bf16(use_cpu: bool) -> bool:
    """Return whether bfloat16 autocast trains faster here than float32: the same answer every time on one machine.

    Args:
        use_cpu: whether the run stays on the CPU although there is a GPU.
    """
    if torch.accelerator.is_available() and not use_cpu:
        return is_torch_bf16_gpu_available()
    return cpu_has_bf16()


# glibc's names of settings: whether large blocks are mapped each for itself, and when free memory goes back.
M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1


def keep_freed_memory() -> None:
    """Let this process keep the memory that tensors on a CPU give back, for the next ones.

    glibc returns large blocks to the system at once, and each page of the next one is cleared when it is first touched:
    600 MB of a step of the demo, a fifth of whose time it took in a virtual machine. Does nothing without glibc, or
    where the user has set its allocator (MALLOC_…, GLIBC_TUNABLES).
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    if platform.libc_ver()[0] == "glibc":
        of_system = ctypes.CDLL(None)
        of_system.mallopt(M_MMAP_MAX, 0)
        of_system.mallopt(M_TRIM_THRESHOLD, -1)


def hardware() -> dict[str, Any]:
    """Return what this machine is, for the run card."""
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "system": sys.platform,
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    name = names[0].partition(":")[2].strip() if names else platform.processor()
    vectors = next((words for instructions, words in VECTORS.items() if _has(instructions)), "")
    return ", ".join(filter(None, (name, vectors)))


def peak_megabytes() -> float:
    """Return the largest resident memory this process has had, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
