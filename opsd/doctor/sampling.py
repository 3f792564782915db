"""Check 3: whether rollouts are samples of the student's own distribution, at the temperature of the loss."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from opsd.doctor.patient import Patient
from opsd.findings import Finding
from opsd.training.sampling import reshaped_by
from opsd.training.sampling_check import explain

find = functools.partial(Finding, "sampling")


def check_sampling(patient: Patient) -> Iterator[Finding]:
    """Compare −log p of the sampled tokens with the student's entropy: for samples of it the two means are equal."""
    if patient.are_given:
        yield find("skip", "the rollouts are the rows' own completions, whoever sampled them.")
        return
    agreement = patient.agreement
    if not agreement.tokens:
        yield find("skip", "every rollout is empty.")
        return
    figures = {
        "tokens": agreement.tokens,
        "nll": (agreement.entropy + agreement.gap) / agreement.tokens,
        "entropy": agreement.entropy / agreement.tokens,
    }
    if not agreement.differs:
        yield find("pass", f"{agreement.describe()}.", figures=figures)
        return
    cause, way_out = explain(patient.args)
    status = "warn" if reshaped_by(patient.args) else "fail"
    yield find(
        status,  # type: ignore[arg-type]
        f"rollouts are not samples of the student's own distribution: {agreement.describe()}. {cause}.",
        way_out,
        figures=figures,
    )
