"""What a person sees while a run trains: compact lines, a bar on a terminal, and everything in full in the log."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from conftest import make_rows
from datasets import Dataset
from helpers import logged, make_trainer
from rich.console import Console

from opsd.health.rollout import TracedRollout
from opsd.training.display import line_of, rollout_text

ENTRY = {
    "loss": 0.107, "grad_norm": 3.1, "learning_rate": 1e-5, "num_tokens": 4000, "entropy": 2.22, "step_time": 3.71,
    "completions/mean_length": 15.5, "completions/clipped_ratio": 0.62, "divergence": 0.107, "divergence/max": 1.41,
    "epoch": 0.1,
}  # fmt: skip
LINES = {
    "training": (ENTRY, "step 3/6  KL 0.107 (max 1.4)  entropy 2.22  length 15.5, 62% cut  lr 1.0e-05  3.7 s"),
    "rewards": ({"divergence": 0.5, "reward": 0.25}, "step 3/6  KL 0.500  reward 0.25"),
    "a control without a divergence": ({"loss": 1.25}, "step 3/6  loss 1.250"),
    "looks": ({"eval_accuracy": 0.4, "eval_length": 9.0}, "step 3/6  evaluation  accuracy 40.0% (selection)  length 9"),
    "end": ({"train_runtime": 3723.4, "train_loss": 0.2}, "done        3 steps in 1 h 2 min"),
}  # fmt: skip


@pytest.mark.parametrize("case", LINES)
def test_an_entry_is_one_line(case: str) -> None:
    logs, line = LINES[case]
    assert line_of(logs, 3, 6, "KL") == line


def test_a_narrow_terminal_loses_the_learning_rate_first() -> None:
    assert line_of(ENTRY, 3, 6, "reverse KL", width=80) == (
        "step 3/6  reverse KL 0.107 (max 1.4)  entropy 2.22  length 15.5, 62% cut  3.7 s"
    )
    assert "lr" in line_of(ENTRY, 3, 6, "KL", width=120)
    assert (
        line_of(ENTRY, 3, 400, "reverse KL", width=60) == "step   3/400  reverse KL 0.107  length 15.5, 62% cut  3.7 s"
    )


def test_a_run_prints_a_line_per_entry_and_logs_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It printed a dict of 17 keys in six wrapped lines."""
    trainer = make_trainer(tmp_path, "ema", max_steps=4, logging_steps=2)
    trainer.train()
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("step ")]
    assert [line.partition("  ")[0] for line in lines] == ["step 2/4", "step 4/4"]
    assert all("reverse KL" in line and "length" in line for line in lines) and "{" not in out
    assert len(logged(trainer, "grad_norm")) == len(logged(trainer, "completions/max_length")) == 2


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_a_terminal_has_a_bar_that_is_gone_at_the_end(disable_tqdm: bool, tmp_path: Path) -> None:
    terminal = io.StringIO()
    trainer = make_trainer(tmp_path, "ema", max_steps=3, disable_tqdm=disable_tqdm)
    trainer.display._console = Console(file=terminal, force_terminal=True, width=80)
    trainer.train()
    assert ("3/3" in terminal.getvalue()) is not disable_tqdm
    assert trainer.display._bar is None


def test_a_run_that_fails_takes_its_bar_away(tmp_path: Path) -> None:
    rows = Dataset.from_list(make_rows(8))
    trainer = make_trainer(tmp_path, "ema", rows=rows, max_steps=3, disable_tqdm=False)
    trainer.display._console = Console(file=io.StringIO(), force_terminal=True)
    trainer._compute_loss = None  # type: ignore[assignment, method-assign]
    with pytest.raises(TypeError):
        trainer.train()
    assert trainer.display._bar is None


ROLLOUT = TracedRollout(
    step=1, prompt="What is 3 + 4?", context="What is 3 + 4?\nThe answer is 7.", ids=[4, 5, 6, 7],
    tokens=["It", " is", "\n7", "\x1b[2J"], text="It is\n7", divergence=[0.1, 0.1, 3.0, 0.2], entropy=[1.0] * 4,
    logprob=[-1.0] * 4, teacher_logprob=[-1.0] * 4, reward=1.0,
)  # fmt: skip


def test_a_rollout_is_shown_with_both_prompts_and_the_tokens_that_carried_the_loss() -> None:
    """Text of a model is data: an escape sequence clears no screen."""
    shown = rollout_text(ROLLOUT).plain
    assert "'What is 3 + 4?'" in shown and "The answer is 7." in shown
    assert "It is‹⏎7›\\x1b[2J" in shown and "1 of 4 tokens carry 88% of 3.40 nats; reward 1" in shown


def test_log_completions_shows_a_rollout_per_entry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(tmp_path, "ema", max_steps=4, logging_steps=2, log_completions=True)
    trainer.display._console = Console(width=200)
    trainer.train()
    assert capsys.readouterr().out.count(" tokens carry ") == 2
