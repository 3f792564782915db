"""Check 6: is the teacher any good? What it answers with and without its context, and what it says of rollouts.

A context that does not change what the teacher can do has nothing to teach (methods: F13); one that lets it repeat an
answer may teach where the answer goes and nothing of how it is found.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opsd.doctor.patient import BATCH, Patient
from opsd.evaluation.graders import NUMBER
from opsd.evaluation.statistics import paired_difference, proportion_interval
from opsd.findings import Finding
from opsd.rollouts import Ids
from opsd.teachers import TeacherView

find = functools.partial(Finding, "lift")
FEW = 4  # rollouts of a kind, below which their mean says nothing
ROWS = 8  # below which a bootstrap says nothing
LEAST = 0.05  # a lift that would be worth having


@dataclass(frozen=True)
class Lift:
    """What was measured.

    Args:
        student: whether each row is answered right by the student, greedily.
        teacher: by the teacher with its context.
        without: by the teacher on the plain prompt; None where that is the student.
        separation: by how many nats per token the context widens the gap between wrong and right rollouts; None where
            there are too few of either.
        answer_share: KL per token on the answers of wrong rollouts over KL per token on the rest of them; None where
            nothing says which tokens those are.
    """

    student: Sequence[bool]
    teacher: Sequence[bool]
    without: Sequence[bool] | None = None
    separation: float | None = None
    answer_share: float | None = None

    @property
    def copies(self) -> bool:
        """Whether its context helps the teacher to answer, and not to tell right rollouts from wrong ones."""
        if self.answer_share is not None:
            return self.answer_share < 1
        return self.separation is not None and self.separation <= 0


def verdict(lift: Lift) -> tuple[str, str, str]:
    """Return status, what it comes to, and what to do."""
    found = paired_difference(lift.student, lift.teacher)
    shares = [sum(right) / len(right) for right in (lift.student, lift.teacher)]
    what = f"from {shares[0]:.0%} to {shares[1]:.0%}"
    if len(lift.student) < ROWS:
        return "warn", f"too few rows to tell ({what}, {len(lift.student)} rows)", "Look at more: --rows 16."
    if found.low > 0 and lift.copies:
        return (
            "warn",
            f"the teacher copies the answer ({what}), and blames wrong rollouts for their style and not for their "
            "answers: expect style, not skill",
            "Show a hint, an outline or a part of the solution instead of the answer (levels of a schedule).",
        )
    if found.low > 0:
        who = "the context" if lift.without is None else "the teacher"
        return "pass", f"{who} lifts this model {what}: expect learning", ""
    if found.high < 0:
        return (
            "warn",
            f"the teacher answers worse than the student ({what}): it would teach the student to be wrong",
            "Look at what it is shown with `opsd show`; try it without the context, or use another teacher.",
        )
    if min(shares) > 0.9:
        return "warn", f"the student knows this already ({what}): there is little to teach", "Use harder rows."
    if found.difference > LEAST:
        told = f"a lift that {len(lift.student)} rows cannot tell from chance ({what})"
        return "warn", told, "Look at more rows: --rows 64."
    return (
        "warn",
        f"no lift ({what}): this teacher cannot teach this, as far as {len(lift.student)} rows can tell",
        "Show it more (answer, solution), use a larger sibling, or look at more rows: --rows 64.",
    )


def check_lift(patient: Patient) -> Iterator[Finding]:
    """Let both sides answer, and let the teacher judge the student's rollouts with and without its context."""
    made = set(patient.trainer.groups.rollout_fields) - set(patient.rows[0])
    needs = {n for c in patient.teacher.prompts.contexts for n in c.fields | c.optional_fields} & made
    if patient.grader_name is None:
        yield find(
            "skip",
            "nothing can grade answers here: no reward function, and no column answer with short answers.",
            "Name a grader: --grader last_number, or module:function.",
        )
        return
    if not patient.teacher.can_sample:
        yield find("skip", f"teacher {patient.teacher.strategy!r} is no single model that could answer by itself.")
        return
    if needs:
        yield find("skip", f"the teacher is shown {', '.join(sorted(needs))}, which rollouts make during training.")
        return
    lift, figures = _measure(patient)
    status, words, do = verdict(lift)
    yield find(status, words + ".", do, tuple(_table(patient, lift, figures)), figures)  # type: ignore[arg-type]


def _measure(patient: Patient) -> tuple[Lift, dict[str, Any]]:
    teacher = TeacherView(patient.teacher)
    plain = TeacherView(patient.teacher, patient.teacher.prompts.with_context(None))
    rollouts, _ = patient.sampled
    right = torch.tensor(patient.grade(rollouts))
    with_context, without = patient.logprobs(teacher), patient.logprobs(plain)
    figures: dict[str, Any] = {"rows": len(rollouts), "grader": patient.grader_name}
    gaps = []
    for name, values in (("with", with_context), ("without", without)):
        means = torch.stack([-row.mean() if len(row) else torch.zeros(()) for row in values])
        for kind, chosen in (("right", right), ("wrong", ~right)):
            figures[f"nll_{kind}_{name}_context"] = float(means[chosen].mean()) if chosen.any() else None
        gaps.append(means[~right].mean() - means[right].mean())
    enough = min(int(right.sum()), int((~right).sum())) >= FEW
    figures["separation"] = separation = float(gaps[0] - gaps[1]) if enough else None
    figures["kl_answer"], figures["kl_rest"] = _kl_on_answers(patient, right.tolist(), patient.disagreement)
    share = (
        figures["kl_answer"] / figures["kl_rest"] if figures["kl_answer"] is not None and figures["kl_rest"] else None
    )
    own = patient.grade(_answers(patient, plain)) if not patient.teacher.starts_as_student else None
    lift = Lift(patient.grade(patient.greedy), patient.grade(_answers(patient, teacher)), own, separation, share)
    for name, graded in (("student", lift.student), ("teacher", lift.teacher), ("teacher_without_context", own)):
        if graded is not None:
            figures[name] = {"right": sum(graded), "of": len(graded), "interval": proportion_interval(graded)}
    return lift, figures


def _answers(patient: Patient, teacher: TeacherView) -> list[Ids]:
    longest = max((side.ids for side in patient.sides), key=len)
    with patient.trainer.accelerator.autocast():
        return teacher.sample(patient.rows, max_new_tokens=patient.room([longest]), batch_size=BATCH)


def _kl_on_answers(
    patient: Patient, right: Sequence[bool], values: Sequence[Tensor]
) -> tuple[float | None, float | None]:
    """Return KL per token on the answers of wrong rollouts, and on their other tokens; None where there are too few.

    What a wrong rollout answers is its last number, where answers are numbers; elsewhere nobody can tell.
    """
    on: list[float] = []
    off: list[float] = []
    rollouts = 0
    for ids, is_right, kl, row in zip(patient.sampled[0], right, values, patient.rows, strict=True):
        pieces = [patient.tokenizer.decode([token]) for token in ids]
        numbers = list(NUMBER.finditer("".join(pieces)))
        if is_right or not numbers or not NUMBER.fullmatch(str(row.get("answer"))):
            continue
        rollouts += 1
        (start, end), position = numbers[-1].span(), 0
        for piece, value in zip(pieces, kl.tolist(), strict=True):
            (on if position < end and position + len(piece) > start else off).append(value)
            position += len(piece)
    if rollouts < FEW or not off:
        return None, None
    return sum(on) / len(on), sum(off) / len(off)


def _table(patient: Patient, lift: Lift, figures: Mapping[str, Any]) -> Iterator[str]:
    asked = {"student": lift.student, "teacher without context": lift.without, "teacher with context": lift.teacher}
    for name, graded in asked.items():
        if graded is not None:
            low, high = proportion_interval(graded)
            yield f"{name:<24} {sum(graded)} of {len(graded)} right ({low:.0%} to {high:.0%}, 95 %)"
    for kind in ("wrong", "right"):
        before, after = (figures[f"nll_{kind}_{name}_context"] for name in ("without", "with"))
        if before is not None:
            yield f"teacher's NLL per token of {kind} rollouts: {before:.2f} without its context, {after:.2f} with it"
    if lift.separation is not None:
        yield f"the context widens the gap between wrong and right rollouts by {lift.separation:+.2f} nats per token"
    if lift.answer_share is not None:
        yield f"in wrong rollouts, KL per token is {lift.answer_share:.1f} times as large on the answer as elsewhere"
    cut = sum(len(ids) >= patient.max_new_tokens for ids in patient.greedy)
    if cut and patient.max_new_tokens < patient.args.max_completion_length:
        yield f"{cut} of the student's answers were cut at {patient.max_new_tokens} tokens (--max_new_tokens)"
    yield f"grader: {patient.grader_name}"
