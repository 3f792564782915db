"""Against a real vLLM server in float32: the numbers of the model in this process, and what it says of errors."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from vllm_server import MOST_TOKENS, PYTHON, TOP_K, VLLM

from opsd import OPSDConfig, OPSDTrainer
from opsd.cli import main
from opsd.commands.demo_tasks import arithmetic, packaged_model
from opsd.contexts.renderer import PromptRenderer
from opsd.errors import ConfigError, ServerError
from opsd.models.loading import load_model
from opsd.rollouts import Rollouts
from opsd.serving.store import ScoreStore
from opsd.signals import TopKSignal, as_list
from opsd.teachers import SameCheckpointTeacher, ServedTeacher, StudentHandle, Teacher

EXACT = 2e-4  # nats: float32 on both sides
LISTED: dict[str, Any] = {"support": "teacher_top_k", "support_k": TOP_K}


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLM]:
    if not PYTHON:
        pytest.skip("no vLLM: OPSD_VLLM is not set (make test-served sets it)")
    server = VLLM(tmp_path_factory.mktemp("vllm") / "server.log")
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def student() -> StudentHandle:
    model, tokenizer = load_model(packaged_model(), dtype="float32")
    return StudentHandle(model.eval(), PromptRenderer(tokenizer))


def served(vllm: VLLM, **settings: Any) -> ServedTeacher:
    return ServedTeacher(vllm.url, **{"top_k": TOP_K, "context": "answer_only", "patience": 60.0, **settings})


@pytest.fixture(scope="module")
def rollouts(student: StudentHandle) -> Rollouts:
    rows = arithmetic(12, 7)
    prompts = [student.renderer.ids(row["prompt"]) for row in rows]
    sampling: dict[str, Any] = {"max_new_tokens": 48, "batch_size": 12, "do_sample": True, "seed": 1}
    return Rollouts(rows, prompts, student.complete(prompts, **sampling))


def signal_of(teacher: Teacher, student: StudentHandle, rollouts: Rollouts) -> TopKSignal:
    teacher.prepare(student)
    rendered = teacher.prompts.render(rollouts)
    teacher.expect(rendered)
    with torch.no_grad():
        return as_list(teacher.score(rendered), torch.tensor(rollouts.scored_ids), TOP_K)


def test_its_scores_are_those_of_the_model_here(vllm: VLLM, student: StudentHandle, rollouts: Rollouts) -> None:
    here = signal_of(SameCheckpointTeacher(context="answer_only"), student, rollouts)
    there = signal_of(served(vllm), student, rollouts)
    assert len(here) == len(there) > 200
    assert (here.sampled_logprobs_N - there.sampled_logprobs_N).abs().max() < EXACT
    assert (here.logprobs_NK - there.logprobs_NK).abs().max() < EXACT
    assert (here.ids_NK == there.ids_NK).float().mean() > 0.99  # but for ties


def test_what_it_says_of_itself(vllm: VLLM, student: StudentHandle) -> None:
    teacher = served(vllm)
    teacher.prepare(student)
    facts = teacher.facts
    assert facts.model == "teacher" and facts.max_length == MOST_TOKENS - 1 and facts.compared_tokens
    assert facts.noise < EXACT and facts.source == packaged_model()
    assert 0 < teacher._drift.max() < EXACT and not teacher.cautions


def test_it_samples_as_the_model_does(vllm: VLLM, student: StudentHandle, rollouts: Rollouts) -> None:
    here, there = SameCheckpointTeacher(context="answer_only"), served(vllm)
    answers = []
    for teacher in (here, there):
        teacher.prepare(student)
        answers.append(teacher.sample(rollouts.rows, max_new_tokens=24, batch_size=12))
    same = sum(a == b for a, b in zip(*answers, strict=True))
    assert same >= len(rollouts) - 1  # a tie may fall otherwise
    warm = there.sample(rollouts.rows[:2], max_new_tokens=8, batch_size=2, do_sample=True, temperature=1.0, seed=3)
    assert warm == there.sample(rollouts.rows[:2], max_new_tokens=8, batch_size=2, do_sample=True, seed=3)


def args(folder: Path, **settings: Any) -> OPSDConfig:
    common = {
        "max_steps": 2, "per_device_train_batch_size": 4, "max_completion_length": 16, "learning_rate": 1e-5,
        "logging_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    return OPSDConfig(str(folder), **{**common, **LISTED, **settings})


def trained(folder: Path, teacher: Teacher, **settings: Any) -> list[float]:
    rows = Dataset.from_list(arithmetic(16, 3))
    trainer = OPSDTrainer(packaged_model(), teacher, args=args(folder, **settings), train_dataset=rows)
    trainer.train()
    return [entry["divergence"] for entry in trainer.state.log_history if "divergence" in entry]


def test_a_run_with_it_is_a_run_with_the_model_here(vllm: VLLM, tmp_path: Path) -> None:
    here = trained(tmp_path / "here", SameCheckpointTeacher(context="answer_only"))
    there = trained(tmp_path / "there", served(vllm))
    assert there == pytest.approx(here, abs=1e-3)


def test_a_run_waits_for_a_server_that_is_started_again(vllm: VLLM, tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", served(vllm), max_steps=3)
    teacher = served(vllm, on_failure="wait", read_timeout=20.0)
    expect, restarts = teacher.expect, list[threading.Thread]()

    def restarting(rollouts: Rollouts) -> None:
        if teacher._waited and not restarts:  # a step is done
            vllm.stop()
            restarts.append(threading.Thread(target=vllm.start))
            restarts[0].start()
        expect(rollouts)

    teacher.expect = restarting  # type: ignore[method-assign]
    assert trained(tmp_path / "again", teacher, max_steps=3) == pytest.approx(whole, abs=1e-3)
    restarts[0].join()


def test_what_it_does_not_grant_is_named_with_its_flag(vllm: VLLM, student: StudentHandle) -> None:
    with pytest.raises(
        ServerError, match=rf"max allowed: {TOP_K}.*--max-logprobs|--max-logprobs.*max allowed: {TOP_K}"
    ):
        served(vllm, top_k=TOP_K + 1).prepare(student)
    with pytest.raises(ConfigError, match="serves teacher, and not 'another'"):
        served(vllm, model="another").prepare(student)


def test_scores_for_later_come_from_it_too(vllm: VLLM, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({**row, "completion": "The answer is 7."}) + "\n" for row in arithmetic(6, 5)))
    teacher = tmp_path / "teacher.yaml"
    strategy = f"{{strategy: served, url: '{vllm.url}', top_k: {TOP_K}}}"
    teacher.write_text(f"about: served\nsource: here\nteacher: {strategy}\ncontext: answer_only\n")
    command = ["score", str(rows), "--model_name_or_path", packaged_model(), "--teacher", str(teacher), "--support"]
    assert main([*command, "teacher_top_k", "--support_k", str(TOP_K), "-o", str(tmp_path / "scores")]) == 0
    assert len(ScoreStore.open(tmp_path / "scores")) == 6
