"""The run card says what a run was; `opsd diff` says what differs between two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import make_llama, make_rows, make_tokenizer
from datasets import Dataset
from helpers import MAKE_TEACHER, make_student, make_trainer

from opsd import MixtureTeacher, SameCheckpointTeacher
from opsd.cli import main
from opsd.evaluation.run_folder import CARD, CARD_PAGE, differences, read_card
from opsd.models.digests import tokenizer_digest
from opsd.training.run_card import write_run_card


def card_of(folder: Path, **changes: Any) -> dict[str, Any]:
    changes = {"teacher": SameCheckpointTeacher(context="answer_only"), **changes}
    return json.loads(json.dumps(make_trainer(folder, **changes).run_card, default=str))


@pytest.mark.parametrize("name", MAKE_TEACHER)
def test_every_run_writes_its_card_when_it_begins(name: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, MAKE_TEACHER[name](), "lora", max_steps=1)
    trainer.train()
    card = read_card(str(tmp_path))
    for key in ("settings", "prompts", "hashes", "divergence", "versions", "hardware", "seeds", "doctor", "teacher"):
        assert card[key]
    assert card["divergence"]["formula"] == trainer.args.objective.formula
    assert len(card["prompts"]) == 3
    decode = trainer.student.tokenizer.decode
    for prompt, row in zip(card["prompts"], trainer.train_dataset, strict=False):
        assert prompt["student"] == decode(trainer.student.renderer.ids(row["prompt"]))
        told = {decode(leaf.ids(row)) for leaf in trainer.teacher.prompts.leaves_of(row)}
        assert {each["prompt"] for each in prompt["teacher"]} == told
    page = (tmp_path / CARD_PAGE).read_text()
    assert card["divergence"]["formula"] in page and card["prompts"][0]["student"] in page and "## Versions" in page
    assert read_card(str(tmp_path / "checkpoint-1")) == card  # also from a folder within
    assert "token_clip" in card["settings"]


def test_secrets_stay_out_at_every_depth(tmp_path: Path) -> None:
    kwargs = {"token": "hf_SECRET", "nested": [{"api_key": "SECRET"}], "revision": "main"}
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.args.model_init_kwargs = kwargs
    trainer.args.vllm_server_base_url = "http://me:SECRET@host:8000/v1"
    write_run_card(tmp_path, trainer.run_card)
    for name in (CARD, CARD_PAGE):
        text = (tmp_path / name).read_text()
        assert "SECRET" not in text and "//host:8000/v1" in text and "main" in text


def test_two_contexts_of_one_template_are_both_shown(tmp_path: Path) -> None:
    shares = [{"template": "partial_solution", "reveal": share} for share in (0.2, 0.9)]
    teacher = MixtureTeacher(SameCheckpointTeacher(), [0.5, 0.5], contexts=shares)
    told = [each["prompt"] for each in card_of(tmp_path, teacher=teacher)["prompts"][0]["teacher"]]
    assert len(told) == 2 and len(told[0]) < len(told[1])


def test_the_same_run_has_the_same_card(tmp_path: Path) -> None:
    assert differences(card_of(tmp_path / "a"), card_of(tmp_path / "b")) == []


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"learning_rate": 0.5}, "settings.learning_rate"),
        ({"beta": 0.0}, "divergence.formula"),
        ({"seed": 3}, "seeds.seed"),
        ({"rows": Dataset.from_list([*make_rows(11), {**make_rows(12)[11], "answer": "12"}])}, "hashes.data"),
        ({"teacher": SameCheckpointTeacher(context="concise")}, "hashes.templates.concise"),
        ({"teacher": MAKE_TEACHER["ema"]()}, "teacher.strategy"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "prompts.0.student"),
    ],
)
def test_what_was_changed_is_what_differs(changes: dict[str, Any], name: str, tmp_path: Path) -> None:
    found = differences(card_of(tmp_path / "a"), card_of(tmp_path / "b", **changes))
    assert name in [each[0] for each in found]
    assert len(found) < 16, found


def test_another_tokenizer_has_another_hash(tmp_path: Path) -> None:
    one, same, smaller, other_end = make_tokenizer(), make_tokenizer(), make_tokenizer(380), make_tokenizer()
    other_end.eos_token = "<|pad|>"
    assert card_of(tmp_path)["hashes"]["tokenizer"] == tokenizer_digest(one) == tokenizer_digest(same)
    assert len({tokenizer_digest(each) for each in (one, smaller, other_end)}) == 3


def test_a_changed_word_of_a_template_is_found(tmp_path: Path) -> None:
    cards = []
    for word in ("is", "was"):
        path = tmp_path / "mine.jinja"
        path.write_text(
            "{% extends 'base.jinja' %}{% block user %}{{ prompt }} It " + word + " {{ answer }}.{% endblock %}"
        )
        cards.append(card_of(tmp_path / word, teacher=SameCheckpointTeacher(context=str(path))))
    names = [each[0] for each in differences(*cards)]
    assert (
        "hashes.templates.mine" in names
        and "prompts.0.teacher.0.prompt" in names
        and "settings.learning_rate" not in names
    )


def test_the_card_says_of_a_loaded_model_only_what_is_known(tmp_path: Path, llama_folder: str) -> None:
    """A model that had been fine-tuned since stood there under the name of its base."""
    model = make_llama()
    model.config._name_or_path = "org/base"
    card = card_of(tmp_path / "loaded", student=model)
    assert (card["model"], card["first_loaded_from"]) == ("LlamaForCausalLM", "org/base")
    adapted = make_student("lora")
    assert card_of(tmp_path / "lora", student=adapted)["model"] == "LlamaForCausalLM"
    named = card_of(tmp_path / "named", student=llama_folder)
    assert named["model"] == named["first_loaded_from"] == llama_folder


@pytest.mark.slow
def test_diff_prints_what_differs_line_by_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, context, rate in (("a", "answer_only", 0.1), ("b", "answer_only", 0.2), ("c", "hint", 0.1)):
        rows = Dataset.from_list([{**row, "hint": "Count on."} for row in make_rows()])
        make_trainer(
            tmp_path / name, SameCheckpointTeacher(context=context), rows=rows, learning_rate=rate, max_steps=1
        ).train()
    capsys.readouterr()
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "a" / CARD)]) == 0
    assert "the two runs are the same" in capsys.readouterr().out
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    out = capsys.readouterr().out
    assert "settings.learning_rate" in out and "0.1" in out and "0.2" in out and "hashes" not in out
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "c")]) == 1
    out = capsys.readouterr().out
    assert "+Hint: Count on." in out and "-The correct answer is 0. Answer with it." in out


def test_a_folder_without_a_card_and_a_damaged_one_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diff", str(tmp_path), str(tmp_path)]) == 2
    assert "holds no run_card.json" in capsys.readouterr().err
    (tmp_path / CARD).write_text("{")
    assert main(["diff", str(tmp_path), str(tmp_path)]) == 2
    assert "is not JSON" in capsys.readouterr().err
