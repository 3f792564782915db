"""The command line as a user types it: real processes for what crosses one, in-process calls for the rest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import make_rows

from opsd import sources
from opsd.cli import COMMANDS, main
from opsd.commands.run_file import read_run
from opsd.errors import ConfigError
from opsd.evaluation import EvaluationResult

SMALL = {
    "teacher": "ema",
    "context": "answer_only",
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_completion_length": 5,
    "learning_rate": 1.0e-3,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_steps": 1,
    "logging_steps": 1,
}


@pytest.fixture
def run_yaml(tmp_path: Path, llama_folder: str) -> Path:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    config = {
        **SMALL,
        "model_name_or_path": llama_folder,
        "dataset_name": str(rows),
        "output_dir": str(tmp_path / "run"),
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def opsd(*arguments: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "opsd", *arguments], capture_output=True, text=True, **kwargs)  # type: ignore[call-overload, no-any-return]


# ---- train ------------------------------------------------------------------------------------------------------


def test_train_takes_a_file_and_overrides_trains_and_saves(run_yaml: Path, capsys) -> None:
    assert main(["train", str(run_yaml), "--max_steps", "1", "--learning_rate=0.002"]) == 0
    out = capsys.readouterr().out
    assert "teacher ←" in out and "saved the trained model" in out
    assert (run_yaml.parent / "run" / "model.safetensors").is_file()
    state = json.loads((run_yaml.parent / "run" / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["max_steps"] == 1 and state["log_history"][0]["learning_rate"] == 0.002


def test_a_run_that_learned_nothing_is_not_saved_as_a_trained_model(run_yaml: Path, capsys) -> None:
    """The last line was "saved the trained model", whatever had been trained."""
    assert main(["train", str(run_yaml), "--max_steps", "1", "--learning_rate", "0", "--skip-doctor"]) == 0
    *_, reason, last, report = capsys.readouterr().out.splitlines()
    assert reason.startswith("learned     nothing: learning_rate is 0")
    assert report.startswith("report      ")
    assert last.startswith("saved the model, which learned nothing")
    assert "learning_rate is 0" in (run_yaml.parent / "run" / "README.md").read_text()
    assert "learning_rate is 0" in (run_yaml.parent / "run" / "run_card.md").read_text()


@pytest.mark.slow
def test_a_run_with_lora_resumes_by_the_command_it_prints(run_yaml: Path, capsys) -> None:
    arguments = ["train", str(run_yaml), "--use_peft", "--lora_r", "4", "--lora_target_modules", "all-linear"]
    assert main([*arguments, "--max_steps", "1"]) == 0
    assert main([*arguments, "--max_steps", "2"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    longer = [*arguments, "--max_steps", "2", "--resume_from_checkpoint", "true"]
    assert main(longer) == 2
    assert "--allow-changes max_steps" in capsys.readouterr().err
    assert main([*longer, "--allow-changes", "max_steps"]) == 0
    state = json.loads((run_yaml.parent / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2


@pytest.mark.slow
def test_a_trained_adapter_goes_on_as_the_student(run_yaml: Path) -> None:
    """The main use: a LoRA run's folder is the next run's model."""
    assert main(["train", str(run_yaml), "--max_steps", "1", "--use_peft", "--lora_target_modules", "all-linear"]) == 0
    first = str(run_yaml.parent / "run")
    again = ["--model_name_or_path", first, "--output_dir", str(run_yaml.parent / "second"), "--max_steps", "1"]
    assert main(["train", str(run_yaml), *again]) == 0
    assert (run_yaml.parent / "second" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("learning_rte", 1, "Did you mean 'learning_rate'"),
        ("teacher", "emma", "Did you mean 'ema'"),
        ("context", "answr_only", "answer_only"),
        ("max_completion_length", 0, "at least 1"),
        ("beta", 2, "between 0 and 1"),
        ("lmbda", 7, "between 0 and 1"),
        ("dataset_name", "nowhere.jsonl", "nowhere.jsonl"),
        ("model_name_or_path", "nomodel", "neither a folder"),
        ("context", "document", "needs the column"),
        ("teacher", {"strategy": "ema", "decay": 3}, "below 1"),
        ("teacher", {"strategy": "ema", "rate": 0.1}, "no setting 'rate'"),
    ],
)
def test_a_mistake_in_the_file_is_named_before_a_model_loads(
    run_yaml: Path, key: str, value: object, message: str, monkeypatch, capsys
) -> None:
    config = yaml.safe_load(run_yaml.read_text())
    run_yaml.write_text(yaml.safe_dump({**config, key: value}))
    monkeypatch.setattr(
        "trl.trainer.distillation_trainer.create_model_from_path", lambda *a, **k: pytest.fail("loaded")
    )
    assert main(["train", str(run_yaml)]) == 2
    assert message in capsys.readouterr().err


def test_a_mistake_on_the_command_line_is_named(run_yaml: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'max_steps'"):
        read_run(run_yaml, ["--max_step", "3"])
    with pytest.raises(ConfigError, match="max_steps"):
        read_run(run_yaml, ["--max_steps", "three"])


def test_yaml_that_does_not_parse_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("beta: 1\n  lmbda: : 2\n")
    with pytest.raises(ConfigError, match="line 2"):
        read_run(path)


@pytest.mark.filterwarnings("ignore:top_p 0.95 and top_k 20:opsd.errors.OPSDWarning")  # as published by OPSD
def test_a_recipes_numbers_lie_beneath_the_file_and_the_command_line(run_yaml: Path) -> None:
    config = yaml.safe_load(run_yaml.read_text())
    del config["learning_rate"]
    run_yaml.write_text(yaml.safe_dump({**config, "teacher": "opsd", "context": "answer_only"}))
    recipe = read_run(run_yaml).recipe
    assert recipe is not None
    assert read_run(run_yaml).args.learning_rate == recipe.args["learning_rate"]
    assert read_run(run_yaml).args.max_steps == SMALL["max_steps"] != recipe.args["max_steps"]
    assert read_run(run_yaml, ["--learning_rate", "0.5"]).args.learning_rate == 0.5


# ---- stopping ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_says_how_to_resume(run_yaml: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "opsd", "train", str(run_yaml), "--max_steps", "500", "--save_strategy", "no"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step "):
                process.send_signal(number)
                break
        out = process.stdout.read()
    assert process.returncode == 128 + number, out
    assert f"stopped by {number.name} after step" in out and "--resume_from_checkpoint true" in out
    saved = list((run_yaml.parent / "run").glob("checkpoint-*"))
    assert len(saved) == 1 and (saved[0] / "opsd_teacher.json").is_file()
    step = int(saved[0].name.split("-")[1])
    more = ["--max_steps", str(step + 1), "--save_strategy", "no", "--resume_from_checkpoint", "true"]
    assert main(["train", str(run_yaml), *more, "--allow-changes", "max_steps"]) == 0


@pytest.mark.slow
def test_a_killed_run_resumes_from_its_last_whole_checkpoint(run_yaml: Path) -> None:
    command = [sys.executable, "-m", "opsd", "train", str(run_yaml), "--max_steps", "500"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.time() + 120
        while not (run_yaml.parent / "run" / "checkpoint-3").exists() and time.time() < deadline:
            time.sleep(0.05)
        process.kill()
    steps = sorted(int(p.name.split("-")[1]) for p in (run_yaml.parent / "run").glob("checkpoint-*"))
    assert steps
    more = ["--max_steps", str(steps[-1] + 1), "--allow-changes", "max_steps"]
    assert main(["train", str(run_yaml), *more, "--resume_from_checkpoint", "true"]) == 0


# ---- the other commands -----------------------------------------------------------------------------------------


def test_show_prints_both_prompts_the_boundary_and_the_scored_tokens(run_yaml: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["show", str(run_yaml), "--completion", "It is 0."]) == 0
    out = capsys.readouterr().out
    assert "student" in out and "teacher (context: answer_only)" in out and "The correct answer is 0" in out
    assert out.count("▏") >= 4 and "tokens are scored on both sides" in out


@pytest.mark.parametrize(("columns", "width"), [(80, 80), (160, 79)])
def test_prompts_stand_side_by_side_where_there_is_room(
    columns: int, width: int, run_yaml: Path, capsys, monkeypatch
) -> None:
    """At 80 columns they were stacked, and each half as wide."""
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["show", str(run_yaml)]) == 0
    top = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("╭"))
    assert top.index("╮") + 1 == width and top.count("╮") == (2 if columns == 160 else 1)


def test_show_renders_with_each_sides_keywords(run_yaml: Path, capsys, monkeypatch) -> None:
    """The prompt on the screen must be the prompt that trains: here the teacher thinks and the student does not."""
    monkeypatch.setenv("COLUMNS", "160")
    config = yaml.safe_load(run_yaml.read_text())
    context = {"template": "answer_only", "chat_template_kwargs": {"enable_thinking": True}}
    kwargs = {"enable_thinking": False}
    run_yaml.write_text(yaml.safe_dump({**config, "context": context, "chat_template_kwargs": kwargs}))
    assert main(["show", str(run_yaml)]) == 0
    assert capsys.readouterr().out.count("<think>") == 2  # the teacher's, as text and as tokens


def test_show_has_what_a_control_shows(run_yaml: Path, capsys) -> None:
    shown = {}
    for control in ([], ["--control", "wrong-context"], ["--control", "no-context"]):
        assert main(["show", str(run_yaml), *control]) == 0
        shown[len(shown)] = " ".join(capsys.readouterr().out.split())
    assert len(set(shown.values())) == 3 and "another row" in shown[1] and "another row" not in shown[0]
    assert main(["show", str(run_yaml), "--control", "wrong_context"]) == 2
    assert "Did you mean 'wrong-context'" in capsys.readouterr().err


def test_show_refuses_a_row_that_does_not_exist(run_yaml: Path, capsys) -> None:
    assert main(["show", str(run_yaml), "--row", "99"]) == 2
    assert "rows 0 to 11" in capsys.readouterr().err


def test_eval_grades_with_an_interval_and_writes_answers(run_yaml: Path, llama_folder: str, capsys) -> None:
    rows, answers = run_yaml.parent / "rows.jsonl", run_yaml.parent / "answers.json"
    arguments = ["--dataset_name", str(rows), "--grader", "last_number", "--max_new_tokens", "4", "--limit", "5"]
    assert main(["eval", llama_folder, *arguments, "--output", str(answers), "--context", "answer_only"]) == 0
    out = capsys.readouterr().out
    assert "95 % interval" in out and "answer_only" in out and "grader: last_number" in out
    result = EvaluationResult.load(answers)
    assert (result.n, result.grader, result.context, result.samples) == (5, "last_number", "answer_only", 0)


def test_templates_lists_those_that_fit(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["templates", "--columns", "prompt,answer"]) == 0
    out = capsys.readouterr().out
    assert "answer_only" in out and "document" not in out
    assert main(["templates"]) == 0
    everything = capsys.readouterr().out
    assert all(name in everything for name in sources.names("templates") if name != "base")


def test_teachers_lists_every_strategy_and_recipe(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["teachers"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in [*sources.names("teachers"), "SameCheckpointTeacher", "SiblingTeacher"])


def test_teachers_are_described_at_full_width(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["teachers"]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert "    The student's weights at step 0, frozen (OPSD, arXiv 2601.18734); the" in lines
    assert max(map(len, lines)) <= 80


def test_cp_copies_and_never_overwrites(tmp_path: Path, capsys) -> None:
    assert main(["cp", "answer_only", str(tmp_path)]) == 0
    copied = tmp_path / "answer_only.jinja"
    assert copied.read_text() == (sources.folder("templates") / "answer_only.jinja").read_text()
    copied.write_text("mine")
    assert main(["cp", "answer_only", str(tmp_path)]) == 2
    assert copied.read_text() == "mine" and "exists" in capsys.readouterr().err
    assert main(["cp", "answr_only", str(tmp_path)]) == 2
    assert "Did you mean 'answer_only'" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys) -> None:
    try:
        status = main([command, "--help"])
    except SystemExit as done:
        status = done.code  # argparse leaves this way
    assert status == 0 and len(capsys.readouterr().out) > 200


def test_an_unknown_command_and_version() -> None:
    assert opsd("trian").returncode == 2
    assert opsd("--version").stdout.startswith("opsd ")


def test_importing_opsd_is_light() -> None:
    code = "import sys, opsd; assert not {'torch', 'trl', 'transformers'} & set(sys.modules); print(opsd.__all__)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ}, check=False).returncode == 0


def test_every_public_name_can_be_imported() -> None:
    import opsd as package

    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError):
        _ = package.nothing


def test_show_compares_contexts_and_levels_on_several_rows_also_of_a_stream(
    run_yaml: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    contexts = ["--context", "none", '{"levels": ["answer_only", "none"]}', "worked_solution"]
    run_yaml.write_text(run_yaml.read_text() + "dataset_streaming: true\n")
    assert main(["show", str(run_yaml), *contexts, "--row", "0", "3"]) == 0
    out = capsys.readouterr().out
    assert out.count("row 0, tokens") == out.count("row 3, tokens") == 1
    assert (
        "context: the student's own prompt" in out
        and "schedule of answer_only, none" in out
        and "teacher (context: worked_solution)" in out
    )
    assert main(["show", str(run_yaml), "--row", "99"]) == 2
    assert "row 99 was asked for" in capsys.readouterr().err
