"""Snapshots, gates and checkpoints of this run: when a copy changes, what decides it, and that a run says so."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_rows
from datasets import Dataset
from helpers import logged, make_rollouts, make_student, make_trainer, move, prepared, snapshot
from safetensors.torch import load_file
from torch import Tensor

from opsd import LiveTeacher, MixtureTeacher, PastCheckpointTeacher, RoutedTeacher, SnapshotTeacher, load_teacher
from opsd.errors import ConfigError
from opsd.teachers import Gate, Teacher

History = list[dict[str, Any]]


def scores(teacher: Teacher) -> Tensor:
    rollouts = teacher.prompts.render(make_rollouts())
    return teacher.score(rollouts).logprobs(torch.tensor(rollouts.scored_ids))


# ---- when it is renewed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("every", [1, 3, 4])
def test_a_snapshot_is_the_student_of_the_last_multiple_of_every(kind: str, every: int) -> None:
    """One step early or late would show here, and so would a copy that shares memory with the student."""
    student = make_student(kind).eval()
    teacher = prepared(SnapshotTeacher(every), student)
    states = [snapshot(student)]
    for done in range(9):
        said = teacher.before_step(done, [])
        renewed = done > 0 and done % every == 0
        assert (said is not None) == renewed
        last = done - done % every
        assert teacher.metrics == {"teacher/snapshot_of_step": last}
        assert all(torch.equal(v, states[last][n]) for n, v in teacher.weight_copy.values.items())  # type: ignore[attr-defined]
        move(student)
        assert teacher.after_step(done + 1) is None
        states.append(snapshot(student))


def test_between_renewals_it_says_the_same_and_then_what_the_student_says() -> None:
    student = make_student("full").eval()
    teacher, live = prepared(SnapshotTeacher(2), student), prepared(LiveTeacher(), student)
    old = scores(teacher)
    for done in (1, 2):
        move(student)
        teacher.before_step(done, [])
        assert torch.equal(scores(teacher), old if done == 1 else scores(live))
    assert not torch.equal(scores(live), old)


# ---- what a gate decides ------------------------------------------------------------------------------------------


def steps(name: str, *windows: float, every: int = 2) -> History:
    """A log whose windows of `every` steps have these means."""
    return [
        {"step": every * number + n + 1, name: value + shift}
        for number, value in enumerate(windows)
        for n, shift in enumerate((-0.5, 0.5))
    ]


def decisions(gate: Any, history: History, every: int = 2) -> list[str]:
    """What a snapshot says at the end of each window, "" where nothing was due."""
    teacher = prepared(SnapshotTeacher(every, gate=gate), make_student("lora"))
    said = []
    for done in range(every, history[-1]["step"] + 1, every):
        so_far = [entry for entry in history if entry["step"] <= done]
        said.append(teacher.before_step(done, so_far) or "")
    return said


def test_a_metric_is_compared_with_the_last_renewals_window_and_not_with_the_last_attempts() -> None:
    """Else a student that falls step by step would pass at every second attempt."""
    said = decisions({"metric": "reward"}, steps("reward", 5.0, 4.0, 4.5, 5.0, 4.9))
    assert [" was renewed" in each for each in said] == [True, False, False, True, False]
    assert said[1] == (
        "the teacher was not renewed at step 4: reward went from 5 to 4 (higher is better); "
        "it stays the student of step 2"
    )
    assert "from 5 to 4.5" in said[2] and "from 5 to 4.9" in said[4] and "stays the student of step 8" in said[4]


def test_the_first_renewal_passes_a_metric_however_low() -> None:
    assert "was renewed" in decisions({"metric": "reward"}, steps("reward", -9.0))[0]


@pytest.mark.parametrize(
    ("gate", "windows", "opens"),
    [
        ({"metric": "x", "tolerance": 1.0}, (5.0, 4.0), True),
        ({"metric": "x", "tolerance": 0.99}, (5.0, 4.0), False),
        ({"metric": "x", "better": "lower"}, (5.0, 5.1), False),
        ({"metric": "x", "better": "lower"}, (5.0, 4.9), True),
        ({"metric": "x", "better": "lower", "tolerance": 0.2}, (5.0, 5.1), True),
        ({"metric": "x"}, (5.0, 5.0), True),
        ({"bounds": {"x": [0.8, 1.5]}}, (10.0, 8.0), True),
        ({"bounds": {"x": [0.8, 1.5]}}, (10.0, 7.9), False),
        ({"bounds": {"x": [0.8, 1.5]}}, (10.0, 15.0), True),
        ({"bounds": {"x": [0.8, 1.5]}}, (10.0, 15.1), False),
        ({"metric": "x", "bounds": {"x": [0.8, 1.5]}}, (10.0, 9.0), False),
        ({"metric": "x", "bounds": {"x": [0.8, 1.5]}}, (10.0, 16.0), False),
    ],
)
def test_a_gate_opens_up_to_its_tolerance_and_its_bounds(gate: dict, windows: tuple[float, float], opens: bool) -> None:
    """A sign or an end of a range the wrong way round."""
    assert ("was renewed" in decisions(gate, steps("x", *windows))[-1]) == opens


def test_bounds_are_multiples_of_the_runs_first_window_however_often_it_was_renewed() -> None:
    """Measured from the last renewal, a length could double at each."""
    said = decisions({"bounds": {"length": [0.5, 2.0]}}, steps("length", 10.0, 15.0, 19.0, 24.0))
    assert ["was renewed" in each for each in said] == [True, True, True, False]
    assert "length was 24, 2.40 times the 10 it began with (allowed: 0.5 to 2)" in said[3]


def test_several_conditions_must_all_hold_and_the_first_that_does_not_is_named() -> None:
    gate = {"metric": "reward", "bounds": {"length": [0.5, 2.0], "entropy": [0.5, 2.0]}}
    start = {"reward": 2.0, "length": 10.0, "entropy": 2.0}
    for worse, end, reason in (
        ("reward", 1.0, "reward went from 2 to 1"),
        ("length", 30.0, "length was 30"),
        ("entropy", 0.5, "entropy was 0.5"),
    ):
        ends = {**start, worse: end}
        history = [
            {"step": step, **of_step} for step, of_step in zip(range(1, 5), (start, start, ends, ends), strict=True)
        ]
        assert reason in decisions(gate, history)[-1]


@pytest.mark.parametrize("value", [None, math.nan])
@pytest.mark.parametrize("gate", [{"metric": "x"}, {"bounds": {"x": [0.5, 2.0]}}])
def test_a_window_in_which_the_metric_has_no_value_keeps_the_teacher(gate: dict, value: float | None) -> None:
    """No comparison with NaN holds, so a rule "refuse what is worse" would let it through."""
    history = [*steps("x", 5.0), {"step": 3, "x": value}, {"step": 4, "x": value}]
    assert "was not renewed at step 4: nothing was logged for x in steps 3 to 4" in decisions(gate, history)[-1]
    some = [*steps("x", 5.0), {"step": 3, "x": value}, {"step": 4, "x": 5.0}]
    assert "was renewed" in decisions(gate, some)[-1]


def test_what_was_evaluated_before_step_one_is_what_the_first_renewal_is_measured_by() -> None:
    """`eval_on_start` logs an entry of step 0, which covers no steps: its mean was a division by zero."""
    start = [{"step": 0, "eval_loss": 2.0}]
    for value, opens in ((2.5, False), (1.5, True)):
        said = decisions({"metric": "eval_loss"}, [*start, {"step": 2, "eval_loss": value}])
        assert ("was renewed" in said[0]) == opens


REFUSED: list[tuple[Any, str]] = [
    ({"metric": "reward", "better": "highest"}, "Did you mean 'higher'"),
    ({"metric": "reward", "tolerence": 0.1}, "Did you mean 'tolerance'"),
    ({"metric": "reward", "tolerance": -0.1}, "must not be negative"),
    ({"metric": "reward", "tolerance": "1e-1"}, "must be a number"),
    ({"tolerance": 0.1}, "neither metric nor bounds"),
    ({"bounds": {}}, "neither metric nor bounds"),
    ({"bounds": ["entropy"]}, "bounds are {metric: [lowest, highest]}"),
    ({"bounds": {"entropy": 2.0}}, "They are two multiples"),
    ({"bounds": {"entropy": [0.5, 1.0, 2.0]}}, "They are two multiples"),
    ({"bounds": {"entropy": [1.0, 1.0]}}, "They are two multiples"),
    ({"bounds": {"entropy": [-1.0, 1.0]}}, "They are two multiples"),
    ({"bounds": {"entropy": [0.5, math.nan]}}, "must be a number"),
    ("reward", "a gate is a mapping"),
]


@pytest.mark.parametrize(("gate", "message"), REFUSED)
def test_a_gate_that_cannot_work_is_refused_as_it_is_read(gate: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_teacher({"strategy": "snapshot", "every": 10, "gate": gate})
    assert message in str(error.value)


@pytest.mark.parametrize("every", [0, -1, 2.5, True, "10"])
def test_an_interval_that_is_no_count_is_refused(every: Any) -> None:
    with pytest.raises(ConfigError, match="every must be a whole number of at least 1"):
        SnapshotTeacher(every)


# ---- in a run -----------------------------------------------------------------------------------------------------


def test_a_run_prints_every_decision_with_its_reason_and_logs_the_copys_step(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """What is printed must follow from what is logged: here the entropy of each step, which goes up and down."""
    teacher = SnapshotTeacher(1, gate={"metric": "entropy"}, context="answer_only")
    trainer = make_trainer(tmp_path, teacher, "lora", max_steps=8)
    trainer.train()
    said = [line for line in capsys.readouterr().out.splitlines() if "renewed at step" in line or "was renewed" in line]
    entropy, expected, copied = logged(trainer, "entropy"), [], [0]
    for done in range(1, 8):
        now, before = entropy[done - 1], entropy[copied[-1] - 1]
        if done == 1 or now >= before:
            copied.append(done)
            expected.append(f"the teacher was renewed: it is now the student of step {done}")
        else:
            copied.append(copied[-1])
            reason = f"entropy went from {before:.4g} to {now:.4g} (higher is better)"
            stays = f"it stays the student of step {copied[-1]}"
            expected.append(f"the teacher was not renewed at step {done}: {reason}; {stays}")
    assert said == expected and any("not renewed" in line for line in said)
    assert logged(trainer, "teacher/snapshot_of_step") == copied


def test_a_gate_on_an_evaluation_before_the_first_step_decides_the_first_renewal(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Bounds that lengths keep, and an eval metric that a tolerance of nats lets pass."""
    gate = {"metric": "eval_divergence", "tolerance": 99.0, "bounds": {"completions/mean_length": [0.9, 1.1]}}
    trainer = make_trainer(
        tmp_path, SnapshotTeacher(2, gate=gate, context="answer_only"), max_steps=3,
        eval_rows=Dataset.from_list(make_rows(16)[12:]), eval_strategy="steps", eval_steps=2, eval_on_start=True,
    )  # fmt: skip
    trainer.train()
    assert "the teacher was renewed: it is now the student of step 2" in capsys.readouterr().out
    assert logged(trainer, "teacher/snapshot_of_step") == [0, 0, 2]


UNKNOWN: list[tuple[dict[str, Any], str]] = [
    ({"metric": "entropie"}, "reads 'entropie', and this run logs no such metric.*Did you mean 'entropy'"),
    ({"metric": "eval_entropy"}, "reads 'eval_entropy'.*There is no eval_dataset with eval_strategy"),
    ({"bounds": {"reward": [0.5, 2.0]}}, "reads 'reward'"),
    ({"metric": "entropy", "bounds": {"completions/length": [0.5, 2.0]}}, "reads 'completions/length'"),
]
AROUND: list[Callable[[Teacher], Teacher]] = [
    lambda teacher: teacher,
    lambda teacher: MixtureTeacher(teacher, [0.5, 0.5], contexts=["answer_only", None]),
    lambda teacher: RoutedTeacher(
        "domain", {"even": MixtureTeacher([LiveTeacher(), teacher], [0.5, 0.5]), "odd": LiveTeacher()}
    ),
]


@pytest.mark.parametrize("around", AROUND, ids=["alone", "under contexts", "in a mixture in a route"])
@pytest.mark.parametrize(("gate", "message"), UNKNOWN)
def test_a_gate_that_would_never_open_is_refused_before_a_model_is_looked_for(
    tmp_path: Path, gate: dict, message: str, around: Callable[[Teacher], Teacher]
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path, around(SnapshotTeacher(3, gate=gate)), "no/such-model")


def test_two_snapshots_of_one_mixture_decide_by_themselves() -> None:
    """A second one, without a gate, is renewed where the first is not; both are told, once."""
    parts = [SnapshotTeacher(2, gate=Gate(metric="x")), SnapshotTeacher(4)]
    teacher = prepared(MixtureTeacher(parts, [0.5, 0.5]), make_student("lora"))
    history = steps("x", 5.0, 4.0)
    assert teacher.watches == {"x": 2}
    assert "student of step 2" in str(teacher.before_step(2, history[:2]))
    said = str(teacher.before_step(4, history)).splitlines()
    assert len(said) == 2 and "x went from 5 to 4" in said[0] and "now the student of step 4" in said[1]
    assert teacher.metrics == {"teacher/snapshot_of_step/0": 2, "teacher/snapshot_of_step/1": 4}


# ---- a checkpoint of this run -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "arriving adapter"])
def test_a_checkpoint_of_this_run_is_the_start_until_its_step_and_then_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture, kind: str
) -> None:
    """Compared with the files that the run itself saved; a resume from either side of the step changes nothing."""
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1}

    def run(folder: Path, resume: bool = False) -> dict[str, Tensor]:
        trainer = make_trainer(folder, PastCheckpointTeacher("checkpoint-3", context="answer_only"), kind, **settings)
        began = snapshot(trainer.model)
        assert all(torch.equal(v, began[n]) for n, v in trainer.teacher.state_dict().items())
        trainer.train(resume_from_checkpoint=resume)
        student = make_student(kind).eval()
        student.load_state_dict(trainer.teacher.state_dict(), strict=False)
        held = prepared(LiveTeacher(context="answer_only"), student)
        assert torch.allclose(scores(trainer.teacher), scores(held), atol=1e-6), "it says what it holds"
        assert not torch.allclose(
            scores(trainer.teacher), scores(prepared(LiveTeacher(context="answer_only"), trainer.model))
        )
        return trainer.teacher.state_dict()

    whole = run(tmp_path / "whole")
    assert capsys.readouterr().out.count("the teacher is now the student of step 3, and stays so") == 1
    start = snapshot(make_student(kind))
    file = "model.safetensors" if kind == "full" else "adapter_model.safetensors"
    student = load_file(tmp_path / "whole" / "checkpoint-3" / file)
    for step in range(1, 6):
        kept = load_file(tmp_path / "whole" / f"checkpoint-{step}" / "opsd_teacher.safetensors")
        for name, value in kept.items():
            expected = start[name] if step < 3 else student[name.replace(".default.", ".")]
            assert torch.equal(value, expected), (step, name)
    for stop in (2, 4):
        again = tmp_path / f"again-{stop}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{stop}", again / f"checkpoint-{stop}")
        assert all(torch.equal(v, whole[n]) for n, v in run(again, resume=True).items())
