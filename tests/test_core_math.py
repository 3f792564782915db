"""The scripts of examples/core_math: they run, they print what their README says, their mathematics holds, and the
library's losses agree with them.

The scripts are the slow twin here: float64, written from the definitions, importing nothing of the library.
Shapes: `N` tokens, `V` vocabulary.
"""

from __future__ import annotations

import ast
import importlib.util
import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

if TYPE_CHECKING:
    from opsd.losses import LossOutput

FOLDER = Path(__file__).parents[1] / "examples" / "core_math"
KEY_LINES = {
    "reverse_kl": "5 tokens give 5 signals, one for each.",
    "generalised_jsd": "forward KL(teacher||student) = 0.899775: what loss/(beta(1-beta)) tends to as beta -> 0.",
    "lmbda_mix": " 0.30                  1 1 1 1 2 1 1 1 1 2           0.250   0.300   0.300",
    "dense_vs_sparse": "       1               1                1                1",
}
BETAS = [0.0, 0.001, 0.05, 0.3, 0.5, 0.7, 0.95, 0.999, 1.0]


def load(name: str) -> ModuleType:
    """Import a script from its path; the scripts import each other as they do when run: from their own folder."""
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(FOLDER))


kl_script, jsd_script, mix_script, dense_script = (load(name) for name in KEY_LINES)


def random_logits(tokens: int, vocabulary: int, seed: int, scale: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=scale, size=(tokens, vocabulary))


@st.composite
def pairs(draw: st.DrawFn, size: float = 6.0) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of student and teacher for 1 to 5 tokens over 2 to 7 entries."""
    shape = (draw(st.integers(1, 5)), draw(st.integers(2, 7)))
    logits = arrays(np.float64, shape, elements=st.floats(-size, size))
    return kl_script.log_softmax(draw(logits)), kl_script.log_softmax(draw(logits))


# ---------------------------------------------------------------------------------------------------- the scripts run


@pytest.mark.parametrize("name", KEY_LINES)
def test_script_runs_and_prints_what_its_readme_shows(name: str) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", f"examples/core_math/{name}.py"],
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={"PYTHONUTF8": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert KEY_LINES[name] in run.stdout.splitlines()
    assert f"$ python examples/core_math/{name}.py\n{run.stdout}```" in (FOLDER / "README.md").read_text("utf-8")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_script_is_short_and_needs_numpy_only(path: Path) -> None:
    source = path.read_text("utf-8")
    tree = ast.walk(ast.parse(source))
    imported = {
        (alias.name if isinstance(node, ast.Import) else str(node.module)).split(".")[0]
        for node in tree
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported - set(sys.stdlib_module_names) - {p.stem for p in FOLDER.glob("*.py")} == {"numpy"}
    assert len(source.splitlines()) < 90


# -------------------------------------------------------------------------------------------------------- reverse KL


@settings(max_examples=100, deadline=None)
@given(pairs())
def test_reverse_kl_is_non_negative_and_zero_only_if_equal(pair: tuple[np.ndarray, np.ndarray]) -> None:
    """Pinsker's inequality says both at once: KL is at least half the squared L1 distance."""
    student, teacher = pair
    distance_N = np.abs(np.exp(student) - np.exp(teacher)).sum(axis=-1)
    assert np.all(kl_script.reverse_kl(student, teacher) >= 0.5 * distance_N**2 - 1e-12)
    assert np.all(kl_script.reverse_kl(student, student) == 0.0)


def test_reverse_kl_is_asymmetric_and_names_the_student_first() -> None:
    """Worked by hand: 0.5 ln(0.5/0.9) + 0.5 ln(0.5/0.1), against 0.9 ln(0.9/0.5) + 0.1 ln(0.1/0.5)."""
    student, teacher = kl_script.log_probs([0.5, 0.5]), kl_script.log_probs([0.9, 0.1])
    assert kl_script.reverse_kl(student, teacher) == pytest.approx(math.log(5 / 3), abs=1e-12)
    assert kl_script.forward_kl(student, teacher) == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), abs=1e-12)


def test_reverse_kl_blows_up_only_where_the_teacher_has_no_mass_and_the_student_has() -> None:
    masses = [10.0**-k for k in range(1, 13)]
    student = kl_script.log_probs([0.5, 0.5])
    losses = [float(kl_script.reverse_kl(student, kl_script.log_probs([1 - m, m]))) for m in masses]
    assert np.diff(losses)[-1] == pytest.approx(0.5 * math.log(10), abs=1e-6), "each decade adds student mass x ln 10"
    ruled_out = kl_script.log_probs([1.0, 0.0])
    assert kl_script.reverse_kl(student, ruled_out) == math.inf
    assert kl_script.forward_kl(student, ruled_out) == pytest.approx(math.log(2))
    assert kl_script.reverse_kl(ruled_out, ruled_out) == 0.0


@pytest.mark.parametrize("tokens", [1, 3, 31])
def test_reverse_kl_gives_one_signal_per_token(tokens: int) -> None:
    """Each signal depends on its own token alone."""
    student, teacher = (kl_script.log_softmax(random_logits(tokens, 7, seed)) for seed in (0, 1))
    signals = kl_script.reverse_kl(student, teacher)
    assert signals.shape == (tokens,)
    alone = [kl_script.reverse_kl(student[n : n + 1], teacher[n : n + 1])[0] for n in range(tokens)]
    np.testing.assert_allclose(signals, alone, rtol=1e-13)


# --------------------------------------------------------------------------------------------------- generalised JSD


@settings(max_examples=100, deadline=None)
@given(pairs(), st.floats(0.0, 1.0))
def test_jsd_is_finite_non_negative_bounded_and_zero_for_equal_sides(
    pair: tuple[np.ndarray, np.ndarray], beta: float
) -> None:
    student, teacher = pair
    loss_N = jsd_script.generalised_jsd(student, teacher, beta)
    assert np.all(np.isfinite(loss_N)) and np.all(loss_N >= -1e-12)
    np.testing.assert_allclose(jsd_script.generalised_jsd(student, student, beta), 0.0, atol=1e-12)
    if 0.0 < beta < 1.0:
        coin = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
        assert np.all(loss_N <= coin + 1e-12) and coin <= math.log(2) + 1e-12


@settings(max_examples=50, deadline=None)
@given(pairs(size=2.0))
def test_scaled_jsd_tends_to_forward_kl_at_0_and_to_reverse_kl_at_1(pair: tuple[np.ndarray, np.ndarray]) -> None:
    """The JSD itself tends to 0 at both ends; at exactly 0 and 1 it is the full KL by convention."""
    student, teacher = pair
    forward, reverse = kl_script.kl(teacher, student), kl_script.kl(student, teacher)
    for beta, limit in ((1e-8, forward), (1 - 1e-8, reverse)):
        near = jsd_script.generalised_jsd(student, teacher, beta)
        np.testing.assert_allclose(near, 0.0, atol=1e-6)
        np.testing.assert_allclose(near / (beta * (1 - beta)), limit, atol=1e-4)
    np.testing.assert_array_equal(jsd_script.generalised_jsd(student, teacher, 0.0), forward)
    np.testing.assert_array_equal(jsd_script.generalised_jsd(student, teacher, 1.0), reverse)


def test_jsd_reaches_ln_2_at_the_midpoint_without_a_common_token() -> None:
    here, there = kl_script.log_probs([1.0, 0.0]), kl_script.log_probs([0.0, 1.0])
    assert jsd_script.generalised_jsd(here, there, 0.5) == pytest.approx(math.log(2), abs=1e-12)


@pytest.mark.parametrize("beta", [-1e-9, 1.0 + 1e-9, math.nan])
def test_jsd_refuses_beta_outside_its_range(beta: float) -> None:
    with pytest.raises(ValueError, match=r"within \[0, 1\]"):
        jsd_script.generalised_jsd(np.zeros((1, 1)), np.zeros((1, 1)), beta)


# -------------------------------------------------------------------------------------------------------------- lmbda


@settings(max_examples=50, deadline=None)
@given(arrays(np.float64, (2, 5), elements=st.floats(0, 10)), st.floats(0.0, 1.0))
def test_lmbda_is_a_convex_mix(losses: np.ndarray, lmbda: float) -> None:
    on_policy, off_policy = losses
    mixed = mix_script.expected_loss(on_policy, off_policy, lmbda)
    low, high = sorted((on_policy.mean(), off_policy.mean()))
    assert low - 1e-12 <= mixed <= high + 1e-12
    assert mixed == pytest.approx(off_policy.mean() + lmbda * (on_policy.mean() - off_policy.mean()), abs=1e-12)


def test_lmbda_1_is_on_policy_and_0_is_off_policy() -> None:
    on_policy, off_policy, rng = np.array([1.0, 2.0]), np.array([5.0, 7.0]), np.random.default_rng(0)
    for lmbda, rows in ((1.0, on_policy), (0.0, off_policy)):
        assert mix_script.expected_loss(on_policy, off_policy, lmbda) == rows.mean()
        assert mix_script.sampled_loss(on_policy, off_policy, lmbda, rng) == rows.mean()
        assert mix_script.on_policy_counts(lmbda, 3, 4) == [3 * int(lmbda)] * 4


@pytest.mark.parametrize("lmbda", [0.1, 0.37, 0.5, 0.9])
def test_monte_carlo_twin_agrees_in_expectation(lmbda: float) -> None:
    rng = np.random.default_rng(0)
    on_policy, off_policy = rng.gamma(2.0, 0.2, size=8), rng.gamma(2.0, 0.6, size=8)
    draws = np.array([mix_script.sampled_loss(on_policy, off_policy, lmbda, rng) for _ in range(4000)])
    error = draws.std() / math.sqrt(len(draws))
    assert error > 0.0, "a twin that throws no coin proves nothing"
    assert abs(draws.mean() - mix_script.expected_loss(on_policy, off_policy, lmbda)) < 4 * error


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 16), st.integers(1, 200))
def test_carry_makes_the_share_of_rows_tend_to_lmbda(thousandths: int, rows: int, steps: int) -> None:
    """In exact arithmetic the total after every step is floor(lmbda x rows x steps); floats must not lose a row."""
    due = Fraction(thousandths, 1000) * rows
    counts = mix_script.on_policy_counts(thousandths / 1000, rows, steps)
    assert np.cumsum(counts).tolist() == [math.floor(due * (step + 1)) for step in range(steps)]
    assert all(math.floor(due) <= count <= math.ceil(due) for count in counts)


@pytest.mark.parametrize("lmbda", [-0.01, 1.01, math.nan, math.inf])
def test_lmbda_outside_its_range_is_refused_everywhere(lmbda: float) -> None:
    loss, rng = np.ones(2), np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"within \[0, 1\]"):
        mix_script.expected_loss(loss, loss, lmbda)
    with pytest.raises(ValueError, match=r"within \[0, 1\]"):
        mix_script.sampled_loss(loss, loss, lmbda, rng)
    with pytest.raises(ValueError, match=r"within \[0, 1\]"):
        mix_script.on_policy_counts(lmbda, 2, 1)


# --------------------------------------------------------------------------------------------------- dense and sparse


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 24), st.integers(0, 2**16))
def test_teacher_gives_n_signals_for_n_tokens_and_a_reward_gives_one(tokens: int, seed: int) -> None:
    student, teacher = dense_script.rollouts(tokens, np.random.default_rng(seed))
    dense = dense_script.dense_signal(student, teacher)
    sparse = dense_script.sparse_signal(np.arange(len(student), dtype=float), tokens)
    assert dense.shape == sparse.shape == (len(student), tokens)
    assert dense_script.count_signals(dense) == tokens
    assert dense_script.count_signals(sparse) == 1


@pytest.mark.parametrize("at", range(6))
def test_dense_signal_is_non_zero_exactly_at_the_mistake(at: int) -> None:
    student = kl_script.log_softmax(random_logits(6, 5, seed=1))
    signal = dense_script.dense_signal(student, dense_script.with_one_mistake(student, at))
    assert np.flatnonzero(signal).tolist() == [at]


# ------------------------------------------------------------------------------- the library's losses, held against it


def ours(
    student_NV: np.ndarray | torch.Tensor, teacher_NV: np.ndarray, beta: float, weight_N: np.ndarray | None = None
) -> LossOutput:
    """The library's record for arbitrary logits: with the identity as head, hidden states are logits."""
    from opsd.losses import Divergence, Objective, Tokens
    from opsd.models.head import Head
    from opsd.signals import HiddenSignal

    tokens, vocabulary = student_NV.shape
    head = Head(weight_VD=torch.eye(vocabulary))
    weight = torch.ones(tokens) if weight_N is None else torch.tensor(weight_N, dtype=torch.float32)
    student, teacher = (torch.as_tensor(logits, dtype=torch.float32) for logits in (student_NV, teacher_NV))
    return Objective(Divergence(beta=beta))(student.requires_grad_(), head, HiddenSignal(teacher, head), Tokens(weight))


def definition(student_NV: np.ndarray, teacher_NV: np.ndarray, beta: float) -> np.ndarray:
    """The scripts' value, from the very numbers that float32 holds."""
    student, teacher = (kl_script.log_softmax(logits.astype(np.float32)) for logits in (student_NV, teacher_NV))
    return jsd_script.generalised_jsd(student, teacher, beta)


@pytest.mark.filterwarnings("ignore::opsd.errors.OPSDWarning")
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 3), (3, 47), (31, 123)])
def test_our_loss_is_the_definition_at_every_beta(beta: float, tokens: int, vocabulary: int) -> None:
    student, teacher = random_logits(tokens, vocabulary, seed=0), random_logits(tokens, vocabulary, seed=1)
    weight = np.random.default_rng(2).uniform(0.1, 2.0, size=tokens)
    record = ours(student, teacher, beta, weight)
    expected_N = definition(student, teacher, beta)
    np.testing.assert_allclose(record.divergence_N.numpy(), expected_N, atol=1e-5, rtol=1e-5)
    assert record.loss.item() == pytest.approx(float(weight @ expected_N), abs=1e-5 * tokens, rel=1e-5)


@pytest.mark.filterwarnings("ignore::opsd.errors.OPSDWarning")
@pytest.mark.parametrize("beta", BETAS)
def test_our_loss_is_0_for_equal_sides_at_every_beta(beta: float) -> None:
    logits = random_logits(31, 123, seed=3)
    np.testing.assert_allclose(ours(logits, logits, beta).divergence_N.numpy(), 0.0, atol=1e-6)


def test_our_loss_stays_below_ln_2_at_the_midpoint() -> None:
    """Two sides without a common token reach the bound; logits of ±100 leave neither a mass that float32 can hold."""
    logits = np.array([[100.0, -100.0], [3.0, -3.0], [0.1, -0.1]])
    divergence_N = ours(logits, -logits, 0.5).divergence_N.numpy()
    assert np.all(divergence_N <= math.log(2) + 1e-6)
    np.testing.assert_allclose(divergence_N, definition(logits, -logits, 0.5), atol=1e-5)
    assert divergence_N[0] == pytest.approx(math.log(2), abs=1e-6)


def test_our_reverse_kl_grows_with_the_teachers_missing_mass_up_to_the_floor() -> None:
    from opsd.losses.pointwise import FLOOR

    student, teacher = np.zeros((3, 2)), np.array([[0.0, -10.0], [0.0, FLOOR], [0.0, -1000.0]])
    divergence_N = ours(student, teacher, 1.0).divergence_N.numpy()
    np.testing.assert_allclose(divergence_N[:2], definition(student, teacher, 1.0)[:2], rtol=1e-5)
    assert divergence_N[2] == pytest.approx(-FLOOR / 2 - math.log(2), rel=1e-5), "half the student's mass, at the floor"


@pytest.mark.parametrize("tokens", [1, 3, 31])
def test_our_loss_gives_one_signal_per_token(tokens: int) -> None:
    student, teacher = random_logits(tokens, 7, seed=4), random_logits(tokens, 7, seed=5)
    divergence_N = ours(student, teacher, 1.0).divergence_N
    assert divergence_N.shape == (tokens,) and not divergence_N.requires_grad
    alone = [ours(student[n : n + 1], teacher[n : n + 1], 1.0).divergence_N.item() for n in range(tokens)]
    np.testing.assert_allclose(divergence_N.numpy(), alone, atol=1e-6)


@pytest.mark.parametrize(("tokens", "at"), [(1, 0), (3, 2), (31, 7)])
def test_a_weight_steers_its_own_token_and_no_other(tokens: int, at: int) -> None:
    """A loss averaged over the rollout before it is weighted would push every token: a sparse signal."""
    student = torch.tensor(random_logits(tokens, 7, seed=4), dtype=torch.float32, requires_grad=True)
    ours(student, random_logits(tokens, 7, seed=5), 1.0, np.eye(tokens)[at]).loss.backward()
    assert student.grad is not None
    assert torch.nonzero(student.grad.abs().sum(dim=-1)).flatten().tolist() == [at]
