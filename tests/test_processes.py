"""Child processes: several at a time, each with its log, all of them stopped by one signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from opsd.commands.processes import Job, Processes, environment


def jobs(folder: Path, *scripts: str) -> list[Job]:
    return [Job(str(n), ["sh", "-c", script], folder / f"{n}.log") for n, script in enumerate(scripts)]


def test_n_run_at_a_time_and_a_failure_does_not_stop_the_others(tmp_path: Path) -> None:
    running, most, statuses = set[str](), [0], dict[str, int]()

    def started(job: Job) -> None:
        running.add(job.name)
        most[0] = max(most[0], len(running))

    def ended(job: Job, status: int, seconds: float) -> bool:
        running.discard(job.name)
        statuses[job.name] = status
        return True

    scripts = ["echo out; echo err >&2; exit 3", "sleep 0.2", "sleep 0.2", "echo $OMP_NUM_THREADS"]
    Processes(2, started, ended).run(jobs(tmp_path, *scripts))
    assert statuses == {"0": 3, "1": 0, "2": 0, "3": 0} and most == [2]
    assert (tmp_path / "0.log").read_text() == "out\nerr\n"


def test_children_share_the_cores_unless_the_user_said_otherwise() -> None:
    cores = len(os.sched_getaffinity(0))
    assert environment({}, 2)["OMP_NUM_THREADS"] == str(max(1, cores // 2))
    assert environment({"OMP_NUM_THREADS": "7"}, 2)["OMP_NUM_THREADS"] == "7"
    assert "OMP_NUM_THREADS" not in environment({}, 1)


def test_a_job_can_stop_the_rest(tmp_path: Path) -> None:
    statuses = dict[str, int]()

    def ended(job: Job, status: int, seconds: float) -> bool:
        statuses[job.name] = status
        return job.name != "0"

    Processes(2, lambda job: None, ended).run(jobs(tmp_path, "exit 1", "exec sleep 30", "true"))
    assert statuses == {"0": 1, "1": -signal.SIGTERM}


def test_a_signal_reaches_the_children_once_and_waits_for_them(tmp_path: Path) -> None:
    """A second SIGTERM of a cluster must not end a child that is saving; no other job may start."""
    script = "trap 'echo saving; sleep 0.4; echo saved; exit 143' TERM; while true; do sleep 0.05; done"
    statuses = dict[str, int]()
    processes = Processes(2, lambda job: None, lambda job, status, _: bool(statuses.update({job.name: status})) or True)

    def stop() -> None:
        for _ in range(2):
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    processes.run(jobs(tmp_path, script, "exec sleep 30", "true"))
    thread.join()
    assert statuses == {"0": 143, "1": -signal.SIGTERM} and processes.received == [signal.SIGTERM] * 2
    assert (tmp_path / "0.log").read_text() == "saving\nsaved\n"


def test_children_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """A run that nobody knows of would go on in the folder that the next sweep trains in."""
    code = (
        "from pathlib import Path; from opsd.commands.processes import *\n"
        "Processes(1, lambda job: None, lambda *a: True).run([Job('x', ['sh', '-c', 'echo $$; exec sleep 60'],"
        f" Path({str(tmp_path / 'log')!r}))])"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    log = tmp_path / "log"
    while not log.is_file() or not log.read_text():
        time.sleep(0.05)
    child = int(log.read_text())
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not _is_alive(child):
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    raise AssertionError("the child outlived its parent")


def _is_alive(process: int) -> bool:
    state = Path(f"/proc/{process}/stat")
    return state.is_file() and state.read_text().rsplit(")", 1)[1].split()[0] != "Z"
