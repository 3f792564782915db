"""A divergence that a user adds with a function and a row of the table: exact on every support, and it trains."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import changed, logged, make_args, make_trainer, snapshot
from losses_cases import name_of, of_logits, random
from losses_twin import measured
from torch import Tensor

from opsd import SameCheckpointTeacher
from opsd.errors import ConfigError, OPSDWarning
from opsd.losses import Divergence, Objective
from opsd.losses.pointwise import DIVERGENCES, PointwiseDivergence, PointwiseTerms


# What a user writes: the terms of an alpha-divergence, whose alpha is `beta`, and its row. Ten lines.
def alpha_divergence(log_s: Tensor, s: Tensor, log_t: Tensor, beta: float) -> PointwiseTerms:
    t, both = log_t.exp(), (beta * log_s + (1 - beta) * log_t).exp()
    return PointwiseTerms((beta * s + (1 - beta) * t - both) / (beta * (1 - beta)), (s - both) / (1 - beta))


ROW = PointwiseDivergence(
    alpha_divergence,
    description="alpha-divergence (α = {beta:g})",
    formula="[{beta:g}·s(v) + {rest:g}·t(v) − s(v)^{beta:g}·t(v)^{rest:g}] / ({beta:g}·{rest:g})",
    uses_beta=True,
)


@pytest.fixture(autouse=True)
def row(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(DIVERGENCES, "alpha", ROW)
    yield


def by_definition(student: Tensor, teacher: Tensor, alpha: float, top_k: int | None, clip: float) -> Tensor:
    """(1 - Σ s^α·t^(1-α)) / (α(1-α)) of each token, over the teacher's `top_k` tokens and one bucket, in float64."""
    s, t = student.softmax(-1), teacher.softmax(-1)
    if top_k is not None:
        ids = t.topk(top_k).indices
        s, t = (torch.cat([p.gather(1, ids), 1 - p.gather(1, ids).sum(1, keepdim=True)], 1) for p in (s, t))
    terms = (alpha * s + (1 - alpha) * t - s**alpha * t ** (1 - alpha)) / (alpha * (1 - alpha))
    return terms.clamp(max=clip).sum(-1)


SETTINGS = [
    {"beta": 0.5},
    {"beta": 0.2, "temperature": 1.5},
    {"beta": 0.7, "support": "teacher_top_k", "support_k": 4},
    {"beta": 0.5, "support": "teacher_top_k", "support_k": 1},
    {"beta": 0.5, "entry_clip": 0.02},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("spread", [0.3, 4.0])
def test_value_and_gradient_equal_autograd_over_the_definition(settings: dict, spread: float) -> None:
    student, teacher = (spread * random(7, 11, seed=seed) for seed in (1, 2))
    divergence = Divergence(divergence="alpha", **settings)
    result = measured(Objective(divergence), of_logits(student, teacher))
    leaf = student.clone().requires_grad_()
    top_k = divergence.support_k if divergence.support == "teacher_top_k" else None
    temperature = divergence.temperature
    clip = divergence.entry_clip or math.inf
    expected = by_definition(leaf / temperature, teacher / temperature, divergence.beta, top_k, clip)
    expected.sum().backward()
    assert leaf.grad is not None
    assert torch.allclose(result.values["divergence"].double(), expected.detach(), atol=1e-6)
    assert torch.allclose(result.gradients["states"], leaf.grad, atol=1e-9)


@pytest.mark.parametrize("settings", SETTINGS[:3], ids=str)
def test_equal_sides_have_no_gradient(settings: dict) -> None:
    logits = random(5, 9, seed=3)
    result = measured(Objective(Divergence(divergence="alpha", **settings)), of_logits(logits, logits))
    assert result.gradients["states"].abs().max() < 1e-15


def test_half_is_four_times_the_squared_hellinger_distance_worked_by_hand() -> None:
    """s = (1/2, 1/2), t = (4/5, 1/5): Σ √(s·t) = √0.4 + √0.1."""
    case = of_logits([[0.0, 0.0]], [[math.log(4.0), 0.0]])
    result = measured(Objective(Divergence(0.5, divergence="alpha")), case)
    assert result.values["loss"].item() == pytest.approx(4 * (1 - math.sqrt(0.4) - math.sqrt(0.1)))


SUPPORTS = {"full": {}, "top-k with a bucket": {"support": "teacher_top_k", "support_k": 5}}


@pytest.mark.parametrize("settings", SUPPORTS.values(), ids=SUPPORTS)
def test_two_steps_of_training_on_it(tmp_path: Path, settings: dict, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = SameCheckpointTeacher(context="answer_only")
    trainer = make_trainer(tmp_path, teacher, divergence="alpha", beta=0.5, max_steps=2, **settings)
    before = snapshot(trainer.model)
    trainer.train()
    assert "alpha-divergence (α = 0.5)" in capsys.readouterr().out
    assert len(logged(trainer, "divergence")) == 2 and all(0 < value < 4 for value in logged(trainer, "divergence"))
    assert changed(trainer, before)


@pytest.mark.parametrize(
    "settings",
    [{"support": "sampled"}, {"entropy_gate": 1.0}, {"support": "union", "tail": "none"}],
    ids=str,
)
def test_what_is_known_of_the_reverse_kl_alone_is_refused_for_a_new_row(settings: dict) -> None:
    with pytest.raises(ConfigError):
        Divergence(0.5, divergence="alpha", **settings)


def test_a_beta_that_nothing_uses_warns(tmp_path: Path) -> None:
    with pytest.warns(OPSDWarning, match="beta has no effect"):
        make_args(tmp_path, divergence="reverse_kl", beta=0.5)


def test_the_example_in_the_documentation_of_the_table_adds_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    example = (PointwiseDivergence.__doc__ or "").split("::\n")[1]
    monkeypatch.setitem(DIVERGENCES, "hellinger", ROW)  # taken out again after the test
    exec("\n".join(line[12:] for line in example.splitlines()), {})
    divergence = Divergence(divergence="hellinger")
    assert name_of(divergence) == "divergence=hellinger"
    case = of_logits([[0.0, 0.0]], [[math.log(4.0), 0.0]])
    result = measured(Objective(divergence), case).values["loss"].item()
    assert result == pytest.approx(1 - math.sqrt(0.4) - math.sqrt(0.1))
