"""Check 7: how good the teacher is: its answers with and without its context, its scores of right and wrong rollouts.

A context that does not change the teacher's answers teaches nothing. A context that lets it repeat a given answer may
teach where the answer stands, and not how it is found.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from opsd.data.values import is_empty
from opsd.doctor.patient import Patient
from opsd.evaluation.graders import NUMBER
from opsd.evaluation.statistics import paired_difference, proportion_interval
from opsd.findings import Finding
from opsd.teachers import TeacherView

find = functools.partial(Finding, "lift")
FEW = 4  # rollouts of a kind, below which their mean is noise
ROWS = 8  # rows, below which a bootstrap is noise
LEAST = 0.05  # lift worth confirming with more rows
SHORT = 8  # tokens of an answer, at the median: all of it stands in the few tokens that fine-tuning trains on
WHEN = "docs/when.md says where fine-tuning or RL does better."


@dataclass(frozen=True)
class Lift:
    """Measurements of the teacher.

    >>> verdict(Lift(student=[False] * 16, teacher=[True] * 16))[1]
    'the context lifts this model from 0% to 100%: expect learning'

    Args:
        student: whether the student's greedy answer is right, per row.
        teacher: the same for the teacher with its context.
        without: the same for the teacher on the plain prompt; None where that is the student.
        separation: by how many nats per token the context widens the gap between wrong and right rollouts; None where
            there are too few of either.
        answer_share: KL per token on the answers of wrong rollouts over KL per token on the rest of them; None where
            the answer's tokens are not known, or the two cannot be told apart.
        shows_answers: whether the context has the column that the grader compares answers with.
    """

    student: Sequence[bool]
    teacher: Sequence[bool]
    without: Sequence[bool] | None = None
    separation: float | None = None
    answer_share: float | None = None
    shows_answers: bool = False

    @property
    def copies(self) -> bool:
        """Whether the context helps the teacher to answer, but not to tell right rollouts from wrong ones."""
        if self.answer_share is not None:
            return self.answer_share < 1
        return self.separation is not None and self.separation <= 0


def verdict(lift: Lift) -> tuple[str, str, str]:
    """Return status, what was seen, and what to do."""
    gain = paired_difference(lift.student, lift.teacher)
    accuracies = [sum(right) / len(right) for right in (lift.student, lift.teacher)]
    change, rows = f"from {accuracies[0]:.0%} to {accuracies[1]:.0%}", len(lift.student)
    if rows < ROWS:
        return "warn", f"too few rows for a verdict ({change}, {rows} rows)", "Examine more: --rows 16."
    if gain.low > 0 and lift.copies:
        return (
            "warn",
            f"the teacher copies the answer ({change}): expect style, not skill. In wrong rollouts it penalises the "
            "style and not the answer",
            "Use a hint, an outline or a part of the solution instead of the answer (levels of a schedule).",
        )
    if gain.low > 0:
        cause = "the context" if lift.without is None else "the teacher"
        unseen = "; whether the answers in its context are right cannot be seen here, as the student gives none of them"
        is_unseen = lift.shows_answers and not any(lift.student)
        return "pass", f"{cause} lifts this model {change}: expect learning" + unseen * is_unseen, ""
    if gain.high < 0:
        return (
            "warn",
            f"the teacher answers worse than the student ({change}): training would lower the student's accuracy",
            "Look at its prompts with `opsd show`; try it without the context, or use another teacher.",
        )
    if min(accuracies) > 0.9:
        saw = f"the student already answers these rows ({change}): little is left to teach"
        return "warn", saw, f"Use harder rows. {WHEN}"
    if gain.difference > LEAST:
        return "warn", f"the lift ({change}) may be chance with {rows} rows", "Examine more rows: --rows 64."
    return (
        "warn",
        f"no lift ({change}): with {rows} rows, no sign that this teacher can teach this",
        f"Give its context more (answer, solution), use a larger sibling, or examine more rows: --rows 64. {WHEN}",
    )


def check_lift(patient: Patient) -> Iterator[Finding]:
    """Grade answers of student and teacher, and score the student's rollouts with and without the teacher's context."""
    if patient.grader_name is None:
        yield find(
            "skip",
            "no grader for the answers: there is no reward function, and no column `answer` with short answers.",
            "Name a grader: --grader last_number, or module:function.",
        )
        return
    if why := patient.why_no_answers:
        yield find("skip", why)
        return
    lift, figures = _measure(patient)
    if neighbour := _fits_a_neighbour(patient, lift):
        yield find(
            "fail",
            f"the student's answers fit the `answer` of the row {neighbour} theirs better than their own: the column "
            "is shifted, and the teacher is shown wrong answers.",
            "Look where the columns were put side by side; a header or a filter may have moved one of them.",
        )
        return
    status, saw, do = verdict(lift)
    yield find(status, saw + ".", do, tuple(_table(patient, lift, figures)), figures)  # type: ignore[arg-type]


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
    on, off = _kl_on_answers(patient, right.tolist(), patient.disagreement)
    figures["kl_answer"], figures["kl_rest"] = (fmean(each) if len(on) >= FEW else None for each in (on, off))
    share = answer_share(on, off)
    bare = patient.grade(patient.answers_of(plain)) if not patient.teacher.starts_as_student else None
    student, answers = patient.grade(patient.greedy), patient.grade(patient.teacher_answers)
    lift = Lift(student, answers, bare, separation, share, _shows_answers(patient))
    for name, graded in (("student", lift.student), ("teacher", lift.teacher), ("teacher_without_context", bare)):
        if graded is not None:
            figures[name] = {"right": sum(graded), "of": len(graded), "interval": proportion_interval(graded)}
    return lift, figures


def answer_share(on: Sequence[float], off: Sequence[float]) -> float | None:
    """Return the KL on answers over the KL elsewhere; None where rollouts are too few, or chance explains the gap.

    >>> answer_share([0.1, 0.2, 0.1, 0.2], [1.0, 1.1, 0.9, 1.0])
    0.15...

    Args:
        on: nats per token on the answer of each wrong rollout.
        off: nats per token on the rest of it.
    """
    if len(on) < FEW or not any(off):
        return None
    gap = paired_difference(off, on)
    return None if gap.low <= 0 <= gap.high else fmean(on) / fmean(off)


def _kl_on_answers(
    patient: Patient, right: Sequence[bool], values: Sequence[Tensor]
) -> tuple[list[float], list[float]]:
    """Return, of each wrong rollout, KL per token on its answer and on its other tokens.

    The answer is the rollout's last number, where answers are numbers; elsewhere its tokens are not known.
    """
    found: tuple[list[float], list[float]] = ([], [])
    for ids, is_right, kl, row in zip(patient.sampled[0], right, values, patient.rows, strict=True):
        pieces = [patient.tokenizer.decode([token]) for token in ids]
        numbers = list(NUMBER.finditer("".join(pieces)))
        if is_right or not numbers or not NUMBER.fullmatch(str(row.get("answer"))):
            continue
        (start, end), position = numbers[-1].span(), 0
        parts: tuple[list[float], list[float]] = ([], [])  # on the answer, and elsewhere
        for piece, value in zip(pieces, kl.tolist(), strict=True):
            parts[not (position < end and position + len(piece) > start)].append(value)
            position += len(piece)
        if all(parts):
            for values_of, part in zip(found, parts, strict=True):
                values_of.append(fmean(part))
    return found


def _table(patient: Patient, lift: Lift, figures: Mapping[str, Any]) -> Iterator[str]:
    answers = {"student": lift.student, "teacher without context": lift.without, "teacher with context": lift.teacher}
    for name, graded in answers.items():
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
    elif figures["kl_answer"] is not None:
        there, elsewhere = figures["kl_answer"], figures["kl_rest"]
        yield f"in wrong rollouts, KL per token: {there:.2f} on the answer, {elsewhere:.2f} elsewhere; within chance"
    cut = sum(len(ids) >= patient.max_new_tokens for ids in patient.greedy)
    if cut and patient.max_new_tokens < patient.args.max_completion_length:
        yield f"{cut} of the student's answers were cut at {patient.max_new_tokens} tokens (--max_new_tokens)"
    if (tokens := _answer_tokens(patient)) is not None and tokens <= SHORT:
        yield (
            f"the context shows the row's own answer ({tokens:.0f} tokens). Fine-tuning on it, written as the model "
            "would write it, is likely to do better; so is lmbda 0 with beta 0. Fine-tuning on bare answers teaches "
            "the task too, and costs other tasks (docs/when.md)"
        )
    yield f"grader: {patient.grader_name}"


def _fits_a_neighbour(patient: Patient, lift: Lift) -> str:
    """Return "before" or "after" where the student's answers fit that neighbour's `answer` better than their own."""
    dataset = patient.trainer.train_dataset
    if isinstance(dataset, Dataset) and lift.shows_answers:
        for step, name in ((-1, "before"), (1, "after")):
            neighbours = [dataset[(number + step) % len(dataset)] for number in patient.numbers]
            fits = patient.grade(patient.greedy, neighbours)
            if sum(fits) >= FEW and paired_difference(lift.student, fits).low > 0:
                return name
    return ""


def _shows_answers(patient: Patient) -> bool:
    return "answer" in {name for context in patient.teacher.prompts.contexts for name in context.columns}


def _answer_tokens(patient: Patient) -> float | None:
    """Return the median length of the rows' answers, if the teacher's context shows them."""
    answers = [str(row["answer"]) for row in patient.rows if not is_empty(row.get("answer"))]
    if not _shows_answers(patient) or not answers:
        return None
    return median(len(patient.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in answers)
