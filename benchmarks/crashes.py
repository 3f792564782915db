"""Kill -9 at random moments: does every resumed run arrive where the run that was never killed arrived?

A run of 30 steps over ten epochs, with a checkpoint at every step and an evaluation at every third, is killed: in turn
while it writes a checkpoint, in the middle of a file of its evaluation, and at a random moment. It is resumed until it
ends; then student, teacher, random state, log and evaluation are compared with those of the same run undisturbed, bit
for bit. Tiny models, real files, a real SIGKILL.

    python benchmarks/crashes.py            20 kills -> benchmarks/results/crashes.json
    python benchmarks/crashes.py --kills 5  what the tests do, without a result file
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from demo import hardware  # noqa: E402
from evaluation_runs import DEV, KEPT, PLAN  # noqa: E402
from helpers import MAKE_TEACHER, logged, make_trainer  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "crashes.json"
STEPS = 30
EVALUATION = {**PLAN, "selection": DEV, "every": 3, "neutral": KEPT}
EVALUATION_FILES = 14  # that a run writes before its end: some before step 1, and the summary at every look
WHEN = ("in a save", "in an evaluation file", "anywhere")
RUNS = [
    ("ema", "full"),
    ("snapshot", "lora"),
    ("routed", "arriving adapter"),
    ("ema", "lora"),
    ("mixture", "full"),
]


def train(folder: Path, teacher: str, student: str) -> None:
    """Run, or resume, and leave a digest of everything a run ends with."""
    has_checkpoint = any((folder / "run").glob("checkpoint-*"))
    settings = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 3}
    settings |= {"learning_rate": 5e-3, "evaluation": EVALUATION}
    trainer = make_trainer(folder / "run", MAKE_TEACHER[teacher](), student, **settings)
    try:
        trainer.train(resume_from_checkpoint=has_checkpoint)
    except Exception as error:
        if "no checkpoint to resume from" not in str(error):
            raise
        # Killed before the first checkpoint was whole: such a run begins again, in an empty folder.
        for left in (folder / "run").glob("checkpoint-*"):
            left.rename(folder / f"unfinished-{time.time_ns()}")
        trainer.train()
    digest = hashlib.sha256()
    for name, value in [*trainer.model.named_parameters(), *sorted(trainer.teacher.state_dict().items())]:
        digest.update(name.encode() + value.detach().cpu().numpy().tobytes())
    digest.update(torch.get_rng_state().numpy().tobytes())
    digest.update(json.dumps(logged(trainer, "divergence")).encode())
    digest.update((folder / "run" / "evaluation" / "evaluation.json").read_bytes())
    (folder / "digest").write_text(digest.hexdigest())


def die_in_an_evaluation_file(number: int) -> None:
    """Let this process write half of the n-th file in an evaluation folder, and kill itself."""
    write_text, count = Path.write_text, iter(range(1, 1000))

    def half(path: Path, text: str, *args: Any, **kwargs: Any) -> int:
        if path.parent.name == "evaluation" and next(count) == number:
            write_text(path, text[: len(text) // 2], *args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        return write_text(path, text, *args, **kwargs)

    Path.write_text = half  # type: ignore[method-assign, assignment]


def in_a_child(
    folder: Path,
    run: tuple[str, str],
    kill_when: Callable[[], bool] | None = None,
    prepare: Callable[[], None] | None = None,
) -> bool:
    """Train in a process of its own, in which `prepare` is called first; returns whether it was killed."""
    folder.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            output = os.open(folder / "output.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(output, 1), os.dup2(output, 2)
            if prepare is not None:
                prepare()
            train(folder, *run)
            code = 0
        except BaseException as error:
            print(repr(error), flush=True)
        finally:
            os._exit(code)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if kill_when is not None and kill_when():
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        time.sleep(0.0002)
    if os.WIFSIGNALED(status):
        return True
    if os.WEXITSTATUS(status):
        raise RuntimeError(f"a run failed: {(folder / 'output.txt').read_text()[-3000:]}")
    return False


def writing(folder: Path, step: int) -> bool:
    """Tell whether the checkpoint of a step is being written: its folder is there and its last file is not."""
    checkpoint = folder / "run" / f"checkpoint-{step}"
    return checkpoint.is_dir() and not (checkpoint / "trainer_state.json").exists()


def crash(folder: Path, run: tuple[str, str], seconds: float, rng: random.Random, when: str) -> dict[str, object]:
    """Kill a run once and resume it to its end; returns what happened."""
    kill_when: Callable[[], bool] | None = None
    prepare: Callable[[], None] | None = None
    if when == "in a save":
        step, pause = rng.randint(2, STEPS), rng.uniform(0.0, 0.02)

        def kill_when() -> bool:
            if not writing(folder, step):
                return False
            time.sleep(pause)
            return True
    elif when == "in an evaluation file":
        prepare = partial(die_in_an_evaluation_file, rng.randint(1, EVALUATION_FILES))
    else:
        end = time.monotonic() + rng.uniform(0.1, 0.8) * seconds  # of what the whole run took

        def kill_when() -> bool:
            return time.monotonic() > end

    killed = in_a_child(folder, run, kill_when, prepare)
    at = max((int(p.name.split("-")[1]) for p in (folder / "run").glob("checkpoint-*")), default=0)
    unfinished = at > 0 and writing(folder, at)
    if killed:
        in_a_child(folder, run)
    return {"killed": killed, "last_checkpoint": at, "it_was_unfinished": unfinished, "when": when}


def main() -> int:
    """Kill and compare; exit status 1 if any run ended elsewhere."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where runs are kept; a temporary folder if not given")
    options = parser.parse_args()
    rng, cases = random.Random(options.seed), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        digests: dict[tuple[str, str], tuple[str, float]] = {}
        for number in range(options.kills):
            run = RUNS[number % len(RUNS)]
            if run not in digests:
                start, whole = time.monotonic(), folder / "whole" / " ".join(run)
                in_a_child(whole, run)
                digests[run] = ((whole / "digest").read_text(), time.monotonic() - start)
            expected, seconds = digests[run]
            here = folder / f"{number} {' '.join(run)}"
            case = crash(here, run, seconds, rng, WHEN[number % len(WHEN)])
            same = (here / "digest").read_text() == expected
            cases.append({"teacher": run[0], "student": run[1], **case, "same_to_the_bit": same})
            print(json.dumps(cases[-1]), flush=True)
    same = sum(bool(case["same_to_the_bit"]) for case in cases)
    killed = sum(bool(case["killed"]) for case in cases)
    print(f"{same} of {len(cases)} runs arrived at the same bits; {killed} were killed before their end")
    if options.kills >= 20:
        result = {"steps": STEPS, "kills": killed, "same": same, "hardware": hardware(), "cases": cases}
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if same == len(cases) else 1


if __name__ == "__main__":
    sys.exit(main())
