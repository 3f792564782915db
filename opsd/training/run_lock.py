"""One run at a time in an output folder: the lock that a run holds from its start to its end.

The operating system holds it for the process (flock), so a process that is killed leaves none. On a shared file system
the server holds it, and may go on holding it for a machine that died (NFS 3 does). Knows folders and processes only.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState

from opsd.errors import CheckpointError, OPSDWarning
from opsd.training.together import failing_together

LOCK = "_run.lock"  # transformers uploads no file whose name begins with an underscore
_held: dict[Path, int] = {}  # file descriptors by lock file, of this process


def _close_in_child() -> None:
    """Give a forked child no share in its parent's locks: it might outlive the parent."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def only_run_in(output_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the lock of an output folder for the length of the block; the processes of one run hold it together.

    A process may enter it again for the same folder.

    Args:
        output_dir: the run's folder.

    Raises:
        CheckpointError: in every process of the run, if another run holds it; names that run's process.

    Example:
        >>> with only_run_in("runs/first"):
        ...     trainer.train()
    """
    path, descriptor = Path(output_dir).resolve() / LOCK, None
    try:
        with failing_together():
            if PartialState().is_main_process and path not in _held:
                descriptor = _acquire(path)
        yield
    finally:
        if descriptor is not None:
            _held.pop(path, None)
            os.ftruncate(descriptor, 0)
            os.close(descriptor)


def _acquire(path: Path) -> int | None:
    """Return the descriptor of a lock file that this process has locked; None where the file system has no locks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CheckpointError(
            f"{path.parent} is in use by another run{_holder(path)}. Two runs in one folder would overwrite each "
            "other's checkpoints, and neither could be resumed as itself. Wait for that run or stop it, or choose "
            "another output_dir. A machine that died can leave its lock on a shared file system: where that process "
            f"is known to be gone, delete {path}."
        ) from None
    except OSError as error:
        os.close(descriptor)
        warnings.warn(
            f"{path.parent} is on a file system without locks ({error.strerror}). A second run in this folder would "
            "not be noticed, and would overwrite this one's checkpoints.",
            OPSDWarning,
            stacklevel=4,
        )
        return None
    _held[path] = descriptor
    os.ftruncate(descriptor, 0)
    holder = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    os.write(descriptor, json.dumps(holder).encode())
    return descriptor


def holder_of(output_dir: str | os.PathLike[str]) -> str | None:
    """Return which other process holds the lock of an output folder, in words; None where none does."""
    path = Path(output_dir).resolve() / LOCK
    if not path.is_file():
        return None
    with path.open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return f"another process{_holder(path)}"
        except OSError:  # a file system without locks
            return None
    return None


def _holder(path: Path) -> str:
    """Return which process holds a lock, in words."""
    try:
        holder = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):  # it has not written it yet
        return ""
    return f" (process {holder['pid']} on {holder['host']}, since {holder['since']})"
