"""A real vLLM server on this machine's CPU, in an environment of its own; `make test-served` makes one and runs these.

OPSD_VLLM is the python of that environment.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from opsd.commands.demo_tasks import packaged_model
from opsd.commands.serve import command_of, make_parser

PYTHON = os.environ.get("OPSD_VLLM", "")
TOP_K, MOST_TOKENS = 64, 1024
STARTS = 300.0  # seconds


class VLLM:
    """A server that can be stopped and started again at the same address."""

    def __init__(self, log: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self._log = f"http://127.0.0.1:{self.port}", log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        given = [packaged_model(), "--top_k", str(TOP_K), "--port", str(self.port), "--dtype", "float32", "--cpu"]
        command, environment = command_of(make_parser().parse_args([*given, "--max_length", str(MOST_TOKENS)]))
        threads = Path(PYTHON).parents[1] / "lib" / "libiomp5.so"
        environment |= {"LD_PRELOAD": str(threads)} if threads.is_file() else {}
        environment |= {
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_HOST_IP": "127.0.0.1",
        }
        own = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [PYTHON, *command[1:]], env={**own, **environment}, stdout=log, stderr=log, start_new_session=True
            )
        until = time.monotonic() + STARTS
        while time.monotonic() < until:
            if self._process.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=2)
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise RuntimeError(f"vLLM did not start:\n{self._log.read_text(errors='replace')[-3000:]}")

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
