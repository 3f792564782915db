"""A served teacher trains as a local one does; a server that fails costs no step and no wrong number."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama, make_rows, make_tokenizer
from datasets import Dataset
from fault_server import FaultServer
from helpers import STUDENTS, make_rollouts, make_student, make_trainer, prepared

from opsd import OPSDConfig, OPSDTrainer
from opsd.doctor import examine
from opsd.errors import CheckpointError, ConfigError, ServerError
from opsd.teachers import MixtureTeacher, RoutedTeacher, SameCheckpointTeacher, ServedTeacher, SiblingTeacher, Teacher

TOP_K = 20
QUICK: dict[str, Any] = {"connect_timeout": 2.0, "read_timeout": 5.0, "patience": 1.0}
LISTED: dict[str, Any] = {"support": "teacher_top_k", "support_k": TOP_K, "logging_steps": 1}


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer(make_llama(5), make_tokenizer()) as server:
        yield server


def served(server: FaultServer, **settings: Any) -> ServedTeacher:
    return ServedTeacher(server.url, **{"top_k": TOP_K, "context": "answer_only", **QUICK, **settings})


def local() -> SiblingTeacher:
    return SiblingTeacher(make_llama(5), tokenizer=make_tokenizer(), context="answer_only")


def trained(folder: Path, teacher: Teacher, **settings: Any) -> OPSDTrainer:
    trainer = make_trainer(folder, teacher, **{**LISTED, **settings})
    trainer.train()
    return trainer


def values(trainer: OPSDTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(trainer: OPSDTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


# ---- the same as a local teacher -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta": 0.0},
        {"beta": 0.5, "tail": "renormalise"},
        {"support": "sampled", "support_k": 100, "baseline": "none"},
    ],
)
def test_it_trains_as_a_local_teacher_does(server: FaultServer, tmp_path: Path, settings: dict[str, Any]) -> None:
    # Adam divides a gradient by its own size, so it would make steps of what is rounding only.
    settings = {**settings, "max_steps": 3, "optim": "sgd", "learning_rate": 1.0}
    here = trained(tmp_path / "local", local(), **settings)
    there = trained(tmp_path / "served", served(server), **settings)
    assert values(there, "divergence") == pytest.approx(values(here, "divergence"), abs=1e-4)
    assert (weights(there) - weights(here)).abs().max() < 1e-5
    assert values(there, "unscored") == [0.0] * 3 and values(there, "served/tries") == [1.0] * 3


def test_with_the_whole_vocabulary_ten_steps_are_those_of_the_full_divergence(
    server: FaultServer, tmp_path: Path
) -> None:
    whole = {"support_k": 400, "max_steps": 10}
    here = trained(tmp_path / "local", local(), max_steps=10, support="full", support_k=100)
    there = trained(tmp_path / "served", served(server, top_k=400), **whole)
    assert values(there, "divergence") == pytest.approx(values(here, "divergence"), abs=1e-4)


def test_its_log_probabilities_and_samples_are_those_of_the_model(server: FaultServer) -> None:
    rows = [row for row in make_rollouts().rows]
    here, there = prepared(local(), make_llama(0)), prepared(served(server), make_llama(0))
    completions = [[5, 9, 2], [40, 41], [7]] * 4
    given = rows[: len(completions)], completions[: len(rows)]
    for a, b in zip(here.logprobs(*given), there.logprobs(*given), strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    sampling = {"max_new_tokens": 6, "batch_size": 4}
    assert here.sample(rows, **sampling) == there.sample(rows, **sampling)


def test_a_route_sends_it_its_own_rows(server: FaultServer, tmp_path: Path) -> None:
    def route(part: Teacher) -> RoutedTeacher:
        return RoutedTeacher("domain", {"even": part, "odd": SameCheckpointTeacher()}, context="answer_only")

    here = trained(tmp_path / "local", route(SiblingTeacher(make_llama(5), tokenizer=make_tokenizer())), max_steps=2)
    there = trained(tmp_path / "served", route(served(server, context=None)), max_steps=2)
    assert values(there, "divergence") == pytest.approx(values(here, "divergence"), abs=1e-4)


def test_scores_are_asked_for_before_they_are_needed(server: FaultServer, tmp_path: Path) -> None:
    trainer = trained(tmp_path, served(server), max_steps=2, gradient_accumulation_steps=2)
    assert all(0 <= share <= 1 for share in values(trainer, "served/hidden"))
    assert len(values(trainer, "served/waited")) == 2 and not trainer.teacher._pending


def test_the_doctor_compares_a_servers_noise_with_what_it_teaches(server: FaultServer, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, served(server), max_steps=1, **LISTED)
    assert [finding.status for finding in examine(trainer, rows=4, only=["divergence"]).findings] == ["pass"]
    trainer.teacher._facts = replace(trainer.teacher.facts, noise=50.0)
    finding = examine(trainer, rows=4, only=["divergence"]).findings[0]
    assert finding.status == "fail" and "--dtype float32" in finding.do


@pytest.mark.parametrize("student", STUDENTS)
def test_weights_that_are_here_too_tell_a_servers_rounding(server: FaultServer, tmp_path: Path, student: str) -> None:
    def cautions(served_model: torch.nn.Module, name: str) -> list[str]:
        server.model, server.root = served_model.eval(), "a/model"
        model = make_student(student)
        model.config._name_or_path = name
        return make_trainer(tmp_path, served(server), model).teacher.cautions

    rounded = make_llama(0)
    with torch.no_grad():
        for p in rounded.parameters():
            p.copy_((p * 8).round() / 8)
    assert cautions(make_llama(0), "a/model") == [] == cautions(rounded, "another/model")
    (caution,) = cautions(rounded, "a/model")
    assert "from those of the same weights here by" in caution and "--dtype float32" in caution


# ---- bad days --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "goes_on"), [(2, False), (3, False), (4, False), (5, False), (4, True)])
def test_a_run_stops_with_a_checkpoint_and_goes_on_as_if_nothing_had_been(
    server: FaultServer, tmp_path: Path, step: int, goes_on: bool
) -> None:
    """Also at the first step of an epoch, which draws before it begins."""
    whole = trained(tmp_path / "whole", served(server), max_steps=5)
    trainer = make_trainer(tmp_path / "broken", served(server, patience=0.3), max_steps=5, **LISTED)
    _fail_at_step(trainer, server, step)
    with pytest.raises(ServerError, match=rf"checkpoint-{step - 1} is saved.*Resume: "):
        trainer.train()
    server.faults.clear()
    # The same trainer goes on as well: a score that failed is asked for anew.
    trainer.teacher._pool.limits = replace(trainer.teacher._pool.limits, patience=20.0)  # its server still rests
    again = trainer if goes_on else make_trainer(tmp_path / "broken", served(server), max_steps=5, **LISTED)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(weights(again), weights(whole))
    for name in ("divergence", "num_tokens", "completions/mean_length"):
        assert values(again, name) == values(whole, name), name


def _fail_at_step(trainer: OPSDTrainer, server: FaultServer, step: int) -> None:
    """Let the server fail when it is first asked for rollouts of a step."""
    expect, begun = trainer.teacher.expect, list[int]()

    def failing(rollouts: Any) -> None:
        if trainer.state.global_step == step - 1 and not begun:
            begun.append(step)
            server.faults.extend(["503"] * 1000)
        expect(rollouts)

    trainer.teacher.expect = failing  # type: ignore[method-assign]


def test_an_evaluation_that_no_server_scores_ends_with_the_step_before_it(server: FaultServer, tmp_path: Path) -> None:
    rows = [{**row, "prompt": f"How much is it, number {number}?"} for number, row in enumerate(make_rows(4))]
    settings = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "eval_rows": Dataset.from_list(rows)}
    whole = trained(tmp_path / "whole", served(server), **settings)
    trainer = make_trainer(tmp_path / "broken", served(server, patience=0.3), **{**LISTED, **settings})
    expect = trainer.teacher.expect

    def failing(rollouts: Any) -> None:
        if not trainer.model.training:
            server.faults.extend(["503"] * 100)
        expect(rollouts)

    trainer.teacher.expect = failing  # type: ignore[method-assign]
    with pytest.raises(ServerError, match="has done 2 steps; checkpoint-2 is saved"):
        trainer.train()
    server.faults.clear()
    again = make_trainer(tmp_path / "broken", served(server), **{**LISTED, **settings})
    again.train(resume_from_checkpoint=True)
    assert torch.equal(weights(again), weights(whole))


def test_a_rollout_without_a_score_leaves_the_loss_and_is_counted(
    server: FaultServer, tmp_path: Path, capsys: Any
) -> None:
    teacher = served(server, on_failure="drop", patience=0.3)
    trainer = make_trainer(tmp_path, teacher, max_steps=3, **LISTED)
    server.faults.extend(["413", "", ""] * 100)  # it refuses some
    trainer.train()
    lost = values(trainer, "unscored")
    assert 0 < max(lost) < 1 and all(value == value for value in values(trainer, "divergence"))
    assert "a rollout is left out of the loss" in capsys.readouterr().out
    assert trainer.health.watch.verdicts["unscored"].level == "act"


def test_a_run_that_waits_goes_on_when_its_server_is_back(
    server: FaultServer, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opsd.teachers.served.REMINDS", 0.5)
    monkeypatch.setattr("opsd.training.loss.SLICE", 0.3)
    monkeypatch.setattr("opsd.serving.server.LONGEST_REST", 0.3)
    whole = trained(tmp_path / "whole", served(server), max_steps=2)
    trainer = make_trainer(tmp_path / "waits", served(server, on_failure="wait"), max_steps=2, **LISTED)
    _fail_at_step(trainer, server, 2)
    threading.Timer(4.0, server.faults.clear).start()
    trainer.train()
    assert torch.equal(weights(trainer), weights(whole))
    assert "teacher     waiting for a server: http" in capsys.readouterr().out


def test_no_step_is_trained_on_another_model(server: FaultServer, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, served(server, patience=0.3), max_steps=3, **LISTED)
    expect = trainer.teacher.expect

    def replaced(rollouts: Any) -> None:
        if trainer.state.global_step == 1:
            server.model = make_llama(6).eval()
        expect(rollouts)

    trainer.teacher.expect = replaced  # type: ignore[method-assign]
    with pytest.raises(ServerError, match=r"it is of another model.*checkpoint-1 is saved"):
        trainer.train()


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"support": "full", "support_k": 100}, "needs the teacher's whole distribution"),
        ({"support_k": 50}, "support_k is 50, and the teacher lists its 20"),
        ({"temperature": 0.7, "divergence_temperature": 0.7}, "temperature"),
    ],
)
def test_a_loss_that_needs_more_is_refused_before_anything_loads(
    tmp_path: Path, settings: dict[str, Any], match: str
) -> None:
    settings = {
        name: value for name, value in {**LISTED, **settings}.items() if name in OPSDConfig.__dataclass_fields__
    }
    teacher = ServedTeacher("http://127.0.0.1:9", top_k=TOP_K)
    with pytest.raises(ConfigError, match=match):
        OPSDTrainer("no/model", teacher, args=OPSDConfig(str(tmp_path), **settings), train_dataset=[{"prompt": "a"}])


def test_two_rollouts_that_are_the_same_are_scored_once(server: FaultServer) -> None:
    teacher = prepared(served(server), make_llama(0))
    rollouts = make_rollouts(2)
    rollouts = teacher.prompts.render(rollouts.select([1, 1, 0, 1]))
    before = server.asked["/v1/completions"]
    teacher.expect(rollouts)
    settled = teacher.settle(rollouts, 10.0)
    assert settled is not None and len(teacher.score(settled)) == settled.num_scorable
    assert server.asked["/v1/completions"] == before + 2 and not teacher._pending and not teacher._settled


def test_a_run_without_any_score_does_not_go_on(server: FaultServer, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, served(server, on_failure="drop", patience=0.2), max_steps=40, **LISTED)
    server.faults.extend(["413"] * 1000)
    with pytest.raises(ServerError, match="64 rollouts in a row have no score"):
        trainer.train()


def test_a_signal_ends_a_run_that_waits(server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opsd.training.loss.SLICE", 0.3)
    trainer = make_trainer(tmp_path, served(server, on_failure="wait"), max_steps=3, **LISTED)
    _fail_at_step(trainer, server, 2)
    threading.Timer(3.0, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(ServerError, match=r"told to stop while it waited.*checkpoint-1 is saved"):
        trainer.train()


def test_a_resumed_run_knows_another_model(server: FaultServer, tmp_path: Path) -> None:
    trained(tmp_path, served(server), max_steps=2, save_strategy="steps", save_steps=1)
    server.model = make_llama(6).eval()
    again = make_trainer(tmp_path, served(server), max_steps=3, allow_changes=["max_steps"], **LISTED)
    with pytest.raises(CheckpointError, match="another model than when the checkpoint was written"):
        again.train(resume_from_checkpoint=True)


def test_controls_that_imitate_take_its_samples(server: FaultServer, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, served(server), control="seq-kd", logging_steps=1, support="full", support_k=100)
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.teacher.noise == 0.0


def test_it_cannot_be_mixed() -> None:
    with pytest.raises(ConfigError, match="whole distribution"):
        MixtureTeacher([SameCheckpointTeacher(), ServedTeacher("http://127.0.0.1:9")], [0.5, 0.5])


@pytest.mark.parametrize(
    "settings", [{"top_k": 0}, {"top_k": 2.5}, {"on_failure": "pray"}, {"patience": -1}, {"url": []}, {"url": "gpu-1"}]
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ServedTeacher(**{"url": "http://a:1", **settings})


def test_its_address_may_change_in_a_resume_and_its_key_is_nowhere(
    server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPSD_API_KEY", "sk-secret")
    trained(tmp_path, served(server), max_steps=2, save_strategy="steps", save_steps=1)
    assert all(headers["Authorization"] == "Bearer sk-secret" for headers in server.headers)
    texts = [path.read_text("utf-8") for path in tmp_path.rglob("*") if path.suffix in (".json", ".md", ".jsonl")]
    assert len(texts) > 3 and not any("secret" in text for text in texts)
    assert json.loads((tmp_path / "run_card.json").read_text())["teacher"]["strategy"] == "served"
    with FaultServer(make_llama(5), make_tokenizer()) as moved:
        again = make_trainer(tmp_path, served(moved), max_steps=3, allow_changes=["max_steps"], **LISTED)
        again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    with pytest.raises(CheckpointError, match="top_k"):
        make_trainer(
            tmp_path, served(server, top_k=10), max_steps=3, **{**LISTED, "support_k": 10},
            allow_changes=["max_steps", "support_k"],
        ).train(resume_from_checkpoint=True)  # fmt: skip


def test_time_is_not_lost_where_training_has_other_work(server: FaultServer) -> None:
    """Two rollouts are scored while this process does something else."""
    teacher = prepared(served(server), make_llama(0))
    rollouts = teacher.prompts.render(make_rollouts())
    teacher.expect(rollouts)
    time.sleep(1.0)
    teacher.score(teacher.settle(rollouts, 10.0))
    assert teacher.metrics["served/hidden"] > 0.9
