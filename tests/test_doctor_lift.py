"""The doctor's check of how good the teacher is: its verdicts, and a real teacher."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows
from datasets import Dataset
from helpers import MAKE_TEACHER, make_args, make_trainer, returns

from opsd import OPSDTrainer, SameCheckpointTeacher
from opsd.commands.demo_sums import GRADER, MAX_NEW_TOKENS, SumsSettings, sums_settings
from opsd.commands.demo_tasks import arithmetic, general, packaged_model
from opsd.doctor import examine
from opsd.doctor.lift import Lift, answer_share, verdict
from opsd.findings import Examination, Finding
from opsd.training.machine import peak_megabytes


def of(examination: Examination, check: str) -> list[Finding]:
    return [finding for finding in examination.findings if finding.check == check]


def lift(student: int, teacher: int, n: int = 16, **more: Any) -> Lift:
    return Lift([i < student for i in range(n)], [i < teacher for i in range(n)], **more)


@pytest.mark.parametrize(
    ("measured", "status", "words"),
    [
        (lift(5, 16), "pass", "the context lifts this model from 31% to 100%: expect learning"),
        (lift(5, 16, without=[True] * 16), "pass", "the teacher lifts this model"),
        (lift(5, 16, answer_share=4.0, separation=-1.0), "pass", "expect learning"),
        (lift(5, 16, shows_answers=True), "pass", "expect learning$"),
        (lift(0, 16, shows_answers=True), "pass", "expect learning; whether the answers .* are right cannot be seen"),
        (lift(0, 16), "pass", "expect learning$"),
        (lift(5, 16, answer_share=0.5), "warn", "copies the answer .*expect style, not skill"),
        (lift(5, 16, separation=-0.1), "warn", "copies the answer"),
        (lift(5, 8), "warn", "the lift .from 31% to 50%. may be chance with 16 rows"),
        (lift(0, 3, 3), "warn", "too few rows for a verdict"),
        (lift(5, 5), "warn", "no lift .from 31% to 31%.: with 16 rows, no sign that this teacher can teach this"),
        (lift(0, 0), "warn", "no lift"),
        (lift(12, 2), "warn", "answers worse than the student"),
        (lift(16, 16), "warn", "already answers these rows"),
    ],
)
def test_the_verdict_says_what_was_measured(measured: Lift, status: str, words: str) -> None:
    said = verdict(measured)
    assert said[0] == status and re.search(words, said[1])
    assert bool(said[2]) == (status == "warn")


@pytest.fixture(scope="module")
def demo_model() -> str:
    return packaged_model()


def demo_trainer(model: str, folder: Path, context: Any, count: int = 64) -> OPSDTrainer:
    # With 16 rows about one seed in nine shows more KL elsewhere than on the answers, within chance.
    args = make_args(folder, max_steps=24, per_device_train_batch_size=16, gradient_accumulation_steps=1, seed=1,
                     max_completion_length=MAX_NEW_TOKENS, bf16=None, learning_rate=1.5e-5)  # fmt: skip
    rows = Dataset.from_list(arithmetic(count, seed=1))
    return OPSDTrainer(model, SameCheckpointTeacher(context=context), args=args, train_dataset=rows)


@pytest.mark.slow
def test_a_real_teacher_lifts_and_the_doctor_takes_under_a_minute(demo_model: str, tmp_path: Path) -> None:
    """Seconds of one core, which other work on the machine does not stretch; benchmarks/doctor.py has those of two."""
    trainer = demo_trainer(demo_model, tmp_path, "answer_only")
    start = time.process_time()
    examination = examine(trainer)
    assert time.process_time() - start < 60
    assert not examination.with_status("warn", "fail"), [
        finding.saw for finding in examination.with_status("warn", "fail")
    ]
    (found,) = of(examination, "lift")
    assert "the context lifts this model" in found.saw and "expect learning" in found.saw
    assert found.figures["teacher"]["right"] >= 15 and found.figures["student"]["right"] <= 8
    assert found.figures["grader"] == GRADER
    assert any("written as the model would write it, is likely to do better" in line for line in found.detail)
    assert found.figures["kl_answer"] > found.figures["kl_rest"]
    # what the context changes at wrong rollouts: they become less likely
    assert found.figures["nll_wrong_with_context"] > found.figures["nll_wrong_without_context"]
    cost = of(examination, "cost")[0].figures
    start = time.perf_counter()
    trainer.args.max_steps = 2
    trainer.train()
    measured = (time.perf_counter() - start) / 2
    assert measured / 4 < cost["seconds_per_step"] < 4 * measured  # the machine may do other things meanwhile
    assert cost["megabytes"] + cost["optimizer_megabytes"] > 0.6 * peak_megabytes()
    # and a teacher shown other rows' answers teaches nothing of this
    wrong = {"template": "answer_only", "fields": {"answer": "other_answer"}}
    other = demo_trainer(demo_model, tmp_path / "other", wrong)
    (found,) = of(examine(other, only=["lift"]), "lift")
    assert found.status == "warn" and ("no lift" in found.saw or "worse than the student" in found.saw)
    # and one that writes JSON, as this student never does, is out of the reverse KL's reach
    reply = {"role": "assistant", "content": '{"answer": "The chemical symbol of iron is Fe."}'}
    turns = [{"role": "user", "content": "What is the chemical symbol of iron?"}, reply]
    rule = {"template": "system_rule", "values": {"rule": "Write every reply as JSON."}, "examples": turns * 2}
    (found,) = of(examine(demo_trainer(demo_model, tmp_path / "rule", rule), only=["reach"]), "reach")
    assert found.status == "warn" and found.figures["first_token"] < 1e-4, found.saw


def test_rewards_grade_where_there_are_any_and_a_grader_that_is_named_wins(tmp_path: Path) -> None:
    always = make_trainer(tmp_path, SameCheckpointTeacher(context="answer_only"), reward_funcs=returns([1.0] * 12))
    (found,) = of(examine(always, only=["lift"]), "lift")
    assert "already answers these rows (from 100% to 100%)" in found.saw and "returns" not in found.figures["grader"]
    (found,) = of(examine(always, only=["lift"], grader="exact"), "lift")
    assert "no lift (from 0% to 0%)" in found.saw and found.figures["grader"] == "exact"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": Dataset.from_list([{k: v for k, v in row.items() if k != "answer"} for row in make_rows()]),
          "teacher": SameCheckpointTeacher(context="worked_solution")}, "no grader for the answers"),
        ({"teacher": MAKE_TEACHER["mixture"]()}, "no single model"),
        ({"teacher": SameCheckpointTeacher(context="own_success"), "num_generations": 2,
          "reward_funcs": returns([1.0] * 4)}, "which rollouts provide during training"),
    ],
)  # fmt: skip
def test_what_cannot_be_judged_is_said_and_not_guessed(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    (found,) = of(examine(make_trainer(tmp_path, **changes), only=["lift"]), "lift")
    assert found.status == "skip" and words in found.saw


@pytest.mark.parametrize(
    ("on", "off", "expected"),
    [
        ([0.1, 0.2, 0.1, 0.2], [1.0, 1.1, 0.9, 1.0], 0.15),
        ([0.9, 1.2, 0.1, 1.7], [1.0, 1.1, 0.9, 1.0], None),  # lower by less than their spread
        ([0.1, 0.2, 0.1], [1.0, 1.1, 0.9], None),
        ([0.1, 0.2, 0.1, 0.2], [0.0] * 4, None),
    ],
)
def test_disagreement_on_answers_counts_where_chance_does_not_explain_it(
    on: list[float], off: list[float], expected: float | None
) -> None:
    assert answer_share(on, off) == pytest.approx(expected)


@pytest.mark.slow
def test_answers_that_are_shifted_by_a_row_are_found_where_the_student_knows_some(
    demo_model: str, tmp_path: Path
) -> None:
    """The teacher repeats what it is shown, and the grader has the same column: from 0 to 100 %, "expect learning"."""
    rows = general("selection")
    answers = [row["answer"] for row in rows]
    shifted = [{**row, "answer": answer} for row, answer in zip(rows, [answers[-1], *answers[:-1]], strict=True)]
    for given, status in ((rows, {"pass", "warn"}), (shifted, {"fail"})):
        args = make_args(tmp_path / min(status), max_completion_length=12, bf16=None)
        trainer = OPSDTrainer(
            demo_model, SameCheckpointTeacher(context="answer_only"), args=args, train_dataset=Dataset.from_list(given)
        )
        (found,) = of(examine(trainer, only=["lift"], grader="contains"), "lift")
        assert found.status in status and ("the column is shifted" in found.saw) == (status == {"fail"})
    assert "fit the `answer` of the row after theirs" in found.saw


@pytest.mark.slow
def test_an_opening_that_worked_examples_ask_for_is_no_warning(demo_model: str, tmp_path: Path) -> None:
    """They teach the form of an answer: on the sums they took the student from 26.7 to 45.0 %."""
    shown = sums_settings(SumsSettings(), demo_model, tmp_path)["context"]
    for context, words in ((shown, "as the worked examples in the context ask for"), ("answer_only", "and 0.0")):
        trainer = demo_trainer(demo_model, tmp_path, context)
        (found,) = of(examine(trainer, only=["divergence"]), "divergence")
        assert found.status == "pass" and words in found.saw
