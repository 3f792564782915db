"""Kill -9 at random moments, five times here and twenty in `make evidence`; see benchmarks/crashes.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_llama
from helpers import MAKE_TEACHER, make_trainer

from opsd.training import checkpoints

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "crashes.py"


@pytest.mark.slow
def test_a_run_that_was_killed_arrives_at_the_same_bits() -> None:
    """Also where the kill fell into the writing of a checkpoint, or of a file of the evaluation."""
    done = subprocess.run([sys.executable, str(SCRIPT), "--kills", "5"], capture_output=True, text=True, timeout=480)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    cases = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(cases) == 5 and sum(case["killed"] for case in cases) >= 3
    assert any(case["it_was_unfinished"] for case in cases)
    assert any(case["killed"] and case["when"] == "in an evaluation file" for case in cases)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_trainer(folder, MAKE_TEACHER["ema"](), max_steps=1, save_strategy="steps", save_steps=1).train()
    return folder / "checkpoint-1"


FILES = ("opsd_teacher.safetensors", "opsd_teacher.json", "model.safetensors", "config.json", "optimizer.pt",
         "scheduler.pt", "rng_state.pth", "trainer_state.json")  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_a_file_that_was_cut_short_is_noticed(whole: Path, name: str, share: float) -> None:
    path, content = whole / name, (whole / name).read_bytes()
    assert checkpoints.problem(whole) is None
    try:
        path.write_bytes(content[: int(len(content) * share)])
        assert checkpoints.problem(whole) == f"its {name} is cut short"
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("name", [name for name in FILES if name != "config.json"])
def test_a_file_that_is_missing_is_noticed(whole: Path, name: str) -> None:
    path, content = whole / name, (whole / name).read_bytes()
    path.unlink()
    try:
        assert name in (checkpoints.problem(whole) or "")
    finally:
        path.write_bytes(content)


def test_a_checkpoint_that_is_written_again_is_not_whole_until_it_is_done(tmp_path: Path) -> None:
    """Resumed from before it, killed while it writes: old files beside new ones must not pass for a checkpoint."""
    make_llama().save_pretrained(tmp_path)
    (tmp_path / "trainer_state.json").write_text("{}")
    checkpoints.write(tmp_path, {}, {})
    assert not (tmp_path / "trainer_state.json").exists()


def test_a_teachers_state_of_another_step_is_refused(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    for path in whole.iterdir():
        (tmp_path / "checkpoint-2" / path.name).write_bytes(path.read_bytes())
    trainer = make_trainer(tmp_path, MAKE_TEACHER["ema"](), max_steps=3)
    with pytest.raises(checkpoints.CheckpointError, match="is of step 1"):
        trainer.train(resume_from_checkpoint=True)
