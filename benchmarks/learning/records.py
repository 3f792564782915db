"""Keeps what figures follow from: the grade of every answer of every run, so that tables can be computed again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from opsd.evaluation import Answer, EvaluationResult
from opsd.evaluation.compare import RunResult

# Settings that a comparison reads: what tells arms apart, and what makes a budget unequal.
SETTINGS = (
    "control", "seed", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "lr_scheduler_type", "max_completion_length",
)  # fmt: skip
Form = Callable[[str], bool]
OUTCOME = ("rollouts", "tokens", "seconds", "cpu_seconds")


def record_of(run: RunResult, form: Form | None = None) -> dict[str, Any]:
    """Return a run in plain values: a digit per question, the lengths of answers, right samples per question.

    Args:
        run: with the texts of its answers.
        form: text -> whether an answer has the form that was asked for; counted beside the grades.
    """

    def graded(results: Mapping[str, EvaluationResult]) -> dict[str, Any]:
        return {when: _graded(result, form) for when, result in results.items()}

    card = run.card
    return {
        "arm": run.arm,
        "values": run.values,
        "seed": run.seed,
        "settings": {name: card["settings"][name] for name in SETTINGS if name in card["settings"]},
        "questions": card["hashes"].get("questions"),
        "outcome": {name: card["outcome"][name] for name in OUTCOME if name in card["outcome"]},
        "selection": run.selection,
        "drift": run.drift,
        "test": graded(run.results),
        "retention": {name: graded(results) for name, results in run.retention.items()},
    }


def run_of(record: Mapping[str, Any]) -> RunResult:
    """Return the run of a record."""
    card = {
        "settings": record["settings"],
        "hashes": {"questions": record["questions"]},
        "outcome": record["outcome"],
        "rows": None,
    }
    values = ", ".join(f"{name} {value}" for name, value in record["values"].items())
    return RunResult(
        folder=f"{record['arm']}, {values}, seed {record['seed']}",
        arm=record["arm"],
        seed=record["seed"],
        card=card,
        results={when: _result(each) for when, each in record["test"].items()},
        drift=record["drift"],
        values=record["values"],
        selection=record["selection"],
        retention={name: {w: _result(r) for w, r in times.items()} for name, times in record["retention"].items()},
    )


def added(stored: Mapping[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return the stored record of an experiment with the runs of a new one, which take the place of the same runs.

    Raises:
        SystemExit: the two were measured on other hardware, or with other settings.
    """
    for name, old, now in _settings(stored, new):
        if old != now:
            raise SystemExit(f"not added: {name} is {now} now, and {old} in the stored runs")
    runs = {_identity(run): run for run in [*stored["runs"], *new["runs"]]}
    sweep, others = (each["settings"]["sweep"] for each in (stored, new))
    arms = sweep["arms"] | others["arms"]
    seeds = sorted({*sweep["seed"], *others["seed"]})
    record = {**stored, "runs": sorted(runs.values(), key=lambda run: (run["seed"], list(arms).index(run["arm"])))}
    record["settings"] = {**stored["settings"], "sweep": {**sweep, "arms": arms, "seed": seeds}}
    record["command"] = re.sub(r"--seeds [\d ]+", f"--seeds {' '.join(map(str, seeds))} ", stored["command"])
    if "measures" in stored:
        record["measures"] = stored["measures"] | new["measures"]
    later = [f"{arm} (seed {seed})" for arm, seed in dict.fromkeys((run["arm"], run["seed"]) for run in new["runs"])]
    return {**record, "added": sorted({*stored.get("added", ()), *later})}


def _settings(stored: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield name and value of what must be the same in runs that are compared."""
    yield "hardware", stored["hardware"], new["hardware"]
    for name in {*stored["settings"], *new["settings"]} - {"sweep"}:
        yield name, stored["settings"].get(name), new["settings"].get(name)


def _identity(run: Mapping[str, Any]) -> tuple[Any, ...]:
    return run["arm"], run["seed"], tuple(sorted(run["values"].items()))


def _graded(result: EvaluationResult, form: Form | None) -> dict[str, Any]:
    graded: dict[str, Any] = {
        "grader": result.grader,
        "right": "".join(str(int(right)) for right in result.correct),
        "tokens": " ".join(map(str, result.lengths)),
        "truncated": result.truncated,
    }
    if form is not None:
        graded["in_form"] = sum(map(form, result.texts))
    if result.sampled:
        graded["samples"] = len(result.sampled[0])
        graded["right_samples"] = "".join(str(sum(a.correct is True for a in each)) for each in result.sampled)
    return graded


def _result(graded: Mapping[str, Any]) -> EvaluationResult:
    lengths = list(map(int, graded["tokens"].split()))
    greedy = [Answer("", mark == "1", n, ended=True) for mark, n in zip(graded["right"], lengths, strict=True)]
    k = graded.get("samples", 0)
    sampled = [
        [Answer("", number < int(count), 0, ended=True) for number in range(k)]
        for count in graded.get("right_samples", "")
    ]
    return EvaluationResult([f"question {number}" for number in range(len(greedy))], graded["grader"], greedy, sampled)
