"""Rollouts are compared with the student's entropy, and a run says so where they are not its own samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import make_llama, make_rows
from datasets import Dataset
from helpers import logged, make_args, make_trainer
from transformers import TemperatureLogitsWarper

from opsd import SameCheckpointTeacher
from opsd.errors import OPSDWarning
from opsd.training.metrics import LossRecords
from opsd.training.sampling_check import Agreement


def lines_of(folder: Path, capsys: pytest.CaptureFixture[str], **settings: Any) -> tuple[Any, str]:
    rows = Dataset.from_list(make_rows(64))
    trainer = make_trainer(
        folder, "ema", rows=rows, per_device_train_batch_size=8, max_completion_length=16, **settings
    )
    trainer.train()
    return trainer, capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 1.7}, {"lmbda": 0.5, "seq_kd": True}, {"bf16": True}, {"skip_first_tokens": 3}],
    ids=str,
)
def test_a_run_on_its_own_samples_says_nothing(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, out = lines_of(tmp_path, capsys, max_steps=4, **settings)
    assert "not the student's own distribution" not in out
    assert "not checked" not in out
    gaps = logged(trainer, "sampling_gap")
    assert len(gaps) == 4 and all(gaps) and abs(sum(gaps) / 4) < 0.3


def true_gap(model: Any, prompts: list[list[int]], completions: list[list[int]]) -> float:
    """The mean of −log p − H over all tokens of completions, from the definition."""
    values = []
    for prompt, ids in zip(prompts, completions, strict=True):
        with torch.no_grad():
            log_p = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        values += (-log_p.gather(-1, torch.tensor(ids)[:, None])[:, 0] + (log_p.exp() * log_p).sum(-1)).tolist()
    return sum(values) / len(values)


def colder(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model whose `generate` samples at another temperature than it is asked for."""
    original = model.generate

    def generate(*args: Any, logits_processor: Any = None, **kwargs: Any) -> Any:
        colder = [TemperatureLogitsWarper(0.3), *(logits_processor or [])]
        return original(*args, logits_processor=colder, **kwargs)

    monkeypatch.setattr(model, "generate", generate)
    return model


@pytest.mark.filterwarnings("ignore:lmbda is")
@pytest.mark.parametrize("lmbda", [1.0, 0.5, 0.25])
def test_the_metric_is_a_mean_over_the_students_own_tokens(
    lmbda: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens of others counted as 0: with lmbda 0.25 it was -0.855 in place of -1.80."""
    rows = Dataset.from_list([{**row, "completion": "It is 7."} for row in make_rows(16)])
    settings: dict[str, Any] = {"learning_rate": 0.0, "lmbda": lmbda, "logging_steps": 2, "max_completion_length": 8}
    settings |= {"per_device_train_batch_size": 4, "rows": rows}
    trainer, own = make_trainer(tmp_path, "ema", colder(make_llama(), monkeypatch), **settings), []
    sample = trainer._sample

    def listening(*args: Any) -> Any:
        rollouts = sample(*args)
        own.append(rollouts.select([n for n, is_own in enumerate(rollouts.on_policy) if is_own]))
        return rollouts

    monkeypatch.setattr(trainer, "_sample", listening)
    trainer.train()
    prompts = [list(ids) for rollouts in own for ids in rollouts.prompt_ids]
    completions = [list(ids) for rollouts in own for ids in rollouts.completion_ids]
    assert len(prompts) == 16 * lmbda
    expected = true_gap(trainer.student.model, prompts, completions)
    assert expected < -1 and logged(trainer, "sampling_gap") == [pytest.approx(expected, rel=1e-4)]


# Settings by which a healthy run has a gap that is not 0, and what the run says.
UNCHECKED: dict[str, dict[str, Any]] = {
    "mask_tokens": {"mask_tokens": ["="]},
    "mask_special_tokens": {"mask_special_tokens": True},
    "mask_truncated_completions": {
        "mask_truncated_completions": True,
        "generation_kwargs": {"eos_token_id": list(range(100, 300))},
    },
    "distill_on 'wrong'": {"distill_on": "wrong", "reward_funcs": ["exact"]},
    "a context that reads rollouts": {"teacher": "own_success", "reward_funcs": ["exact"], "num_generations": 2},
    "contrast_context": {"contrast_context": "worked_solution"},
    "lmbda is 0": {"lmbda": 0.0},
}


@pytest.mark.filterwarnings("ignore:lmbda is")
@pytest.mark.parametrize("cause", UNCHECKED)
def test_a_run_that_scores_no_fair_sample_says_that_nothing_is_checked(
    cause: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They said nothing; with mask_truncated_completions a healthy run logged a gap of -0.048, not -0.0007."""
    settings = {"teacher": "answer_only", **UNCHECKED[cause]}
    settings["teacher"] = SameCheckpointTeacher(context=settings["teacher"])
    rows = Dataset.from_list([{**row, "completion": "It is 7."} for row in make_rows(16)])
    trainer = make_trainer(tmp_path, rows=rows, **settings)
    trainer.train()
    out = capsys.readouterr().out
    assert out.count("sampling    not checked: ") == 1 and cause in out.partition("not checked: ")[2]
    assert not logged(trainer, "sampling_gap") and "not the student's own distribution" not in out


def test_a_contrast_is_checked_where_the_loss_sees_all_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"contrast_context": "worked_solution", "keep_fraction": 0.5}
    trainer, out = lines_of(tmp_path, capsys, student=colder(make_llama(), monkeypatch), **settings)
    assert "not checked" not in out and out.count("not the student's own distribution") == 1
    assert logged(trainer, "sampling_gap")[0] < -1


@pytest.mark.parametrize("settings", [{"min_p": 0.3}, {"top_k": 5}, {"top_p": 0.5}], ids=str)
def test_a_run_on_other_samples_says_so_once_and_why(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(OPSDWarning):
        trainer, out = lines_of(tmp_path, capsys, **settings)
    assert out.count("not the student's own distribution") == 1
    assert f"{next(iter(settings))} {next(iter(settings.values()))} reshape" in out
    assert abs(logged(trainer, "sampling_gap")[0]) > 0.3


def test_a_run_says_so_where_generate_and_the_forward_pass_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out = lines_of(tmp_path, capsys, student=colder(make_llama(), monkeypatch))
    assert "give different probabilities: its cache" in out


def test_tokens_of_others_and_tools_do_not_count(tmp_path: Path) -> None:
    from opsd.losses import LossOutput
    from opsd.rollouts import Rollouts
    from opsd.training.sampling_check import SamplingCheck

    rollouts = Rollouts(
        make_rows(2), [[1], [1]], [[5, 6, 7], [8, 9]], loss_mask=[[1, 0, 1], [1, 1]], on_policy=[True, False]
    )
    record = LossOutput(torch.zeros(()), torch.zeros(4), torch.full((4,), 2.0), {"logprob": torch.tensor([-3.0] * 4)})
    check = SamplingCheck(make_args(tmp_path), unchecked="", notify=print)
    metrics = check(record, rollouts).metrics
    assert metrics["sampling_gap"].tolist() == metrics["own_tokens"].tolist() == [1.0, 1.0, 0.0, 0.0]
    records = LossRecords()
    records.add(check(record, rollouts), rollouts)
    tallies = check.compare(records.tallies(Accelerator(cpu=True), step=1))
    assert check.agreement.tokens == 2 and tallies["sampling_gap"] == (2.0, 2.0, "mean")
    assert not tallies.keys() & {"own_tokens", "own_entropy", "own_variance"}


@pytest.mark.parametrize("spread", [0.5, 2.0, 5.0, 12.0])
@pytest.mark.parametrize("tokens", [8, 60, 500])
def test_samples_of_the_distribution_itself_agree_with_its_entropy(spread: float, tokens: int) -> None:
    """At an entropy near 0 the surprises that make up the mean are rare: a sample without one is no sign of a fault."""
    generator = torch.Generator().manual_seed(0)
    log_s = (spread * torch.randn(64, 200, generator=generator)).log_softmax(-1)
    entropy = -(log_s.exp() * log_s).sum(-1)
    for _ in range(50):
        rows = torch.randint(64, (tokens,), generator=generator)
        ids = torch.multinomial(log_s[rows].exp(), 1, generator=generator)
        agreement = Agreement.of(-log_s[rows].gather(-1, ids)[:, 0] - entropy[rows], entropy[rows])
        assert not agreement.differs, agreement.describe()
