"""Per-token reverse KL, KL(student ‖ teacher): the loss of on-policy distillation at every sampled token.

    KL(p ‖ q) = sum over v of p(v) · (log p(v) - log q(v)),   with 0 · log 0 = 0, in nats

Knows two distributions per token; nothing of models, sampling or gradients.

Shapes: `N` tokens, `V` vocabulary. Run: python examples/core_math/reverse_kl.py
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def log_softmax(logits_NV: ArrayLike) -> Floats:
    """Return the log-probabilities of each row of logits; a logit of -inf is a token without mass."""
    logits = np.asarray(logits_NV, dtype=np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)  # the largest becomes 0, so that exp cannot overflow
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def log_probs(probs_NV: ArrayLike) -> Floats:
    """Return the log of probabilities; log 0 = -inf without a warning."""
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(probs_NV, dtype=np.float64))


def kl(logp_NV: Floats, logq_NV: Floats) -> Floats:
    """Return KL(p ‖ q) of each token: one number per row, inf where p has mass on an entry of which q has none."""
    with np.errstate(invalid="ignore"):  # -inf minus -inf, in entries that the next line leaves out
        terms_NV = np.exp(logp_NV) * (logp_NV - logq_NV)
    return np.where(np.isneginf(logp_NV), 0.0, terms_NV).sum(axis=-1)


def reverse_kl(student_NV: Floats, teacher_NV: Floats) -> Floats:
    """Return KL(student ‖ teacher) of each token: large where the student has mass and the teacher has little."""
    return kl(student_NV, teacher_NV)


def forward_kl(student_NV: Floats, teacher_NV: Floats) -> Floats:
    """Return KL(teacher ‖ student) of each token: large where the teacher has mass and the student has little."""
    return kl(teacher_NV, student_NV)


PAIRS = [  # (student, teacher): one sampled token each
    ([0.70, 0.20, 0.10], [0.70, 0.20, 0.10]),
    ([0.70, 0.20, 0.10], [0.60, 0.30, 0.10]),
    ([0.98, 0.01, 0.01], [0.40, 0.30, 0.30]),
    ([0.40, 0.30, 0.30], [0.98, 0.01, 0.01]),
    ([0.50, 0.50, 0.00], [1.00, 0.00, 0.00]),
]


def show_tokens() -> None:
    student_NV, teacher_NV = (log_probs(side) for side in zip(*PAIRS, strict=True))
    signals_N = reverse_kl(student_NV, teacher_NV)
    print("token   student           teacher           KL(student||teacher)   KL(teacher||student)")
    for n, forward in enumerate(forward_kl(student_NV, teacher_NV)):
        student, teacher = ("  ".join(f"{p:.2f}" for p in side) for side in PAIRS[n])
        print(f"{n + 1:>5}   {student}  {teacher}  {signals_N[n]:>20.4f}   {forward:>20.4f}")
    print(f"{len(PAIRS)} tokens give {signals_N.size} signals, one for each.")
    print("Never negative, 0 only where both are equal (token 1), not symmetric (3 and 4 are one pair, swapped).")


def show_blow_up() -> None:
    student_V = log_probs([0.5, 0.5])
    print("\nteacher's mass on a token   KL(student||teacher)   KL(teacher||student)")
    for mass in (0.5, 1e-1, 1e-3, 1e-6, 1e-12, 0.0):
        teacher_V = log_probs([1 - mass, mass])
        reverse, forward = reverse_kl(student_V, teacher_V), forward_kl(student_V, teacher_V)
        print(f"{mass:>25g}   {reverse:>20.4f}   {forward:>20.4f}")
    print("Reverse KL grows without bound where only the student has mass; forward KL is ln 2 at most.")


if __name__ == "__main__":
    show_tokens()
    show_blow_up()
