"""GKD's generalised Jensen-Shannon divergence (Agarwal et al., arXiv 2306.13649) and its limits at both ends.

    M      = β · teacher + (1-β) · student
    JSD(β) = β · KL(teacher ‖ M) + (1-β) · KL(student ‖ M)          for 0 < β < 1

As β -> 0, M becomes the student: JSD/β -> KL(teacher ‖ student), forward KL. As β -> 1, M becomes the teacher:
JSD/(1-β) -> KL(student ‖ teacher), reverse KL. JSD itself goes to 0 at both ends. By convention β = 0 is the forward KL
and β = 1 the reverse KL, unscaled, so the loss jumps there: at β = 0.999 it is a thousandth of the reverse KL.
Knows two distributions per token; nothing of models, sampling or gradients.

Shapes: `N` tokens, `V` vocabulary. Run: python examples/core_math/generalised_jsd.py
"""

from __future__ import annotations

import math

import numpy as np
from reverse_kl import Floats, forward_kl, kl, log_probs, reverse_kl


def generalised_jsd(student_NV: Floats, teacher_NV: Floats, beta: float) -> Floats:
    """Return the divergence of each token at this `beta`, in nats.

    Args:
        student_NV: log-probabilities of the student.
        teacher_NV: log-probabilities of the teacher.
        beta: the teacher's share of the mixture; exactly 0 is KL(teacher ‖ student), exactly 1 KL(student ‖ teacher).

    Raises:
        ValueError: beta is outside [0, 1].
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta is a share of a mixture and must be within [0, 1], got {beta}. Use 1 for reverse KL.")
    if beta == 0.0:
        return forward_kl(student_NV, teacher_NV)
    if beta == 1.0:
        return reverse_kl(student_NV, teacher_NV)
    mixture_NV = np.logaddexp(math.log(beta) + teacher_NV, math.log1p(-beta) + student_NV)
    return beta * kl(teacher_NV, mixture_NV) + (1.0 - beta) * kl(student_NV, mixture_NV)


STUDENT_V, TEACHER_V = log_probs([0.70, 0.20, 0.10]), log_probs([0.15, 0.25, 0.60])
HERE_V, THERE_V = log_probs([1.0, 0.0]), log_probs([0.0, 1.0])  # no token has mass on both sides: the largest value


def show_sweep() -> None:
    print("    beta        loss   loss/(beta(1-beta))   student = teacher   no common token")
    for beta in (0.0, 1e-6, 1e-3, 0.1, 0.5, 0.9, 1 - 1e-3, 1 - 1e-6, 1.0):
        loss = float(generalised_jsd(STUDENT_V, TEACHER_V, beta))
        scaled = f"{loss / (beta * (1 - beta)):.6f}" if 0.0 < beta < 1.0 else "-"
        same = abs(float(generalised_jsd(STUDENT_V, STUDENT_V, beta)))  # 1e-17 of rounding may be negative
        worst = float(generalised_jsd(HERE_V, THERE_V, beta))
        print(f"{beta:>8g}  {loss:>10.7f}   {scaled:>19}   {same:>17.7f}   {worst:>15.7f}")


def show_conclusions() -> None:
    forward, reverse = float(forward_kl(STUDENT_V, TEACHER_V)), float(reverse_kl(STUDENT_V, TEACHER_V))
    print(f"\nforward KL(teacher||student) = {forward:.6f}: what loss/(beta(1-beta)) tends to as beta -> 0.")
    print(f"reverse KL(student||teacher) = {reverse:.6f}: what loss/(beta(1-beta)) tends to as beta -> 1.")
    print("The loss itself tends to 0 at both ends and jumps to the full KL at exactly 0 and exactly 1.")
    print("Equal distributions give 0 at every beta.")
    print("Between the ends it stays finite, even without a common token, and never exceeds ln 2 (at beta = 0.5).")


if __name__ == "__main__":
    show_sweep()
    show_conclusions()
