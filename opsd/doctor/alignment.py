"""Check 2: student and teacher score the same ids at the same positions, and equal weights give equal distributions."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from opsd.doctor.patient import Patient, boundary
from opsd.findings import Finding
from opsd.rollouts import PaddedBatch
from opsd.teachers import TeacherView

# Largest KL in nats at any token between two passes of the same weights over the same ids.
IDENTITY = {torch.float32: 1e-5, torch.float64: 1e-9}
IDENTITY_HALF = 5e-2  # bfloat16 and float16, where a different batch shape rounds differently
find = functools.partial(Finding, "alignment")


def check_alignment(patient: Patient) -> Iterator[Finding]:
    """Compare ids and positions, and the distributions where the teacher starts as the student."""
    yield _same_ids(patient)
    yield _identity(patient)


def _same_ids(patient: Patient) -> Finding:
    rollouts = patient.rollouts
    compared = 0
    for prompts in patient.teacher.prompts.leaves:
        rows = [n for n, row in enumerate(patient.rows) if prompts in patient.teacher.prompts.leaves_of(row)]
        if prompts not in rollouts.teacher_prompt_ids or not rows:
            continue
        student, teacher = (_predicted(rollouts.select(rows).pad(torch.device("cpu"), of)) for of in (None, prompts))
        compared += len(student)
        if student != teacher:
            return find(
                "fail",
                f"the teacher (context: {prompts.describe()}) scores other tokens than the student sampled.",
                "This is a bug of opsd or of a custom teacher: both must get the ids of the completion unchanged.",
            )
    prompt = next((prompt for prompt in patient.teacher_prompts if prompt.row == 0), None)
    detail = [f"student: {boundary(patient.student_prompts[0], patient.sampled[0][0])}"]
    if prompt is not None:
        detail.append(f"teacher: {boundary(prompt, patient.sampled[0][0])}")
    count = len(rollouts.scored_ids)
    return find(
        "pass",
        f"{count:,} scored ids are the same for both, each at its position in the completion.",
        detail=tuple(detail),
        figures={"tokens": count, "compared": compared},
    )


def _predicted(batch: PaddedBatch) -> list[list[int]]:
    """Return, per row, the ids that follow the positions whose states are scored."""
    behind_BL = batch.ids_BL.roll(-1, dims=1)
    return [behind_BL[row, batch.position_N[batch.row_N == row]].tolist() for row in range(len(behind_BL))]


def _identity(patient: Patient) -> Finding:
    if not patient.teacher.starts_as_student:
        return find("skip", "the teacher is another model: its distributions differ from the student's anyway.")
    plain = TeacherView(patient.teacher, patient.teacher.prompts.with_context(None))
    largest = max((float(v.max()) for v in patient.divergence(plain) if len(v)), default=0.0)
    dtypes = {torch.bfloat16} if patient.args.bf16 else {p.dtype for p in patient.student.model.parameters()}
    tolerance = max(IDENTITY.get(dtype, IDENTITY_HALF) for dtype in dtypes)
    figures = {"largest_kl": largest, "tolerance": tolerance}
    if largest <= tolerance:
        saw = f"without a context teacher and student agree: KL is {largest:.1g} nats at most, at any token."
        return find("pass", saw, figures=figures)
    return find(
        "fail" if patient.args.disable_dropout else "warn",  # whoever leaves dropout on has chosen this
        f"without a context the teacher is the student, and KL is {largest:.2g} nats at some token: weights, dropout, "
        "precision or positions differ between the two passes.",
        "Check disable_dropout (rollouts and teacher have none), that the model is the one the teacher was made of, "
        "and that its precision is the run's. Until this is 0, the loss contains this difference.",
        figures=figures,
    )
