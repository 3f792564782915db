"""The model card says what a hub asks for, and cites the method that was trained with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import make_llama, make_rows, make_tokenizer
from datasets import Dataset
from helpers import make_args, make_trainer
from huggingface_hub import HfApi, ModelCard

from opsd import EMATeacher, OPSDTrainer, SameCheckpointTeacher
from opsd.commands.build import build_trainer
from opsd.commands.run_file import read_run
from opsd.evaluation.run_folder import read_card
from opsd.teachers.recipes import find_recipe, read_recipe
from opsd.training.model_card import model_card

TAGS = {"generated_from_trainer", "opsd", "trl", "on-policy-distillation"}


def saved(folder: Path, teacher: Any = None, student: Any = "full", **settings: Any) -> ModelCard:
    """Train, save, and read the card back; its YAML must be what huggingface_hub writes for the data it read."""
    trainer = make_trainer(folder, teacher, student, **settings)
    trainer.train()
    trainer.save_model()
    return read(folder)


def read(folder: Path) -> ModelCard:
    card = ModelCard.load(folder / "README.md")
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    return card


def run_card_of(folder: Path) -> dict[str, Any]:
    trainer = make_trainer(folder, SameCheckpointTeacher(context="answer_only"))
    return json.loads(json.dumps(trainer.run_card, default=str))


def test_a_saved_model_has_a_card_with_the_metadata_of_a_hub(tmp_path: Path) -> None:
    card = saved(tmp_path, EMATeacher(0.9, context="answer_only"))
    assert set(card.data.tags) >= TAGS
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert card.data["base_model_relation"] == "finetune" and card.data.eval_results is None
    run = read_card(str(tmp_path))
    for text in (run["teacher"]["description"], "answer_only", run["divergence"]["formula"], "1 rollout per prompt"):
        assert text in card.text
    assert run["divergence"]["description"] in card.text.replace("\\|", "|")
    assert "[run_card.md](run_card.md)" in card.text and (tmp_path / "run_card.md").is_file()
    assert "GKD" not in card.text


def test_an_adapter_says_so(tmp_path: Path) -> None:
    card = saved(tmp_path, None, "lora")
    assert card.data.library_name == "peft" and card.data["base_model_relation"] == "adapter"


@pytest.mark.parametrize(
    ("base", "named", "link"),
    [("org/model", "org/model", True), ("/home/me/models/mine", None, False), ("LlamaForCausalLM", None, False)],
)
def test_a_base_model_is_linked_where_a_hub_may_have_it(
    tmp_path: Path, base: str, named: str | None, link: bool
) -> None:
    card = model_card({**run_card_of(tmp_path), "model": base, "first_loaded_from": base}, {}, "mine")
    assert card.data.base_model == named
    assert ("huggingface.co/org/model" in card.text) is link and "/home" not in str(card)


@pytest.mark.parametrize("name", ["sdft", "ema"])
def test_a_recipe_is_cited_by_its_own_paper(tmp_path: Path, name: str) -> None:
    rows = Dataset.from_list([{**row, "demonstration": "So it is."} for row in make_rows()])
    path = find_recipe(name)
    assert path is not None
    card = saved(tmp_path, name, rows=rows)
    assert "[arXiv 2601.19897](https://arxiv.org/abs/2601.19897)" in card.text and "2306.13649" not in card.text
    differences = read_recipe(path).differences.strip()
    assert (differences in card.text) and ("Differences from it" in card.text) == bool(differences)


def test_a_teacher_without_a_recipe_is_cited_by_its_strategy(tmp_path: Path) -> None:
    card = saved(tmp_path, EMATeacher(0.9, context="answer_only"))
    assert "- strategy of the teacher: SDPO, [arXiv 2601.20802]" in card.text and "Differences" not in card.text


def test_opsd_train_cites_the_recipe_that_the_run_file_names(tmp_path: Path) -> None:
    make_llama(0).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({**row, "demonstration": "So."}) + "\n" for row in make_rows()))
    settings = {"model_name_or_path": str(tmp_path / "model"), "dataset_name": str(rows), "teacher": "sdft"}
    settings |= {"output_dir": str(tmp_path / "run"), "use_cpu": True, "gradient_checkpointing": False}
    settings |= {"per_device_train_batch_size": 2, "max_completion_length": 8, "report_to": "none"}
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    trainer = build_trainer(read_run(tmp_path / "run.yaml"))
    assert trainer.run_card["method"]["recipe"] and "SDFT" in trainer.run_card["method"]["source"]


def test_a_control_is_not_taken_for_the_method(tmp_path: Path) -> None:
    card = saved(tmp_path, SameCheckpointTeacher(context="worked_solution"), control="wrong-context")
    assert "| control | wrong-context" in card.text


def evaluated(folder: Path) -> OPSDTrainer:
    rows = [{**row, "prompt": [{"role": "user", "content": f"Other {n}"}]} for n, row in enumerate(make_rows(12))]
    trainer = OPSDTrainer(
        make_llama(0),
        SameCheckpointTeacher(context="answer_only"),
        args=make_args(folder),
        train_dataset=Dataset.from_list(make_rows()),
        processing_class=make_tokenizer(),
        evaluation={
            "test": rows[:8],
            "grader": "regex:[aeiou]",
            "samples": 2,
            "retention": {"other | skill": {"rows": rows[8:], "grader": "exact"}},
        },
    )
    trainer.train()
    return trainer


def test_evaluation_results_are_in_the_metadata(tmp_path: Path) -> None:
    evaluated(tmp_path).save_model()
    card, figures = read(tmp_path), json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["metrics"]
    results = {(each.dataset_type, each.metric_type): each for each in card.data.eval_results}
    accuracy = results["test", "accuracy"]
    assert accuracy.metric_value == figures["after"]["accuracy"]["value"]
    assert accuracy.metric_args["interval_95"] == [figures["after"]["accuracy"][end] for end in ("low", "high")]
    assert "8 questions" in accuracy.dataset_name and "regex:[aeiou]" in accuracy.metric_name
    assert ("retention-other-skill", "accuracy") in results and ("test", "avg@2") in results
    assert "student before" in card.text and "gain" in card.text


def test_a_model_that_is_saved_elsewhere_takes_its_cards_along(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run")
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for name in ("README.md", "run_card.json", "run_card.md"):
        assert (tmp_path / "final" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


def test_a_model_that_was_not_trained_has_a_card_too(tmp_path: Path) -> None:
    make_trainer(tmp_path).save_model()
    assert read_card(str(tmp_path)) and read(tmp_path).data.tags


def test_pushing_uploads_the_card_and_the_run_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: dict[str, str] = {}

    def upload(self: HfApi, *, folder_path: str, **kwargs: Any) -> None:
        pushed.update({name: (Path(folder_path) / name).read_text() for name in ("README.md", "run_card.json")})

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    trainer = make_trainer(tmp_path, EMATeacher(0.9, context="answer_only"))
    trainer.train()
    trainer.hub_model_id = "me/mine"
    trainer.push_to_hub(tags=["maths"], dataset_name="me/rows")
    card = ModelCard(pushed["README.md"])
    assert set(card.data.tags) >= {*TAGS, "maths"} and card.data.datasets == "me/rows"
    assert 'model="me/mine"' in card.text and "SDPO" in card.text


def test_links_to_logs_are_kept(tmp_path: Path) -> None:
    link = '[<img src="badge.svg" alt="Visualize in Weights & Biases">](https://wandb.ai/run)'
    assert link in model_card(run_card_of(tmp_path), {}, "mine", links=[link]).text
