"""A run on a CPU keeps the memory that its tensors give back, and leaves an allocator alone that the user has set."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

BLOCK = 64  # MiB; glibc maps blocks beyond 32 MiB each for itself, whatever was freed before
CHILD = f"""
import resource, sys
import torch
sys.path.insert(0, {str(Path(__file__).parent)!r})

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones({BLOCK * 2**18})
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
{{}}
faults()
print(before, faults())
"""
ALONE = "from opsd.training.machine import keep_freed_memory\nkeep_freed_memory()"
IN_A_RUN = "from helpers import make_trainer\nfrom opsd import LiveTeacher\nmake_trainer(sys.argv[1], LiveTeacher())"

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")


def faults_of(code: str, folder: Path, **environment: str) -> list[int]:
    """Return the pages that ten large tensors touched for the first time, before and after."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", CHILD.format(code), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env={**kept, **environment})
    assert not done.returncode, done.stderr[-2000:]
    return [int(count) for count in done.stdout.splitlines()[-1].split()]


@pytest.mark.slow
def test_a_run_on_a_cpu_touches_the_pages_of_a_tensor_once(tmp_path: Path) -> None:
    before, after = faults_of(IN_A_RUN, tmp_path)
    assert before >= 10 * BLOCK / 2  # also with pages of 2 MiB
    assert after < before / 10


def test_an_allocator_that_the_user_has_set_is_left_alone(tmp_path: Path) -> None:
    before, after = faults_of(ALONE, tmp_path, MALLOC_ARENA_MAX="4")
    assert after > before / 2
