"""Check 8: whether the run's loss can teach the student to begin its answers as the teacher does.

The reverse KL and the Jensen-Shannon divergence weigh a token by the student's probability, so a token that the student
never writes gets next to no gradient, from its own rollouts or from the teacher's samples; the forward KL weighs it by
the teacher's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from statistics import median

import torch

from opsd.doctor.patient import Patient
from opsd.findings import Finding
from opsd.losses import Divergence

find = functools.partial(Finding, "reach")
RARE = 1e-3  # probability: hardly one of a run's rollouts begins like this
WEAK = 0.1  # of the forward KL's pull


def pull(divergence: Divergence) -> float:
    """Return by how much a loss raises the logit of a rare token that the teacher is nearly certain of.

    Computed from the loss itself, for a vocabulary of two tokens: 1 for the forward KL, 0.01 for the reverse KL.
    """
    # Of the sampled token the expected gradient is the reverse KL's, which support "sampled" has for its divergence.
    log_s = torch.tensor([[math.log(RARE), math.log1p(-RARE)]])
    compared = replace(divergence, support="full", tail="bucket").compare(log_s, log_s.exp(), log_s.flip(-1), None)
    grad = compared.grad_log_s_RV
    return -float((grad - log_s.exp() * grad.sum(-1, keepdim=True))[0, 0])


def check_reach(patient: Patient) -> Iterator[Finding]:
    """Score the teacher's greedy answers under the student, and look at how they begin."""
    if why := patient.why_no_answers:
        yield find("skip", why)
        return
    answers = patient.teacher_answers
    if not all(answers):
        yield find("skip", "the teacher's greedy answers are empty.")
        return
    logprobs = patient.student_logprobs(answers)
    first = median(math.exp(row[0]) for row in logprobs)
    nll = -sum(map(sum, logprobs)) / sum(map(len, logprobs))
    begins = patient.tokenizer.decode(answers[0][:1])
    divergence = patient.args.objective.divergence
    strength = pull(divergence)
    figures = {"first_token": first, "nll": nll, "pull": strength}
    saw = f"the student begins its answers as the teacher does, such as with {begins!r}, with probability {first:.2g}"
    if first >= RARE or strength >= WEAK:
        scored = f"and gives the teacher's answers {nll:.2f} nats per token"
        yield find("pass", f"{saw} (median), {scored}.", figures=figures)
        return
    yield find(
        "warn",
        f"{saw} (median): its rollouts will not begin like that, and this run's loss raises no token that the student "
        f"does not write ({divergence.kind.describe(divergence.beta)}).",
        "Set beta to 0: the forward KL weighs tokens by the teacher, on the same rollouts. Or fine-tune on some of the "
        "teacher's answers first (--control seq-kd).",
        figures=figures,
    )
