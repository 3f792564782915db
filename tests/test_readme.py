"""The README is run: its Python, its template, its YAML, its commands; its links and its table hold."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from conftest import make_rows, make_tokenizer
from helpers import make_args
from jinja2.sandbox import MAX_RANGE
from test_layout import ORDER

from opsd import OPSDConfig
from opsd.cli import main
from opsd.contexts import sandbox, trial
from opsd.contexts.privileged import PrivilegedContext
from opsd.data.columns import FORMATS
from opsd.doctor import CHECKS
from opsd.doctor.patient import LONGEST
from opsd.losses import Divergence
from opsd.losses.divergence import DivergenceSettings
from opsd.losses.objective import ObjectiveSettings
from opsd.losses.pointwise import DIVERGENCES
from opsd.teachers import TEACHERS
from opsd.training.groups import GroupSettings
from opsd.training.token_selection import TokenSelection, TokenSelectionSettings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
LOSSES, RESULTS, WHEN = ((ROOT / "docs" / f"{name}.md").read_text() for name in ("losses", "results", "when"))
DOCTOR = (ROOT / "docs" / "doctor.md").read_text()
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Small and on the CPU, on top of what the README says.
SMALL = "--max_completion_length 4 --per_device_train_batch_size 2 --use_cpu true --bf16 false --save_steps 1"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def test_the_python_on_the_first_screen_trains(tmp_path: Path, llama_folder: str, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = blocks("python")[0]
    assert MODEL in code and len([line for line in code.splitlines() if line.strip()]) <= 12
    code = code.replace(MODEL, llama_folder).replace("max_steps=20", "max_steps=1, use_cpu=True, bf16=False")
    code = code.replace("max_completion_length=64", "max_completion_length=4")
    scope: dict[str, object] = {}
    exec(code, scope)
    assert scope["trainer"].state.global_step == 1  # type: ignore[attr-defined]


def test_the_template_on_the_first_screen_loads() -> None:
    (source,) = blocks("jinja")
    assert len(source.strip().splitlines()) == 5
    assert PrivilegedContext.from_string(source).fields == {"solution"}


@pytest.mark.slow
def test_the_commands_run_in_their_order(tmp_path: Path, llama_folder: str, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    rows = "".join(json.dumps(row) + "\n" for row in make_rows())
    Path("rows.jsonl").write_text(rows)
    Path("test.jsonl").write_text(rows)
    Path("plan.yaml").write_text("{test: test.jsonl, grader: last_number}")
    Path("run.yaml").write_text(blocks("yaml")[0].replace(MODEL, llama_folder))
    commands = [shlex.split(line, comments=True) for line in blocks("bash")[2].splitlines() if line.startswith("opsd")]
    assert [c[1] for c in commands] == [
        "show", "score", "doctor", "train", "train", "health", "report", "eval", "sweep", "cp"
    ]  # fmt: skip
    more = {
        "score": [["--max_completion_length", "4"]],
        "doctor": [SMALL.split()],
        "train": [[*SMALL.split(), "--max_steps", "2"], [*SMALL.split(), "--max_steps", "2"]],
        "eval": [["--max_new_tokens", "4"]],
        "sweep": [["--evaluation", "plan.yaml", "--output_dir", "runs/sweep", "--dry-run"]],
    }
    for command in commands:
        extra = more[command[1]].pop(0) if command[1] in more else []
        assert main([*command[1:], *extra]) == 0, capsys.readouterr().err
    assert Path("runs/first/checkpoint-2").is_dir() and Path("worked_solution.jinja").is_file()


def test_the_python_of_the_guide_to_losses_runs(capsys, monkeypatch) -> None:
    monkeypatch.setitem(DIVERGENCES, "hellinger", None)  # the row that the guide adds leaves the table after the test
    for code in re.findall(r"```python\n(.*?)```", LOSSES, flags=re.S):
        exec(code, {})
    assert Divergence(divergence="hellinger").describe() == "squared Hellinger distance"
    assert "the teacher's 20 likeliest tokens" in capsys.readouterr().out


def setting_row(name: str) -> str:
    """A setting as the tables of the guide to losses show it: name, default, and the sentence of `--help-all`."""
    setting = OPSDConfig.__dataclass_fields__[name]
    shown = {type(None): "unset", bool: "false", str: f"`{setting.default}`"}
    default = shown.get(type(setting.default)) or f"{setting.default:g}"
    return f"| `{name}` | {default} | {setting.metadata['help']} |"


def test_the_guide_to_losses_shows_every_setting_as_it_is_declared() -> None:
    rows = dict(re.findall(r"^(\| `(\w+)` \| .*)$", LOSSES, flags=re.M))
    mixins = (DivergenceSettings, ObjectiveSettings, TokenSelectionSettings, GroupSettings)
    expected = {f.name for mixin in mixins for f in fields(mixin)} | {"contrast_context", "reward_weights"}
    assert set(rows.values()) == expected
    assert list(rows) == [setting_row(name) for name in rows.values()]


def test_the_words_in_the_guide_to_losses_are_what_a_run_prints() -> None:
    settings = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", LOSSES, flags=re.S)[0])
    args = make_args("unused", **settings)
    selection = TokenSelection.from_config(args, make_tokenizer(), [])
    assert f"{args.objective.describe()}; tokens: {selection.describe()}\n" in LOSSES
    assert f"            {args.objective.formula}\n" in LOSSES


@pytest.mark.slow
def test_the_commands_of_the_guide_to_the_doctor_run(tmp_path: Path, llama_folder: str, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    settings = SMALL.replace("--", "").split()
    lines = [f"{name}: {value}" for name, value in zip(settings[::2], settings[1::2], strict=True)]
    run = blocks("yaml")[0].replace(MODEL, llama_folder).replace("max_steps: 100", "max_steps: 1")
    Path("run.yaml").write_text(run + "\n".join(lines) + "\n")
    assert main(["cp", "answer_only", "."]) == 0
    Path("answer_only.jinja").rename("my.jinja")
    for name, rate in (("first", "1e-5"), ("second", "2e-5")):
        assert main(["train", "run.yaml", "--output_dir", f"runs/{name}", "--learning_rate", rate]) == 0
    text = "\n".join(re.findall(r"```bash\n(.*?)```", DOCTOR, flags=re.S)).replace("MODEL", llama_folder)
    commands = [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("opsd")]
    assert [c[1] for c in commands] == ["doctor"] * 4 + ["diff", "lint", "lint", "show"]
    for command in commands:
        assert main(command[1:]) == (command[1] == "diff"), capsys.readouterr()
    assert "settings.learning_rate" in capsys.readouterr().out
    assert json.loads(Path("found.json").read_text())["failed"] is False


def test_the_guide_to_the_doctor_names_every_check_format_and_limit() -> None:
    assert re.findall(r"^\| `([\w-]+)` \|", DOCTOR, flags=re.M) == [*CHECKS, *FORMATS]
    assert f"({trial.SECONDS} seconds, {trial.MEGABYTES} MB)" in DOCTOR
    assert f"`range` ({MAX_RANGE:,}) and by {sandbox.MAX_CHARS:,} characters" in DOCTOR
    assert f"end at {LONGEST} tokens" in DOCTOR


def test_the_readme_stays_short() -> None:
    assert len(README.splitlines()) <= 150


def test_the_table_names_every_teacher() -> None:
    for cls in TEACHERS.values():
        assert f"| `{cls.__name__}(" in README


DOCUMENTS = sorted(
    str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")]
)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_between_files_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert ((ROOT / document).parent / target).exists(), target


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    for target in re.findall(r"^make ([a-z-]+)", README, flags=re.M):
        assert target in targets


def test_the_figures_of_the_sums_are_those_of_the_result_file() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    figures = [record["runs"][0][part] for part in ("before", "ceiling")]
    for figure in figures + [run["after"] for run in record["runs"]]:
        assert f"| {100 * figure['accuracy']:.1f} % |" in RESULTS
        assert f"{100 * figure['interval'][0]:.1f} to {100 * figure['interval'][1]:.1f}" in RESULTS
    assert len(record["runs"]) >= 3 and all(run["gain"]["after"]["low"] > 0 for run in record["runs"])


LEARNING = ROOT / "benchmarks" / "results" / "learning"


@pytest.mark.parametrize(("name", "lines"), [("when.md", 3), ("results.md", 2)])
def test_figures_beside_an_experiment_are_in_its_table(name: str, lines: int) -> None:
    """A cell or a paragraph that links to a result file has no decimal number that the file has not."""
    parts = re.split(r"\||\n\n|\n- ", (ROOT / "docs" / name).read_text())
    checked = 0
    for part in parts:
        files = re.findall(r"results/learning/(\w+)\.md", part)
        figures = re.findall(r"\d+\.\d", re.sub(r"\(arXiv [\d., ]+\)|\d{4}\.\d{5}", "", part)) if files else []
        tables = "".join((LEARNING / f"{file}.md").read_text() for file in files)
        assert all(figure in tables for figure in figures), (part, [f for f in figures if f not in tables])
        checked += bool(figures)
    assert checked >= lines


def test_the_table_of_results_is_that_of_the_experiments() -> None:
    """Each line's figures are the means over three seeds of one arm at its best learning rate."""
    table = README.split("## What it measures")[1].split("## Install")[0]
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", table, flags=re.M)
    points = {
        name: {point["arm"]: point for point in json.loads((LEARNING / f"{name}.json").read_text())["figures"]["points"]
               if point["is_best"]} for name in ("fine_tuning", "keep_both", "sums")
    }  # fmt: skip
    learnt = points["sums"]
    one = learnt["examples"]
    before = [one["task"]["after"]["value"] - one["task"]["gain"]["difference"]]
    before += [one["retention"][s]["after"]["value"] - one["retention"][s]["change"]["difference"]
               for s in ("general", "sentences")]  # fmt: skip
    expected = [[f"{100 * value:.1f}" for value in before]]
    expected += [in_columns(learnt[arm], ("task", "general")) for arm in ("sft, bare", "examples", "sft", "lmbda 0")]
    assert [list(row[1:]) for row in rows] == expected
    for point, columns in ((points["fine_tuning"]["bare"], ("task", "general")),
                           (points["keep_both"]["method"], ("sums", "task"))):  # fmt: skip
        assert "{}, {} and {} %".format(*in_columns(point, columns)) in " ".join(table.split())


def in_columns(point: dict, columns: tuple[str, str]) -> list[str]:
    """What an arm gets right of sums, general knowledge and sentences, in %; one of them is its task."""
    values = {"task": point["task"]} | point["retention"]
    return [f"{100 * values[name]['after']['value']:.1f}" for name in (*columns, "sentences")]


def speed_row(case: dict) -> str:
    """A case of benchmarks/losses.py as the guide to losses shows it."""
    against = ("TRL", "full logits", "products alone")
    ratios = [case["ratio to ours, with 95 % interval"].get(name) for name in against]
    shown = [f"{r[0]:.2f} ({r[1]:.2f} to {r[2]:.2f})" if r else "" for r in ratios]
    peaks = [f"{case['peak MiB'][name]:,.0f}" for name in ("ours", "TRL", "full logits") if name in case["peak MiB"]]
    shape = f"{case['tokens']:,} × {case['width']:,} × {case['vocab']:,}"
    what = f"{case['dtype']}, {shape}, {case['head']}"
    return f"| {what} | {case['seconds']['ours']:.2f} s | {' | '.join(shown)} | {' / '.join(peaks)} |"


def test_the_speeds_in_the_guide_to_losses_are_those_of_the_result_file() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "losses.json").read_text())["cpu"]
    for case in record["cases"]:
        if case["loss"] == "reverse KL":
            assert speed_row(case) + "\n" in LOSSES
    reached = record["targets"]["TRL / ours, geometric mean, at least 3"]["reached"]
    assert f"**{reached:.1f} times**" in LOSSES and f"**{reached:.1f} times**" in README
    assert record["rounds"] >= 10 and f"{record['rounds']} rounds" in LOSSES


def test_the_way_of_a_row_stops_at_each_file_once_and_every_stop_is_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    stops = re.findall(r"^\| \d+ \| `(.+?)` \| (?:`(.+?)`)?", text, flags=re.M)
    files = [file for file, _ in stops]
    assert len(files) == len(set(files)) > 20
    for file, name in stops:
        source = (ROOT / file).read_text()
        assert all(re.search(rf"\b{part}\b", source) for part in name.split(".")), (file, name)


def test_the_picture_of_the_rooms_is_the_order_that_the_layout_test_checks() -> None:
    picture = re.findall(r"```\n(commands.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.S)[0]
    drawn = [set(line[:32].split()) for line in picture.splitlines()]
    assert drawn == [set(level) for level in ORDER if not set(level) & {"__main__", "cli", "__init__"}]
