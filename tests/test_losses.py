"""The divergence against a float64 twin written as loops over the definition."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsd.errors import ConfigError
from opsd.losses import Divergence
from opsd.signals import Head, HiddenSignal

BETAS = [0.0, 0.05, 0.3, 0.5, 0.95, 1.0]
SIZES = [1, 3, 31, 47, 123]
VALUE_TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 2e-5  # float32 kernel against float64 loops


def twin(student: list[float], teacher: list[float], beta: float) -> float:
    """One token's divergence from two lists of logits, by definition; no tensors."""

    def log_softmax(x: list[float]) -> list[float]:
        top = max(x)
        total = math.log(math.fsum(math.exp(v - top) for v in x)) + top
        return [v - total for v in x]

    def kl(p: list[float], q: list[float]) -> float:
        return math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True) if math.exp(a) > 0)

    s, t = log_softmax(student), log_softmax(teacher)
    if beta == 1.0:
        return kl(s, t)
    if beta == 0.0:
        return kl(t, s)
    m = [
        math.log(beta * math.exp(b) + (1 - beta) * math.exp(a)) if math.exp(a) + math.exp(b) > 0 else -math.inf
        for a, b in zip(s, t, strict=True)
    ]
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


def torch_twin(hidden, weight_s, teacher_hidden, weight_t, beta, temperature=1.0, scale=1.0, softcap=None, bias=None):
    """The same in float64 autograd, token by token, for gradients."""
    total = []
    for n in range(len(hidden)):
        z = [hidden[n] @ weight_s.T, teacher_hidden[n] @ weight_t.T]
        if bias is not None:
            z = [x + bias for x in z]
        z = [x * scale for x in z]
        if softcap is not None:
            z = [softcap * torch.tanh(x / softcap) for x in z]
        s, t = (torch.log_softmax(x / temperature, -1) for x in z)
        if beta == 1.0:
            total.append((s.exp() * (s - t)).sum())
        elif beta == 0.0:
            total.append((t.exp() * (t - s)).sum())
        else:
            m = torch.log(beta * t.exp() + (1 - beta) * s.exp())
            total.append(beta * (t.exp() * (t - m)).sum() + (1 - beta) * (s.exp() * (s - m)).sum())
    return torch.stack(total) if total else hidden.new_zeros(0)


def problem(n: int, v: int, d: int = 8, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g) for shape in ((n, d), (v, d), (n, d), (v, d))]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("n", SIZES)
def test_value_and_gradient_equal_the_definition(n: int, beta: float) -> None:
    h, w, th, tw = problem(n, v=37 + n)
    weight_N = torch.rand(n, generator=torch.Generator().manual_seed(1)) + 0.1
    h.requires_grad_(), w.requires_grad_()
    record = Divergence(beta)(h, Head(w), HiddenSignal(th, Head(tw)), weight_N)
    record.loss.backward()
    h64, w64 = (x.detach().double().requires_grad_() for x in (h, w))
    expected_N = torch_twin(h64, w64, th.double(), tw.double(), beta)
    (expected_N * weight_N.double()).sum().backward()
    assert torch.allclose(record.divergence_N.double(), expected_N.detach(), atol=VALUE_TOLERANCE)
    assert torch.allclose(h.grad.double(), h64.grad, atol=GRADIENT_TOLERANCE)
    assert torch.allclose(w.grad.double(), w64.grad, atol=GRADIENT_TOLERANCE * n)
    first = twin((h64[0] @ w64.T).tolist(), (th[0].double() @ tw.double().T).tolist(), beta)
    assert record.divergence_N[0].item() == pytest.approx(first, abs=VALUE_TOLERANCE)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("head", [{"scale": 0.25}, {"softcap": 3.0}, {"scale": 2.0, "softcap": 5.0}, {"bias": True}])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_heads_with_scale_softcap_and_bias_and_temperature(beta: float, head: dict, temperature: float) -> None:
    h, w, th, tw = problem(7, 41)
    bias = torch.randn(41, generator=torch.Generator().manual_seed(2)) if head.get("bias") else None
    scale, softcap = head.get("scale", 1.0), head.get("softcap")
    h.requires_grad_()
    signal = HiddenSignal(th, Head(tw, bias, scale, softcap))
    record = Divergence(beta, temperature)(h, Head(w, bias, scale, softcap), signal, torch.ones(7))
    record.loss.backward()
    h64 = h.detach().double().requires_grad_()
    b64 = None if bias is None else bias.double()
    expected = torch_twin(h64, w.double(), th.double(), tw.double(), beta, temperature, scale, softcap, b64)
    expected.sum().backward()
    assert torch.allclose(record.divergence_N.double(), expected.detach(), atol=VALUE_TOLERANCE)
    assert torch.allclose(h.grad.double(), h64.grad, atol=GRADIENT_TOLERANCE)


def test_a_case_worked_by_hand() -> None:
    """Student (1/2, 1/2), teacher (3/4, 1/4): KL(s‖t) = ½ ln(2/3) + ½ ln 2 = ½ ln(4/3)."""
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    eye = Head(torch.eye(2))
    signal = HiddenSignal(teacher, eye)
    assert Divergence(1.0)(student, eye, signal, torch.ones(1)).divergence_N.item() == pytest.approx(
        0.5 * math.log(4 / 3), abs=1e-6
    )
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert Divergence(0.0)(student, eye, signal, torch.ones(1)).divergence_N.item() == pytest.approx(forward, abs=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_nan_in_a_token_of_weight_zero_changes_nothing(beta: float) -> None:
    """Invariant 2: values and gradients of the others, for NaN in the student's and in the teacher's states."""
    h, w, th, tw = problem(5, 33)
    weight_N = torch.tensor([1.0, 0.0, 1.0, 0.5, 0.0])
    poisoned, poisoned_t = h.clone(), th.clone()
    poisoned[1], poisoned_t[4] = float("nan"), float("nan")
    clean, dirty = h.clone().requires_grad_(), poisoned.requires_grad_()
    a = Divergence(beta)(clean, Head(w), HiddenSignal(th, Head(tw)), weight_N)
    b = Divergence(beta)(dirty, Head(w), HiddenSignal(poisoned_t, Head(tw)), weight_N)
    a.loss.backward(), b.loss.backward()
    assert torch.equal(a.loss, b.loss) and torch.equal(a.divergence_N, b.divergence_N)
    assert torch.equal(clean.grad, dirty.grad)


def test_no_tokens_at_all_is_a_loss_of_zero_that_still_reaches_the_student() -> None:
    h = torch.randn(0, 8, requires_grad=True)
    loss = Divergence()(
        h, Head(torch.randn(9, 8)), HiddenSignal(h.detach(), Head(torch.randn(9, 8))), h.new_zeros(0)
    ).loss
    loss.backward()
    assert loss.item() == 0.0 and h.grad is not None


@settings(max_examples=40, deadline=None)
@given(beta=st.floats(0, 1), seed=st.integers(0, 10_000), size=st.floats(0.01, 8.0))
def test_divergences_are_never_negative_and_zero_on_equal_sides(beta: float, seed: int, size: float) -> None:
    h, w, th, tw = problem(4, 29, seed=seed)
    record = Divergence(beta)(h * size, Head(w), HiddenSignal(th * size, Head(tw)), torch.ones(4))
    assert (record.divergence_N >= -1e-5).all() and torch.isfinite(record.divergence_N).all()
    same = Divergence(beta)(h * size, Head(w), HiddenSignal(h * size, Head(w)), torch.ones(4))
    assert same.divergence_N.abs().max() <= 1e-5


@pytest.mark.parametrize("beta", BETAS)
def test_extreme_logits_stay_finite(beta: float) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[1e4, 0.0, -1e4], [0.0, 1e4, -1e4]])
    eye = Head(torch.eye(3))
    record = Divergence(beta)(student, eye, HiddenSignal(teacher, eye), torch.ones(2))
    record.loss.backward()
    assert torch.isfinite(record.divergence_N).all() and torch.isfinite(student.grad).all()


def test_the_divided_jsd_tends_to_the_kls() -> None:
    h, w, th, tw = (0.3 * x for x in problem(3, 19))
    value = lambda beta: Divergence(beta)(h, Head(w), HiddenSignal(th, Head(tw)), torch.ones(3)).divergence_N  # noqa: E731
    for beta, end in ((1e-3, 0.0), (1 - 1e-3, 1.0)):
        assert torch.allclose(value(beta) / (beta * (1 - beta)), value(end), rtol=0.02)
    assert (value(0.5) <= math.log(2) + 1e-6).all()


def test_entropy_is_the_students() -> None:
    h, w, th, tw = problem(6, 23)
    record = Divergence()(h, Head(w), HiddenSignal(th, Head(tw)), torch.ones(6))
    p = torch.softmax(h.double() @ w.double().T, -1)
    assert torch.allclose(record.entropy_N.double(), -(p * p.log()).sum(-1), atol=1e-5)


def test_memory_does_not_grow_with_tokens_times_vocabulary() -> None:
    """Eight times the vocabulary-wide work, far less than eight times the memory: logits exist in tiles only."""
    import subprocess
    import sys

    code = (
        "import resource, sys, torch\n"
        "from trl.kernels import chunked_divergence as kernel\n"
        "kernel.TOKEN_CHUNK_SIZE, kernel.VOCAB_CHUNK_SIZE = 128, 1024  # TRL's are made for real sizes\n"
        "from opsd.losses import Divergence\nfrom opsd.signals import Head, HiddenSignal\n"
        "n = int(sys.argv[1]); g = torch.Generator().manual_seed(0)\n"
        "h = torch.randn(n, 8, generator=g).requires_grad_(); w = torch.randn(20_000, 8, generator=g)\n"
        "run = lambda k: Divergence()(h[:k], Head(w), HiddenSignal(h[:k].detach(), Head(w)), torch.ones(k))\n"
        "run(16).loss.backward()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "run(n).loss.backward()\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)\n"
    )
    grown = [
        float(subprocess.run([sys.executable, "-c", code, str(n)], capture_output=True, text=True, check=True).stdout)
        for n in (256, 2048)
    ]
    materialised = 2048 * 20_000 * 4 / 2**20
    assert grown[1] - grown[0] < 0.2 * materialised, grown


@pytest.mark.parametrize("beta", [-0.1, 1.1, float("nan")])
def test_a_beta_outside_its_range_is_refused(beta: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        Divergence(beta)


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="above 0"):
        Divergence(1.0, 0.0)


def test_words_and_formula_name_the_direction() -> None:
    assert Divergence(1.0).words == "reverse KL(student ‖ teacher)"
    assert Divergence(0.0).words == "forward KL(teacher ‖ student)"
    assert "0.3" in Divergence(0.3).words and "0.7·KL(s ‖ m)" in Divergence(0.3).formula
    assert all(a != b for a, b in pairwise(Divergence(b).formula for b in BETAS))
