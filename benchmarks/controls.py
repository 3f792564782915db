"""The demo's run under controls, three seeds each: does the gain come from the method, and from the context?

Writes the questions and a run file, and lets `opsd sweep` train and compare.

Run:     python benchmarks/controls.py [--seeds 0 1 2] [--arms method no-context …] [--folder runs/controls]
         python benchmarks/controls.py --recompute   compares the stored grades again, without training
Writes:  benchmarks/results/controls.json and controls.md, the table of docs/evaluation.md; finished runs are kept
Takes:   about 90 minutes on one core for five arms
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml

from opsd.cli import main as opsd
from opsd.commands.compare import markdown
from opsd.commands.demo_sums import SumsSettings, sums_settings
from opsd.commands.demo_tasks import packaged_model, sums, write_rows
from opsd.evaluation import Answer, EvaluationResult
from opsd.evaluation.compare import METHOD, Comparison, RunResult, as_json, compare, read_runs
from opsd.evaluation.run_folder import write_json, write_whole
from opsd.evaluation.summary import FOLDER, read_summary

RESULTS = Path(__file__).parent / "results"
ARMS = ("method", "no-context", "wrong-context", "off-policy", "sft")
NEUTRAL = (
    "What is the capital of France?", "Write a sentence about the sea.", "Who wrote Hamlet?", "Name three fruits.",
    "How do I boil an egg?", "Translate 'good morning' into Spanish.", "What colour is the sky?", "Tell me a joke.",
    "Why do leaves fall in autumn?", "Give me a synonym for happy.", "What is a database?", "Describe a cat.",
    "What should I pack for a trip?", "Explain gravity to a child.", "Who was Marie Curie?", "What is jazz?",
    "Write a title for a story about a dragon.", "What do bees make?", "How many days has a week?", "What is tea?",
    "Recommend a hobby.", "What is the opposite of cold?", "Complete: once upon a", "What is Python used for?",
    "Where do penguins live?", "Write a greeting for a friend.", "What is a volcano?", "Name a famous painter.",
    "What is the plural of mouse?", "How does a bicycle stay upright?", "What is a haiku?", "Say something kind.",
)  # fmt: skip


def prepare(folder: Path, arms: list[str], seeds: list[int]) -> Path:
    """Write the questions and the run file; training questions differ from seed to seed, as in the demo."""
    demo = SumsSettings()
    write_rows(folder / "neutral.jsonl", [{"prompt": [{"role": "user", "content": text}]} for text in NEUTRAL])
    for seed in seeds:
        rows, held_out = sums(demo.steps * demo.rollouts, demo.questions, seed)
        write_rows(folder / f"train-{seed}.jsonl", rows)
        write_rows(folder / "test.jsonl", held_out)  # of every seed the same
    run = sums_settings(demo, packaged_model(), folder)
    run |= {"context": "answer_only", "learning_rate": 1.5e-5}  # of the demo before it had worked examples
    run |= {"dataset_name": str(folder / "train-{seed}.jsonl"), "output_dir": str(folder / "sweep")}
    run["evaluation"] |= {"test": str(folder / "test.jsonl"), "neutral": str(folder / "neutral.jsonl")}
    run["sweep"] = {"arms": {arm: {} if arm == METHOD else {"control": arm} for arm in arms}, "seed": seeds}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run, sort_keys=False))
    return path


def traces(run: RunResult) -> dict[str, Any]:
    """Return a run's grades as a digit per question of the test split, and its drift."""
    marks = {when: "".join(str(int(right)) for right in each.correct) for when, each in run.results.items()}
    drift = read_summary(Path(run.folder) / FOLDER)["drift"]["per_token"]
    return {"arm": run.arm, "seed": run.seed, "correct": marks, "drift": drift, "hardware": run.card["hardware"]}


def stored_runs(record: dict[str, Any]) -> list[RunResult]:
    """Return the runs of a record: their grades question by question, their drift, and what tells arms apart."""
    runs = []
    for run in record["runs"]:
        results = {when: _result(marks, record["comparison"]["grader"]) for when, marks in run["correct"].items()}
        card = {"settings": {**record["settings"], "control": run["arm"], "seed": run["seed"]}, "hashes": {}}
        folder = f"runs/{run['arm']}-{run['seed']}"
        runs.append(RunResult(folder, run["arm"], run["seed"], card, results, run["drift"]["value"]))
    return runs


def _result(marks: str, grader: str) -> EvaluationResult:
    answers = [Answer(text="", correct=mark == "1", length=0, ended=True) for mark in marks]
    return EvaluationResult([f"question {number}" for number in range(len(marks))], grader, answers, [])


def write(record: dict[str, Any], comparison: Comparison) -> None:
    """Write a comparison with everything it follows from, and its table."""
    record["comparison"] = as_json(comparison)
    write_json(RESULTS / "controls.json", record)
    write_whole(RESULTS / "controls.md", markdown(comparison))
    print(markdown(comparison))


def main() -> None:
    """Train all arms, compare them, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--folder", type=Path, default=Path("runs/controls"))
    parser.add_argument("--recompute", action="store_true", help="compare the stored grades again")
    options = parser.parse_args()
    if options.recompute:
        record = json.loads((RESULTS / "controls.json").read_text())
        write(record, compare(stored_runs(record)))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    run_file = prepare(options.folder, options.arms, options.seeds)
    if status := opsd(["sweep", str(run_file), "--skip-doctor", "--keep", "none"]):
        sys.exit(status)
    runs = read_runs([str(options.folder / "sweep")])
    settings = yaml.safe_load(run_file.read_text())
    settings["model_name_or_path"] = "SmolLM2-135M-Instruct"
    for name in ("evaluation", "sweep", "dataset_name", "output_dir", "seed"):
        del settings[name]
    record = {"settings": settings, "versions": runs[0].card["versions"], "comparison": {}}
    write({**record, "runs": [traces(run) for run in runs]}, compare(runs))


if __name__ == "__main__":
    main()
