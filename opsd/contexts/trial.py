"""Renders a template once in a process of its own, with limits of time and memory, before it is rendered here.

Jinja's sandbox bounds what a template may touch, not what it may spend: nested loops run for days, and a format string
asks for gigabytes. The child is this file as a program. Knows templates; nothing of rows, prompts or models.
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
from typing import TYPE_CHECKING, Any

from opsd.errors import TemplateError, UnsafeTemplateError

if TYPE_CHECKING:
    from opsd.contexts.template import TemplateText

SECONDS = 5  # a prompt is rendered in milliseconds
MEGABYTES = 512  # of address space, the interpreter and Jinja included: they take 50
_passed: set[str] = set()


def render_in_subprocess(origin: Path | TemplateText, digest: str, values: Mapping[str, Any]) -> None:
    """Render a template in a child process, and forget what it wrote.

    Args:
        origin: the template's file, or its text.
        digest: of the template and all that it extends; one that has passed is not asked again.
        values: what it is rendered with; a filter that would need a tokenizer takes four characters for a token.

    Raises:
        TemplateError: it spends more than `SECONDS` or `MEGABYTES`, or fails otherwise on these values.
    """
    if digest in _passed:
        return
    name, source = (str(origin), None) if isinstance(origin, Path) else (origin.name, origin.source)
    order = pickle.dumps({"name": name, "source": source, "values": dict(values)})
    # What this process imports from, and not the current folder, whose files a stranger may have written.
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])}
    command = [sys.executable, "-P", "-m", "opsd.contexts.trial"]
    try:
        done = subprocess.run(command, input=order, capture_output=True, timeout=3 * SECONDS, env=env)
    except subprocess.TimeoutExpired as error:
        raise _spent(name, f"{SECONDS} seconds") from error
    if done.returncode == 0:
        _passed.add(digest)
        return
    if done.stdout:
        told = json.loads(done.stdout)
        raise (UnsafeTemplateError if told["unsafe"] else TemplateError)(told["error"])
    if b"MemoryError" in done.stderr:
        raise _spent(name, f"{MEGABYTES} MB")
    if -done.returncode in (signal.SIGXCPU, signal.SIGKILL):  # the processor time was spent
        raise _spent(name, f"{SECONDS} seconds")
    told = done.stderr.decode(errors="replace").strip()[-500:]
    raise TemplateError(f"template {name!r} could not be tried out (status {done.returncode}): {told}")


def _spent(name: str, what: str) -> UnsafeTemplateError:
    return UnsafeTemplateError(
        f"template {name!r} cannot be rendered within {what}, so it was stopped.\nA prompt is rendered for every "
        "rollout, and a template that takes this much would stop training. Look for loops within loops, and for widths "
        "or repetitions of a size that no prompt has."
    )


def _limit() -> None:
    """Bound what this process may spend; where the system cannot, the parent's clock still does."""
    try:
        import resource
    except ImportError:  # Windows
        return
    wanted = {resource.RLIMIT_CPU: SECONDS, resource.RLIMIT_AS: MEGABYTES * 2**20, resource.RLIMIT_CORE: 0}
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with contextlib.suppress(ValueError, OSError):  # macOS knows RLIMIT_AS and refuses to set it
            resource.setrlimit(kind, (value, value))


def _main() -> int:
    order = pickle.load(sys.stdin.buffer)  # from the parent
    _limit()
    from opsd.contexts.template import TemplateBlocks, TemplateText

    origin = Path(order["name"]) if order["source"] is None else TemplateText(order["name"], order["source"])
    try:
        TemplateBlocks(origin, trusted=True).render(order["values"])
    except TemplateError as error:
        if isinstance(error.__cause__, MemoryError):
            raise MemoryError from error
        print(json.dumps({"error": str(error), "unsafe": isinstance(error, UnsafeTemplateError)}))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
