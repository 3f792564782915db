"""Dense against sparse feedback: N signals for N tokens, or one reward for the whole rollout.

A teacher scores each token: its signal has N entries that vary independently. A verifier scores the rollout: each token
gets the same number. The count is measured: over many rollouts, the rank of the matrix of signals is the number of
independent directions in which they can move the model. It does not say whether a signal is right.

Shapes: `R` rollouts, `N` tokens, `V` vocabulary. Run: python examples/core_math/dense_vs_sparse.py
"""

from __future__ import annotations

import numpy as np
from reverse_kl import Floats, log_softmax, reverse_kl


def dense_signal(student_RNV: Floats, teacher_RNV: Floats) -> Floats:
    """Return the reverse KL of every token of every rollout, from log-probabilities: R × N numbers."""
    return reverse_kl(student_RNV, teacher_RNV)


def sparse_signal(reward_R: Floats, tokens: int) -> Floats:
    """Return one reward per rollout, repeated for each of its tokens."""
    return np.repeat(reward_R[:, None], tokens, axis=1)


def count_signals(signal_RN: Floats) -> int:
    """Return the independent signals per rollout: the rank of R rollouts' signals, at most N and at most R."""
    return int(np.linalg.matrix_rank(signal_RN))


def rollouts(tokens: int, rng: np.random.Generator, vocabulary: int = 5) -> tuple[Floats, Floats]:
    """Return log-probabilities of student and teacher for 2N + 1 random rollouts, so that R never limits the rank."""
    shape = (2 * tokens + 1, tokens, vocabulary)
    return log_softmax(rng.normal(size=shape)), log_softmax(rng.normal(size=shape))


def with_one_mistake(student_NV: Floats, at: int) -> Floats:
    """Return a teacher that equals the student except at token `at`, where its logits have the opposite sign."""
    teacher_NV = student_NV.copy()
    teacher_NV[at] = log_softmax(-student_NV[at])
    return teacher_NV


def show_counts() -> None:
    rng = np.random.default_rng(0)
    print("tokens N   dense signals   sparse signals   dense / sparse")
    for tokens in (1, 2, 8, 32, 128):
        student_RNV, teacher_RNV = rollouts(tokens, rng)
        dense = count_signals(dense_signal(student_RNV, teacher_RNV))
        # 1 where the verifier accepts the rollout, else 0; it accepts the first, so that there is a signal at all
        reward_R = np.concatenate([[1.0], rng.integers(0, 2, size=len(student_RNV) - 1).astype(float)])
        sparse = count_signals(sparse_signal(reward_R, tokens))
        print(f"{tokens:>8}   {dense:>13}   {sparse:>14}   {dense / sparse:>14.0f}")
    print("A teacher gives N signals for N tokens, a reward 1 for the rollout; at N = 1 the numbers are equal.")


def show_mistake(tokens: int = 6) -> None:
    student_NV = log_softmax(np.random.default_rng(1).normal(scale=2.0, size=(tokens, 5)))
    print(f"\nmistake at   dense: reverse KL of tokens 1 to {tokens}          sparse: reward of tokens 1 to {tokens}")
    for at in (1, 4):
        dense_N = dense_signal(student_NV, with_one_mistake(student_NV, at))
        sparse_N = sparse_signal(np.array([0.0]), tokens)[0]
        dense, sparse = ("  ".join(f"{x:.2f}" for x in row) for row in (dense_N, sparse_N))
        print(f"{'token ' + str(at + 1):>10}   {dense}   {sparse}")
    print("The dense signal is large at the mistake only; the reward is the same wherever the mistake is.")


if __name__ == "__main__":
    show_counts()
    show_mistake()
