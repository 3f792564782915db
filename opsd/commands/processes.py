"""Runs commands as child processes, several at a time, each with its log; a signal stops all of them in order.

Knows processes and files; nothing of what the commands do.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
PAUSE = 0.1  # seconds between two looks at the processes
THREADS = "OMP_NUM_THREADS"
_PR_SET_PDEATHSIG = 1  # prctl(2): the signal a process gets when its parent dies


@dataclass(frozen=True)
class Job:
    """A command and the file that its output is appended to.

    Example:
        >>> Job("first", ["opsd", "train", "run.yaml"], Path("runs/first/train.log")).name
        'first'
    """

    name: str
    command: Sequence[str]
    log: Path


@dataclass
class Processes:
    """Runs jobs, `at_once` at a time.

    Args:
        at_once: processes at a time.
        started: called with each job before it starts.
        ended: called with each job that ended, its exit status and its seconds; False lets no other job start, and
            stops those that run.

    Example:
        >>> Processes(2, started=print, ended=print).run([Job("hello", ["echo", "hello"], Path("hello.log"))])
    """

    at_once: int
    started: Callable[[Job], None]
    ended: Callable[[Job, int, float], bool]
    received: list[int] = field(default_factory=list)  # signals, in order
    _running: dict[subprocess.Popen[bytes], tuple[Job, float]] = field(default_factory=dict)

    def run(self, jobs: Sequence[Job]) -> None:
        """Run all jobs, in order; returns when they have ended, or when a signal or a job has stopped the rest."""
        waiting, goes_on = list(jobs), True
        with self._listening():
            while self._running or (waiting and goes_on and not self.received):
                while waiting and goes_on and not self.received and len(self._running) < self.at_once:
                    self._start(waiting.pop(0))
                time.sleep(PAUSE)
                for process, (job, began) in list(self._running.items()):
                    status = process.poll()
                    if status is not None:
                        del self._running[process]
                        goes_on = self.ended(job, status, time.monotonic() - began) and goes_on
                        if not goes_on:
                            self._send(signal.SIGTERM)

    def _start(self, job: Job) -> None:
        self.started(job)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("ab") as log:
            process = subprocess.Popen(
                job.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(os.environ, self.at_once),
                start_new_session=True,  # Ctrl-C in a terminal reaches this process alone, which passes it on
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        self._running[process] = (job, time.monotonic())

    def _send(self, number: int) -> None:
        for process in self._running:
            process.send_signal(number)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        # A run saves a checkpoint on the first signal; only a second Ctrl-C means "at once".
        is_second = len(self.received) > 1 and number == signal.SIGINT
        if is_second or len(self.received) == 1:
            self._send(signal.SIGINT if is_second else signal.SIGTERM)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        # Under nohup a hangup is ignored, and stays so.
        numbers = [n for n in STOPPING if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def environment(given: Mapping[str, str], at_once: int) -> dict[str, str]:
    """Return the environment of a child: its share of the cores, and output that is written line by line."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = {THREADS: str(max(1, cores // at_once))} if at_once > 1 else {}
    return {**share, "PYTHONUNBUFFERED": "1", **given}


def _end_with_parent() -> None:
    """Let the kernel end this child as SIGTERM does when its parent is killed, so that none goes on unseen."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
