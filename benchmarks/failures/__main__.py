"""Do the monitors of health name a failing run before it has failed? And do they leave healthy runs alone?

Run:     python -m benchmarks.failures [NAME ...] [--jobs 2] [--folder runs/failures]
         python -m benchmarks.failures --list
         python -m benchmarks.failures --replay    the table again, from the committed logs and traces
Writes:  benchmarks/results/failures/NAME/: the log and the traces; and failures.md, failures.json
Takes:   about a quarter of an hour a run on two cores, two at a time

Every run answers the same 400 questions every five steps, greedily. It has failed at the first look at which accuracy
is five points below the best one before, and stays there. A failure is named in time by a monitor that says act before
that step, or at any step where accuracy never falls so far.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from benchmarks.failures.runs import RUNS, prepare
from opsd.evaluation.run_folder import write_json, write_whole
from opsd.health.traces import FOLDER, read_traces
from opsd.health.watch import FILE, Watch, replay
from opsd.training.machine import hardware

RESULTS = Path(__file__).parent.parent / "results" / "failures"
STATE = "trainer_state.json"
FALL = 0.05  # of accuracy, by which a run has failed


def train(name: str, folder: Path) -> None:
    """Train a run, unless it is done, and keep its log and traces among the results."""
    target = RESULTS / name.replace(" ", "_")
    if (target / STATE).is_file():
        return
    settings = prepare(name, folder)
    shutil.rmtree(folder / "run", ignore_errors=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    command = [
        sys.executable,
        "-m",
        "opsd",
        "train",
        str(folder / "run.yaml"),
        "--skip-doctor",
        "--disable_tqdm",
        "true",
    ]
    with (folder / "train.log").open("w") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)
    shutil.copytree(folder / "run" / FOLDER, target / FOLDER, dirs_exist_ok=True)
    if (folder / "run" / FILE).is_file():
        shutil.copy(folder / "run" / FILE, target / FILE)
    write_json(target / STATE, {"log_history": json.loads((folder / "run" / STATE).read_text())["log_history"]})


def judged(name: str) -> dict[str, Any]:
    """Return when a stored run failed, and what the monitors say of it."""
    folder = RESULTS / name.replace(" ", "_")
    log = json.loads((folder / STATE).read_text())["log_history"]
    looks = {entry["step"]: entry["eval_accuracy"] for entry in log if "eval_accuracy" in entry}
    first, best, last = looks[min(looks)], max(looks.values()), looks[max(looks)]
    watch = replay(log, list(read_traces(folder)))
    expected = [_first(watch, monitor) for monitor in RUNS[name].expected]
    named = min((step for step in expected if step is not None), default=None)
    others = sorted({c.monitor for c in watch.history if c.verdict.level == "act"} - set(RUNS[name].expected))
    return {
        "about": RUNS[name].about,
        "apart": RUNS[name].apart,
        "healthy": not RUNS[name].expected,
        "first": first,
        "best": best,
        "last": last,
        "failed": _failed(looks),
        "points": None if named is None else 100 * (max(v for s, v in looks.items() if s <= named) - _at(looks, named)),
        "named": named,
        "by": [m for m, step in zip(RUNS[name].expected, expected, strict=True) if step is not None and step == named],
        "others": others,
        "steps": max(entry["step"] for entry in log),
    }


def _failed(looks: dict[int, float]) -> int | None:
    """Return the first look that is FALL below the best one before, as are all later ones."""
    steps, failed = sorted(looks), None
    for number, step in enumerate(steps):
        is_low = looks[step] <= max(looks[each] for each in steps[: number + 1]) - FALL
        failed = None if not is_low else step if failed is None else failed
    return failed


def _at(looks: dict[int, float], step: int) -> float:
    """Return the accuracy at the last look up to a step."""
    return looks[max(each for each in looks if each <= step)]


def _first(watch: Watch, monitor: str) -> int | None:
    """Return the step at which a monitor first said act."""
    steps = [c.step for c in watch.history if c.monitor == monitor and c.verdict.level == "act"]
    return min(steps, default=None)


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return the table, the runs that were set apart last."""
    lines = [
        "| run | what was done to it | accuracy: first, best, last look | fell by 5 points at | named at | points "
        "lost by then | by | others that acted |",
        "|---" * 8 + "|",
    ]
    for name, run in sorted(found.items(), key=lambda item: (item[1]["apart"], item[1]["healthy"])):
        title = f"{name} (apart)" if run["apart"] else name
        accuracy = f"{run['first']:.1%}, {run['best']:.1%}, {run['last']:.1%}"
        cells = [title, run["about"], accuracy, run["failed"], run["named"]]
        cells += [None if run["points"] is None else f"{run['points']:.1f}", ", ".join(run["by"])]
        cells.append(", ".join(run["others"]))
        lines.append(f"| {' | '.join('—' if cell in (None, '') else str(cell) for cell in cells)} |")
    return "\n".join(lines) + "\n"


def summary(found: dict[str, dict[str, Any]], *, apart: bool) -> str:
    """Return how many failures were named in time, and false alarms per 1,000 healthy steps."""
    some = [run for run in found.values() if run["apart"] is apart]
    failing = [run for run in some if not run["healthy"]]
    in_time = [r for r in failing if r["named"] is not None and (r["failed"] is None or r["named"] < r["failed"])]
    healthy = [run for run in some if run["healthy"]]
    steps, alarms = sum(run["steps"] for run in healthy), sum(len(run["others"]) for run in healthy)
    rate = f"{1000 * alarms / steps:.1f} in 1,000 steps" if steps else "no healthy run"
    which = "set apart before thresholds were chosen" if apart else "on which thresholds were chosen"
    return f"Runs {which}: {len(in_time)} of {len(failing)} failures named in time; false alarms: {rate}.\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train runs, replay the monitors on all stored ones, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="; ".join(RUNS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("runs/failures"))
    parser.add_argument("--list", action="store_true", help="print the runs")
    parser.add_argument("--replay", action="store_true", help="train nothing")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(f"{name:20s} {run.about}" for name, run in RUNS.items()))
        return
    if unknown := set(options.names) - RUNS.keys():
        parser.error(f"there is no run {', '.join(unknown)}; see --list")
    if not options.replay:
        with ThreadPoolExecutor(options.jobs) as pool:
            names = options.names or list(RUNS)
            list(pool.map(lambda name: train(name, (options.folder / name.replace(" ", "_")).absolute()), names))
    found = {name: judged(name) for name in RUNS if (RESULTS / name.replace(" ", "_") / STATE).is_file()}
    text = "\n".join(["# Failures that the monitors of health name\n", table(found)])
    text += "\n" + summary(found, apart=False) + "\n" + summary(found, apart=True)
    write_json(RESULTS / "failures.json", {"hardware": hardware(), "runs": found})
    write_whole(RESULTS / "failures.md", text)
    print(text)


if __name__ == "__main__":
    main()
