"""docs/evaluation.md: its commands run, and its tables are the code's."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import make_rows

from opsd.cli import main
from opsd.evaluation.answers import read_choice
from opsd.evaluation.graders import GRADERS
from opsd.evaluation.plan import EvaluationPlan
from opsd.evaluation.sample_metrics import METRICS
from opsd.evaluation.statistics import over_seeds, paired_difference
from opsd.training.controls import CONTROLS

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "evaluation.md").read_text()
SMALL = "--max_steps 1 --per_device_train_batch_size 2 --max_completion_length 4 --use_cpu --bf16 false --skip-doctor"


def table(title: str) -> dict[str, str]:
    """The table under a heading: first cell, without its code marks, to the rest of the line."""
    part = GUIDE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `([^`]+)` \| (.*) \|$", part, flags=re.M))


def test_every_key_of_a_plan_is_in_the_guide() -> None:
    assert list(table("The evaluation of a run")) == [field.name for field in fields(EvaluationPlan)]


def test_every_grader_is_in_the_guide() -> None:
    names = [name.partition(":")[0] for name in table("Graders")]
    assert sorted(names) == sorted({name.rstrip(":") for name in GRADERS} | {"reasoning_gym", "module"})


def test_every_metric_is_in_the_guide() -> None:
    assert [name.partition("@")[0] for name in table("Metrics")] == list(METRICS)
    assert all(("@k" in name) == METRICS[name.partition("@")[0]].takes_k for name in table("Metrics"))


def test_every_control_is_in_the_guide_with_what_it_asks() -> None:
    found = table("Controls")
    assert list(found) == list(CONTROLS)
    assert all(found[name].startswith(f"{control.asks} | ") for name, control in CONTROLS.items())


@pytest.mark.slow
def test_the_commands_of_the_guide_run_in_their_order(tmp_path: Path, llama_folder: str, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    rows = make_rows(40)
    for number, row in enumerate(rows):
        row["prompt"] = [{"role": "user", "content": f"Question {number}?"}]
        row["answer"] = "ABCD"[number % 4] if number >= 30 else row["answer"]
    parts = {
        "rows": rows[:10],
        "test": rows[10:20],
        "selection": rows[20:26],
        "neutral": rows[26:30],
        "general": rows[30:],
    }
    for name, part in parts.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    run = {"model_name_or_path": llama_folder, "dataset_name": "rows.jsonl", "context": "worked_solution"}
    plan = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", GUIDE, flags=re.S)[0])
    plan["evaluation"]["every"] = 1
    Path("run.yaml").write_text(yaml.safe_dump({**run, "output_dir": "runs/first", **plan}))
    (block,) = re.findall(r"```bash\n(.*?)```", GUIDE, flags=re.S)
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert [command[1] for command in commands] == ["train", "train", "train", "compare", "eval"]
    for command in commands:
        extra = {"train": SMALL.split(), "eval": ["--max_new_tokens", "4"]}.get(command[1], [])
        assert main([*command[1:], *extra]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "general" in out and "method and wrong-context cannot be distinguished" in out and "pass@8" in out
    assert Path("first.json").is_file() and Path("runs/first/checkpoint-1").is_dir()


@pytest.mark.parametrize("words", ["ahead of", "behind", "LOST to", "cannot be distinguished", "beat"])
def test_the_words_of_a_comparison_are_those_of_the_guide(words: str) -> None:
    source = (ROOT / "opsd" / "evaluation" / "verdict.py").read_text()
    assert words in source and words in GUIDE.split("## Comparing")[1]


# ---- the example ----------------------------------------------------------------------------------------------------

RESULTS = ROOT / "benchmarks" / "results"


def test_the_table_of_controls_is_what_the_benchmark_wrote() -> None:
    lines = [line for line in (RESULTS / "controls.md").read_text().splitlines() if line.startswith("|")]
    assert len(lines) == 9 and "\n".join(lines) in GUIDE
    arms = json.loads((RESULTS / "controls.json").read_text())["comparison"]["arms"]
    gains = {arm["name"]: f"{100 * arm['gain']['difference']:.1f}" for arm in arms if arm["gain"]}
    results = " ".join((ROOT / "docs" / "results.md").read_text().split())
    for name, words in {"method": "it gains {}", "off-policy": "own samples {}", "sft": "on the answers {}"}.items():
        assert words.format(gains[name]) in results, name


def test_the_forms_of_a_choice_in_the_guide_are_read() -> None:
    part = GUIDE.split("`choice` reads four forms")[1].split("\n\n")[0]
    forms = [r"\boxed{B}", "answer is B", "Answer: (b)", "<answer>B", "B) Paris"]
    assert all(form in " ".join(part.split()) for form in forms) and {read_choice(form) for form in forms} == {"B"}
    assert read_choice("A is tempting, but B is correct") is None


def test_the_figures_of_the_controls_follow_from_every_answers_grade() -> None:
    record = json.loads((RESULTS / "controls.json").read_text())

    def right(arm: str, when: str) -> np.ndarray:
        marks = [run["correct"][when] for run in record["runs"] if run["arm"] == arm]
        return np.array([[int(mark) for mark in each] for each in marks], dtype=float)

    assert {run["seed"] for run in record["runs"]} == {0, 1, 2} and len(record["runs"]) == 15
    method = right("method", "after")
    assert method.shape == (3, 200)
    for arm in record["comparison"]["arms"]:
        after, before = right(arm["name"], "after"), right(arm["name"], "before")
        assert arm["after"]["value"] == pytest.approx(after.mean())
        assert arm["gain"] == pytest.approx(asdict(paired_difference(before.mean(0), after.mean(0))))
        assert arm["spread"] == pytest.approx(asdict(over_seeds(after.mean(1))), nan_ok=True)
    for pair in record["comparison"]["pairwise"]:
        other = right(pair["other"], "after")
        assert pair["difference"] == pytest.approx(asdict(paired_difference(other.mean(0), method.mean(0))))
        assert pair["spread"]["mean"] == pytest.approx((method - other).mean())
