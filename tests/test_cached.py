"""Rollouts, their scores in a folder, and a teacher that trains from these: as the teacher that scored them would."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_llama, make_rows, make_tokenizer
from datasets import Dataset
from helpers import make_trainer

from opsd.cli import main
from opsd.doctor import examine
from opsd.errors import CheckpointError, ConfigError, DataError
from opsd.serving.answers import Asked, TokenScores
from opsd.serving.store import ScoreStore, megabytes
from opsd.teachers import CachedTeacher, RoutedTeacher, SiblingTeacher

TOP_K = 20
pytestmark = pytest.mark.filterwarnings("ignore:lmbda is 0")  # which is what such a teacher needs


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A student and a teacher."""
    folders = tmp_path_factory.mktemp("student"), tmp_path_factory.mktemp("teacher")
    for seed, folder in zip((0, 5), folders, strict=True):
        make_llama(seed).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    return folders


@pytest.fixture(scope="module")
def rollouts(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rollouts")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(5)))
    command = ["rollout", str(folder / "rows.jsonl"), "--model_name_or_path", str(models[0]), "-o"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opsd.commands.rollout.ROWS", 4)
        command += [str(folder / "r.jsonl"), "--samples", "2", "--max_completion_length", "6"]
        assert main(command) == 0
    return folder / "r.jsonl"


def score_command(rollouts: Path, models: tuple[Path, Path], folder: Path, context: str = "answer_only") -> list[str]:
    given = ["--model_name_or_path", str(models[0]), "--teacher", str(models[1]), "--context", context]
    listed = ["--support", "teacher_top_k", "--support_k", str(TOP_K), "--bf16", "false"]
    return ["score", str(rollouts), *given, *listed, "-o", str(folder)]


@pytest.fixture(scope="module")
def scores(rollouts: Path, models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scores") / "of_teacher"
    assert main(score_command(rollouts, models, folder)) == 0
    return folder


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rollouts_are_rows_with_completions_and_go_on_where_they_stopped(
    rollouts: Path, models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    rows = read(rollouts)
    assert len(rows) == 10 and all(1 <= len(row["completion_ids"]) <= 6 and row["answer"] for row in rows)
    assert rows[0]["completion_ids"] != rows[1]["completion_ids"]
    # A file that broke off is gone on with, and becomes the same.
    broken = tmp_path / "r.jsonl"
    shutil.copy(rollouts.with_suffix(".settings.json"), tmp_path)
    lines = rollouts.read_bytes().splitlines(keepends=True)
    broken.write_bytes(b"".join(lines[:6]) + lines[6][:20])
    monkeypatch.setattr("opsd.commands.rollout.ROWS", 4)
    command = ["rollout", str(rollouts.parent / "rows.jsonl"), "--model_name_or_path", str(models[0]), "-o"]
    command += [str(broken), "--samples", "2", "--max_completion_length", "6"]
    assert main(command) == 0 and broken.read_bytes() == rollouts.read_bytes()
    assert main(command) == 0 and broken.read_bytes() == rollouts.read_bytes()  # nothing is left to do
    assert main([*command, "--temperature", "0.5"]) == 2 and "of another temperature" in capsys.readouterr().err
    assert broken.read_bytes() == rollouts.read_bytes()


def test_training_from_scores_is_training_with_the_teacher(
    rollouts: Path, scores: Path, models: tuple[Path, Path], tmp_path: Path
) -> None:
    def trained(name: str, teacher: Any) -> Any:
        trainer = make_trainer(
            tmp_path / name, teacher, rows=Dataset.from_list(read(rollouts)), lmbda=0.0, max_steps=3,
            support="teacher_top_k", support_k=TOP_K,
        )  # fmt: skip
        trainer.train()
        return trainer

    here = trained("teacher", SiblingTeacher(str(models[1]), context="answer_only"))
    there = trained("scores", CachedTeacher(scores))
    assert there.teacher.describe().endswith(f"frozen: {models[1]}; its context: answer_only")
    losses = [
        [entry["divergence"] for entry in each.state.log_history if "divergence" in entry] for each in (here, there)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    for a, b in zip(here.model.parameters(), there.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_scoring_goes_on_behind_the_last_shard(
    rollouts: Path,
    scores: Path,
    models: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    monkeypatch.setattr("opsd.commands.score_store.ROWS", 3)
    assert main(score_command(rollouts, models, tmp_path / "s")) == 0
    assert "10 rollouts, " in capsys.readouterr().out
    (tmp_path / "s" / "scores-000001.parquet").unlink()
    assert len(ScoreStore.open(tmp_path / "s")) == 7
    before = (tmp_path / "s" / "scores-000000.parquet").stat().st_mtime_ns
    assert main(score_command(rollouts, models, tmp_path / "s")) == 0
    assert len(ScoreStore.open(tmp_path / "s")) == 10
    assert (tmp_path / "s" / "scores-000000.parquet").stat().st_mtime_ns == before
    assert main(score_command(rollouts, models, tmp_path / "s", "worked_solution")) == 2
    assert "has scores of another" in capsys.readouterr().err


def test_a_selection_of_tokens_finds_the_scores_of_whole_completions(
    rollouts: Path, scores: Path, tmp_path: Path
) -> None:
    listed: dict[str, Any] = {"support": "teacher_top_k", "support_k": TOP_K, "first_tokens_only": 2}
    trainer = make_trainer(tmp_path, CachedTeacher(scores), rows=Dataset.from_list(read(rollouts)), lmbda=0.0, **listed)
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.state.log_history[0]["divergence"] > 0


def test_what_was_not_scored_is_refused(rollouts: Path, scores: Path, tmp_path: Path) -> None:
    listed: dict[str, Any] = {"support": "teacher_top_k", "support_k": TOP_K}
    with pytest.raises(ConfigError, match="lmbda: 0"):
        make_trainer(tmp_path, CachedTeacher(scores), **listed)
    rows = read(rollouts)
    rows[0]["completion_ids"] = [7, 7, 7]
    trainer = make_trainer(tmp_path, CachedTeacher(scores), rows=Dataset.from_list(rows[:4]), lmbda=0.0, **listed)
    with pytest.raises(DataError, match="has no scores of a rollout"):
        trainer.train()
    make_trainer(
        tmp_path, CachedTeacher(scores, context="answer_only"), lmbda=0.0, rows=Dataset.from_list(rows), **listed
    )
    for teacher in (
        CachedTeacher(scores, context="worked_solution"),
        RoutedTeacher(
            "domain", {"even": CachedTeacher(scores), "odd": CachedTeacher(scores)}, context="worked_solution"
        ),
    ):
        with pytest.raises(ConfigError, match="computed with the context 'answer_only'"):
            make_trainer(tmp_path, teacher, lmbda=0.0, rows=Dataset.from_list(rows), **listed).train()
    with pytest.raises(ConfigError, match="contrast_context"):
        make_trainer(tmp_path, CachedTeacher(scores), lmbda=0.0, contrast_context="wrong_answer", **listed)
    with pytest.raises(CheckpointError, match="has no scores"):
        CachedTeacher(tmp_path / "nothing")


def test_rows_without_completions_and_several_teachers_are_refused_by_a_folder(
    rollouts: Path, models: tuple[Path, Path], tmp_path: Path, capsys: Any
) -> None:
    assert main(score_command(rollouts.parent / "rows.jsonl", models, tmp_path / "s")) == 2
    assert "opsd rollout" in capsys.readouterr().err
    command = score_command(rollouts, models, tmp_path / "s")
    assert main([*command, "--html", str(tmp_path / "x.html")]) == 2


def test_the_doctor_examines_the_rollouts_that_were_scored(rollouts: Path, scores: Path, tmp_path: Path) -> None:
    listed: dict[str, Any] = {"support": "teacher_top_k", "support_k": TOP_K}
    trainer = make_trainer(tmp_path, CachedTeacher(scores), rows=Dataset.from_list(read(rollouts)), lmbda=0.0, **listed)
    examined = examine(trainer, rows=6).findings
    assert not [finding for finding in examined if finding.status == "fail"], examined
    findings = {finding.check: finding for finding in reversed(examined)}
    assert findings["divergence"].status == "pass" and findings["alignment"].figures["tokens"] > 6
    assert findings["sampling"].status == "skip" and "own completions" in findings["sampling"].saw


# ---- the store -------------------------------------------------------------------------------------------------------


def some_scores(count: int, seed: int = 0) -> list[tuple[Asked, TokenScores]]:
    draw = np.random.default_rng(seed)
    found = []
    for number in range(count):
        tokens = int(draw.integers(0, 9))
        asked = Asked((number, *draw.integers(0, 400, 3 + tokens).tolist()), 4)
        found.append(
            (
                asked,
                TokenScores(
                    draw.integers(0, 400, (tokens, 3)), draw.normal(size=(tokens, 3)).astype(np.float32),
                    draw.normal(size=tokens).astype(np.float32),
                ),
            )
        )  # fmt: skip
    return found


def test_a_store_gives_back_what_it_was_given(tmp_path: Path) -> None:
    given = some_scores(100)
    store = ScoreStore.begin(tmp_path, {"top_k": 3})
    for start in range(0, 100, 40):
        store.write(given[start : start + 40])
    for each in (store, ScoreStore.open(tmp_path)):
        assert len(each) == 100 and Asked((9, 9), 1) not in each and each.find(Asked((9, 9), 1)) is None
        for asked, scores in given:
            found = each.find(asked)
            assert found is not None
            assert all(np.array_equal(getattr(found, name), getattr(scores, name)) for name in vars(scores))


def test_where_scoring_begins_is_part_of_what_was_asked(tmp_path: Path) -> None:
    ((asked, scores),) = some_scores(1)
    store = ScoreStore.begin(tmp_path, {"top_k": 3})
    store.write([(asked, scores)])
    assert Asked(asked.ids, asked.start - 1) not in store


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    store = ScoreStore.begin(tmp_path, {"top_k": 3})
    store.write(some_scores(3))
    (tmp_path / "scores-000000.parquet").write_bytes(b"half")
    with pytest.raises(CheckpointError, match=r"scores-000000\.parquet are damaged"):
        ScoreStore.open(tmp_path)


def test_what_a_million_tokens_take_is_known_before() -> None:
    assert megabytes(10**6, 100) == 804.0


# ---- serving ---------------------------------------------------------------------------------------------------------


def test_the_command_that_serves_is_printed(capsys: Any) -> None:
    assert main(["serve", "a/model", "--top_k", "64", "--max_length", "4096", "--cpu"]) == 0
    out = capsys.readouterr().out
    for part in ("vllm.entrypoints.openai.api_server --model a/model", "--max-logprobs 64", "--max-model-len 4096"):
        assert part in out
    assert out.startswith("VLLM_CPU_KVCACHE_SPACE=") and "--logprobs-mode raw_logprobs" in out
    assert main(["serve", "a/model", "--top_k", "0"]) == 2
    assert main(["serve", "a/model", "--exec"]) == 2 and "not installed here" in capsys.readouterr().err
