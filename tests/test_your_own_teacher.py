"""docs/your_own_teacher.md: its code is extracted and put through training, doctor, evaluation, mixture and resume."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_rows
from datasets import Dataset
from helpers import make_rollouts, make_student, make_trainer, prepared
from safetensors.torch import load_file

from opsd import LiveTeacher, MixtureTeacher, RoutedTeacher, SameCheckpointTeacher, Teacher, TopKSignal, load_teacher
from opsd.cli import main
from opsd.errors import ConfigError
from opsd.models.forward import counting_passes
from opsd.teachers import TeacherView

PAGE = (Path(__file__).parents[1] / "docs" / "your_own_teacher.md").read_text(encoding="utf-8")
CODE, WITHOUT_TRAINER = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
FRAGMENTS = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
NAME = "sharpened:SharpenedTeacher"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the page's module in it, as a user has it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "sharpened", raising=False)
    (tmp_path / "sharpened.py").write_text(CODE)
    return tmp_path


@pytest.fixture
def run_yaml(here: Path, llama_folder: str) -> Path:
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    settings = {
        "model_name_or_path": llama_folder, "dataset_name": "rows.jsonl", "output_dir": "run", "context": "answer_only",
        "teacher": NAME, "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
        "max_completion_length": 5, "learning_rate": 1.0e-2, "use_cpu": True, "bf16": False, "report_to": "none",
        "gradient_checkpointing": False, "save_steps": 1, "logging_steps": 1, "disable_tqdm": True,
    }  # fmt: skip
    path = here / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def change(path: Path, **settings: Any) -> None:
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **settings}))


def test_the_page_fits_a_page_and_its_example_is_short() -> None:
    assert len(PAGE.splitlines()) <= 150 and len(CODE.splitlines()) <= 45


@pytest.mark.parametrize("fragment", FRAGMENTS, ids=["name", "settings", "mixture"])
def test_it_trains_from_a_run_file(fragment: dict, run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`opsd train` lets the doctor look first, and trains nothing where a check fails."""
    change(run_yaml, **fragment)
    assert main(["train", str(run_yaml)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"SharpenedTeacher\(temperature=0\.[57], cooling=", out) and "context     answer_only" in out
    history = json.loads(Path("run/checkpoint-2/trainer_state.json").read_text())["log_history"]
    assert history[0]["divergence"] > 1e-3
    state = load_file("run/checkpoint-2/opsd_teacher.safetensors")
    current = next(value for name, value in state.items() if name.endswith("current"))
    settings = fragment["teacher"] if "temperature" in fragment["teacher"] else {"temperature": 0.5, "cooling": 1.0}
    assert current.item() == pytest.approx(settings["temperature"] * settings["cooling"] ** 2)


def test_the_doctor_looks_at_it(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(run_yaml), "--json", "-", "--grader", "last_number"]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert {each["check"]: each["status"] for each in findings}["lift"] != "skip"


def test_it_is_the_ceiling_of_an_evaluation(run_yaml: Path) -> None:
    rows = [{**row, "prompt": f"How many? {n}"} for n, row in enumerate(make_rows(4))]
    Path("test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    change(run_yaml, evaluation={"test": "test.jsonl", "grader": "last_number", "max_new_tokens": 4, "samples": 0})
    assert main(["train", str(run_yaml), "--skip-doctor"]) == 0
    ceilings = [json.loads(path.read_text()) for path in Path("run/evaluation").glob("*teacher*.json")]
    assert {each["context"] for each in ceilings} >= {"answer_only"}
    assert all("SharpenedTeacher(" in each["model"] for each in ceilings)


@pytest.mark.slow
def test_a_resumed_run_ends_as_one_in_one_piece(here: Path) -> None:
    """The temperature falls during training, and comes back from the checkpoint."""

    def run(folder: Path, resume: bool = False) -> Any:
        teacher = load_teacher({"strategy": NAME, "cooling": 0.8}, context="answer_only")
        trainer = make_trainer(folder, teacher, "lora", max_steps=4, save_strategy="steps", save_steps=1)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(here / "whole")
    shutil.copytree(here / "whole" / "checkpoint-2", here / "again" / "checkpoint-2")
    again = run(here / "again", resume=True)
    assert again.teacher.current == whole.teacher.current == pytest.approx(0.5 * 0.8**4)
    for (name, a), (_, b) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_resumed_run_must_have_its_settings(here: Path) -> None:
    stored = load_teacher({"strategy": NAME, "temperature": 0.7}).description
    assert stored == {"strategy": NAME, "temperature": 0.7, "cooling": 1.0, "context": None}


def test_it_scores_without_a_trainer(here: Path, llama_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(llama_folder, here / "runs" / "student")
    sys.path.append(str(here))  # as `python script.py` does
    exec(WITHOUT_TRAINER, {})
    (values,) = json.loads(capsys.readouterr().out)
    assert values and all(value < 0 for value in values)


def test_its_distributions_are_sharpened_ones_under_every_context_at_once(here: Path) -> None:
    """Written from the definition; a mixture of contexts must see a temperature that changed after it was made."""
    student = make_student("full").eval()
    teacher = load_teacher({"strategy": NAME, "cooling": 0.5})
    mixture = prepared(MixtureTeacher(teacher, [0.3, 0.7], contexts=["answer_only", None]), student)
    mixture.after_step(1)
    rollouts = mixture.prompts.render(make_rollouts())
    expected = []
    for row, completion, mask in zip(rollouts.rows, rollouts.completion_ids, rollouts.loss_mask or (), strict=True):
        total = torch.zeros(len(completion), dtype=torch.float64)
        for weight, leaf in zip([0.3, 0.7], mixture.prompts.leaves, strict=True):
            prompt = leaf.ids(row)
            with torch.no_grad():
                logits = student(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double()
            p = torch.softmax(logits, -1) ** (1 / 0.25)
            total += weight * (p / p.sum(-1, keepdim=True)).gather(-1, torch.tensor(completion)[:, None])[:, 0]
        expected.append(total.log()[torch.tensor(mask, dtype=torch.bool)])
    with counting_passes() as sequences:
        logprobs = TeacherView(mixture).score(rollouts).logprobs(torch.tensor(rollouts.scored_ids))
    assert sequences == [2 * len(rollouts)], "one pass over both contexts"
    assert (logprobs.double() - torch.cat(expected)).abs().max() <= 1e-3
    assert mixture.cost.megabytes > 0, "its copy is counted"


class Certain(Teacher):
    """Nothing but `score`: the token that was sampled, with certainty."""

    def score(self, rollouts: Any) -> TopKSignal:
        ids = torch.tensor(rollouts.scored_ids, dtype=torch.long)[:, None]
        zeros = torch.zeros(ids.shape)
        return TopKSignal(ids, zeros, zeros[:, 0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: Certain(context="answer_only"),
        lambda: RoutedTeacher("domain", {"even": Certain(), "odd": SameCheckpointTeacher()}, context="answer_only"),
    ],
    ids=["alone", "in a route"],
)
def test_a_teacher_that_writes_only_score_trains(tmp_path: Path, make: Any) -> None:
    settings = {"beta": 0.0, "support": "teacher_top_k", "support_k": 1, "tail": "none"}
    trainer = make_trainer(tmp_path, make(), rows=Dataset.from_list(make_rows()), **settings)
    trainer.train()
    assert trainer.state.global_step == 2 and "Certain()" in trainer.teacher.describe()


class Scaled(LiveTeacher):
    """Passes what it does not know on to its parent, and keeps a context through it."""

    def __init__(self, factor: float, **kwargs: Any):
        super().__init__(**kwargs)
        self.factor = factor


class NoContext(Certain):
    def __init__(self, size: int = 3):
        super().__init__()
        self.size = size


@pytest.mark.parametrize(("value", "context"), [("Scaled", "hint"), ("NoContext", "hint"), ("Certain", None)])
def test_any_class_takes_any_context(value: str, context: str | None) -> None:
    settings = {"factor": 2.0} if value == "Scaled" else {}
    teacher = load_teacher({"strategy": f"{__name__}:{value}", **settings}, context=context)
    assert (teacher.context and teacher.context.name) == context


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"strategy": f"{__name__}:Scaled"}, "needs factor, which only you can choose"),
        ({"strategy": f"{__name__}:Scaled", "factr": 2.0}, "Did you mean 'factor'"),
        (f"{__name__}:Path", "is the class Path, which does not extend opsd.Teacher"),
        (f"{__name__}:NAME", "is a str, which does not extend opsd.Teacher"),
        ("no_such_module:MyTeacher", "Check both names"),
        (f"{__name__}:NoSuch", "Check both names"),
        (Certain, "this is the class Certain. Make one: Certain(…)"),
        (Path, "this is the class Path. Extend opsd.Teacher"),
        (7, "this is a int"),
    ],
)
def test_what_is_no_teacher_is_refused_in_words(value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_teacher(value)
    assert message in str(error.value) and "ABCMeta" not in str(error.value)


def test_the_page_names_every_hook_and_no_other() -> None:
    after_table = PAGE.split("## Other methods")[1]
    names = set(re.findall(r"`(\w+)(?:\([^`]*\))?`", "\n".join(re.findall(r"^\| (.*?) \|", after_table, re.MULTILINE))))
    public = {name for name in vars(Teacher) if not name.startswith("_")}
    given = {"prompts", "student", "context", "cost", "description", "logprobs", "copy_with", "can_sample", "members"}
    assert public - given - {"prepare", "score"} == names
