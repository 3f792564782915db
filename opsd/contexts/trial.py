"""Renders a template once in a child process with limits of time and memory, before it is rendered in this process.

Jinja's sandbox limits what a template may touch, not what it may spend. The child runs this file as a program. One
trial covers one row: sandbox.py says what limits the rows after it. Knows templates; nothing of rows, chats or models.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opsd.contexts.template import TemplateBlocks, TemplateText
from opsd.errors import TemplateError, UnsafeTemplateError

SECONDS = 5  # a prompt takes milliseconds
MEGABYTES = 512  # of address space; the interpreter and Jinja take 50
_passed: set[str] = set()  # digests of templates that passed in this process


def try_template(template: TemplateBlocks, values: Mapping[str, Any]) -> None:
    """Render a template in a child process, unless opsd ships it or it has passed before.

    Args:
        template: parsed and checked.
        values: the variables of a row.

    Raises:
        UnsafeTemplateError: it leaves the sandbox, or needs more than `SECONDS` or `MEGABYTES`.
        TemplateError: it fails on these values.
    """
    if not template.is_shipped and template.digest not in _passed:
        render_in_subprocess(template.origin, values)
        _passed.add(template.digest)


def render_in_subprocess(origin: Path | TemplateText, values: Mapping[str, Any]) -> dict[str, str]:
    """Return the text of each block, rendered in a child process.

    Args:
        origin: the template's file, or its text.
        values: the variables; they are pickled.

    Raises:
        UnsafeTemplateError: it leaves the sandbox, or needs more than `SECONDS` or `MEGABYTES`.
        TemplateError: it fails on these values.
    """
    name, source = (str(origin), None) if isinstance(origin, Path) else (origin.name, origin.source)
    limits = {"seconds": SECONDS, "megabytes": MEGABYTES}
    request = pickle.dumps({"name": name, "source": source, "values": dict(values), **limits})
    # The child imports what this process imports; nothing from the current folder, which a stranger may have filled.
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])}
    command = [sys.executable, "-P", "-m", "opsd.contexts.trial"]
    try:
        done = subprocess.run(command, input=request, capture_output=True, timeout=3 * SECONDS, env=env)
    except subprocess.TimeoutExpired as error:
        raise _over_limit(name, f"{SECONDS} seconds") from error
    if done.stdout:
        answer = json.loads(done.stdout.splitlines()[-1])
        if done.returncode == 0:
            return answer
        raise (UnsafeTemplateError if answer["unsafe"] else TemplateError)(answer["error"])
    if b"MemoryError" in done.stderr:
        raise _over_limit(name, f"{MEGABYTES} MB")
    if -done.returncode in (signal.SIGXCPU, signal.SIGKILL):
        raise _over_limit(name, f"{SECONDS} seconds")
    message = done.stderr.decode(errors="replace").strip()[-500:]
    raise TemplateError(
        f"template {name!r} could not be tried in a child process (status {done.returncode}): {message}"
    )


def _over_limit(name: str, limit: str) -> UnsafeTemplateError:
    return UnsafeTemplateError(
        f"template {name!r} cannot be rendered within {limit}, so it was stopped.\nA prompt is rendered for every "
        "rollout, and this template would stop training.\nLook for loops within loops, and for widths or repetitions "
        "of a size that no prompt has."
    )


def _set_limits(seconds: int, megabytes: int) -> None:
    """Limit this process; where the system cannot, the parent's timeout remains."""
    try:
        import resource
    except ImportError:  # Windows
        return
    limits = {resource.RLIMIT_CPU: seconds, resource.RLIMIT_AS: megabytes * 2**20, resource.RLIMIT_CORE: 0}
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with contextlib.suppress(ValueError, OSError):  # macOS has RLIMIT_AS and refuses to set it
            resource.setrlimit(kind, (value, value))


def _main() -> int:
    request = pickle.load(sys.stdin.buffer)  # from the parent
    _set_limits(request["seconds"], request["megabytes"])
    name, source = request["name"], request["source"]
    try:
        template = TemplateBlocks(Path(name) if source is None else TemplateText(name, source))
        print(json.dumps(template.render(request["values"])))
    except TemplateError as error:
        if isinstance(error.__cause__, MemoryError):
            raise MemoryError from error
        print(json.dumps({"error": str(error), "unsafe": isinstance(error, UnsafeTemplateError)}))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
