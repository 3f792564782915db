"""Where on-policy self-distillation wins, and where not: experiments on a small model.

Run:     python -m benchmarks.learning recover [--seeds 0 1 2] [--jobs 2] [--folder runs/learning]
         python -m benchmarks.learning --list
         python -m benchmarks.learning levers --arms JSD decay --add    in parts: these arms beside the stored runs
         python -m benchmarks.learning recover --recompute    the tables again, from the stored grades
Writes:  benchmarks/results/learning/NAME.json, NAME.md and NAME.svg; the same command goes on after a stop
Takes:   half an hour to an hour and a half an experiment on two cores

Each experiment writes rows and a run file, and lets `opsd sweep` train and compare its arms.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.learning.experiments import EXPERIMENTS
from benchmarks.learning.records import added, record_of, run_of
from benchmarks.learning.wordings import measures_table
from opsd.cli import main as opsd
from opsd.commands import tradeoff as page
from opsd.commands.compare import markdown
from opsd.commands.demo_tasks import packaged_model
from opsd.evaluation.compare import as_json, read_runs
from opsd.evaluation.pareto import Tradeoff, as_plain, tradeoff_of
from opsd.evaluation.run_folder import write_json, write_whole
from opsd.evaluation.summary import AFTER
from opsd.report.pareto import as_svg

MODEL = "SmolLM2-135M-Instruct"
RESULTS = Path(__file__).parent.parent / "results" / "learning"


def train(name: str, folder: Path, seeds: list[int], jobs: int, arms: Sequence[str] = ()) -> dict[str, Any]:
    """Train what is missing of an experiment, or of some of its arms; returns its record, before the figures."""
    experiment = EXPERIMENTS[name]
    folder.mkdir(parents=True, exist_ok=True)
    settings = experiment.prepare(folder, seeds)
    sweep = settings["sweep"]
    if unknown := set(arms) - sweep["arms"].keys():
        sys.exit(f"{name} has no arm {', '.join(unknown)}; it has {', '.join(sweep['arms'])}")
    sweep["arms"] = {arm: changes for arm, changes in sweep["arms"].items() if not arms or arm in arms}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    seeds_at = "best" if "selection" in settings["evaluation"] else "all"  # there is nothing to choose
    options = ["--jobs", str(jobs), "--keep", experiment.keep, "--seeds-at", seeds_at, "--skip-doctor"]
    if status := opsd(["sweep", str(path), *options]):
        sys.exit(status)
    runs = read_runs([str(folder / "sweep")])
    measured = {"measures": experiment.measure(folder, settings, seeds[0])} if experiment.measure else {}
    return {
        "asks": experiment.asks,
        "command": f"python -m benchmarks.learning {name} --seeds {' '.join(map(str, seeds))} --jobs {jobs}",
        "hardware": runs[0].card["hardware"],
        "versions": runs[0].card["versions"],
        "settings": _without_paths(settings, {str(folder.parent): "runs/learning", packaged_model(): MODEL}),
        **measured,
        "runs": [record_of(run, experiment.form) for run in runs],
    }


def _without_paths(value: Any, names: Mapping[str, str]) -> Any:
    """Return settings with the folders of this machine by the names that they have on any."""
    if isinstance(value, Mapping):
        return {key: _without_paths(each, names) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_paths(each, names) for each in value]
    for path, text in names.items() if isinstance(value, str) else ():
        value = value.replace(path, text)
    return value


def write(name: str, record: dict[str, Any], results: Path = RESULTS) -> None:
    """Write the record of an experiment with the figures that follow from it, its table and its plot."""
    tradeoff = tradeoff_of([run_of(run) for run in record["runs"]])
    results.mkdir(parents=True, exist_ok=True)
    record["figures"] = {**as_json(tradeoff.comparison), **as_plain(tradeoff)}
    write_json(results / f"{name}.json", record)
    machine = f"{record['hardware']['cpu']}, {record['hardware']['threads']} thread(s) a run"
    head = f"# {record['asks']}\n\n`{record['command']}`; {MODEL}; {machine}.\n\n"
    if names := ", ".join(record.get("added", ())):
        head += f"Trained on another day than the rest, so that seconds do not compare: {names}.\n\n"
    tables = [page.markdown(tradeoff), markdown(tradeoff.comparison), *form_table(record["runs"], tradeoff)]
    tables += measures_table(record["measures"], tradeoff) if "measures" in record else ()
    write_whole(results / f"{name}.md", head + "".join(tables))
    if page.has_plot(tradeoff):
        write_whole(results / f"{name}.svg", as_svg(tradeoff.points))


def form_table(runs: Sequence[Mapping[str, Any]], tradeoff: Tradeoff) -> Iterator[str]:
    """Yield the share of answers in the form that was asked for, by arm and split, if it was counted."""
    if "in_form" not in runs[0]["test"][AFTER]:
        return
    splits = ["test", *runs[0]["retention"]]
    yield f"\nAnswers in the form asked for, %, at each arm's best value:\n\n|  | {' | '.join(splits)} |\n"
    yield f"|{'---|' * (len(splits) + 1)}\n"
    for point in tradeoff.points:
        chosen = [run for run in runs if run["arm"] == point.arm and run["values"] == point.values]
        if point.is_best:
            shares = [_share_in_form(chosen, split) for split in splits]
            yield f"| {point.name} | {' | '.join(f'{100 * share:.1f}' for share in shares)} |\n"


def _share_in_form(runs: Sequence[Mapping[str, Any]], split: str) -> float:
    graded = [(run["test"] if split == "test" else run["retention"][split])[AFTER] for run in runs]
    return sum(each["in_form"] for each in graded) / sum(len(each["right"]) for each in graded)


def main() -> None:
    """Train and compare the arms of experiments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="; ".join(EXPERIMENTS))
    parser.add_argument("--list", action="store_true", help="print the experiments")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=[], help="only these arms")
    parser.add_argument("--add", action="store_true", help="keep the stored runs of other arms and seeds")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--folder", type=Path, default=Path("runs/learning"))
    parser.add_argument("--recompute", action="store_true", help="write tables and plots again from the stored grades")
    options = parser.parse_args()
    if unknown := set(options.names) - EXPERIMENTS.keys():
        parser.error(f"there is no experiment {', '.join(unknown)}; known are {', '.join(EXPERIMENTS)}")
    for name in [] if options.list else options.names:
        stored = RESULTS / f"{name}.json"
        if options.recompute:
            record = json.loads(stored.read_text())
        else:
            record = train(name, options.folder / name, options.seeds, options.jobs, options.arms)
            record = added(json.loads(stored.read_text()), record) if options.add and stored.exists() else record
        write(name, record)
        print((RESULTS / f"{name}.md").read_text())
    if options.list or not options.names:
        for name, experiment in EXPERIMENTS.items():
            print(f"{name:<16} {experiment.asks}")


if __name__ == "__main__":
    main()
