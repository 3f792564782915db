"""`opsd serve MODEL`: the command that serves a model as a teacher, printed or started."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence

from opsd.errors import ConfigError
from opsd.signals import TOP_K

PORT = 8000


def make_parser() -> argparse.ArgumentParser:
    """Return the options of `opsd serve`."""
    parser = argparse.ArgumentParser(
        prog="opsd serve",
        description="Print the vLLM command that serves a model as a teacher, or start it (--exec). Run it where the "
        "teacher fits, in an environment that has vLLM; the trainer needs none.",
        epilog="Example: opsd serve Qwen/Qwen3-8B --top_k 64, and in the run: teacher: {strategy: served, url: "
        "http://gpu-1:8000, top_k: 64}",
    )
    parser.add_argument("model", metavar="MODEL", help="a folder or a hub id")
    parser.add_argument("--top_k", type=int, default=TOP_K, help=f"as the teacher's top_k (default: {TOP_K})")
    parser.add_argument("--host", default="127.0.0.1", help="where it listens (default: this machine only)")
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument("--dtype", default="auto", help="auto (default), bfloat16 or float32; float32 is exact to 2e-4")
    parser.add_argument("--max_length", type=int, metavar="TOKENS", help="of prompt and completion together")
    parser.add_argument("--cpu", action="store_true", help="for a machine without an accelerator")
    parser.add_argument("--exec", action="store_true", help="start it in place of this command")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Print the command, or become it."""
    options = make_parser().parse_args(arguments)
    if options.top_k < 1:
        raise ConfigError(f"--top_k is {options.top_k}, and a teacher lists one token at least.")
    command, environment = command_of(options)
    if options.exec:
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                "vLLM is not installed here, and it serves the model. Install it in an environment of its own (pip "
                "install vllm), and run there what `opsd serve` prints without --exec."
            )
        os.execvpe(sys.executable, [sys.executable, *command[1:]], {**os.environ, **environment})
    set_first = "".join(f"{name}={shlex.quote(value)} " for name, value in environment.items())
    print(set_first + shlex.join(command))
    return 0


def command_of(options: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """Return the command, and what it needs in its environment."""
    command = [
        "python", "-m", "vllm.entrypoints.openai.api_server", "--model", options.model, "--served-model-name",
        "teacher", "--host", options.host, "--port", str(options.port), "--dtype", options.dtype, "--max-logprobs",
        str(options.top_k), "--logprobs-mode", "raw_logprobs", "--generation-config", "vllm",
    ]  # fmt: skip
    if options.max_length:
        command += ["--max-model-len", str(options.max_length)]
    environment = {}
    if options.cpu:
        command.append("--enforce-eager")  # compiling takes a minute and gains nothing here
        environment = {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}"}
    return command, environment
