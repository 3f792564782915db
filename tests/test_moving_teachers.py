"""Teachers that change during training: averages, snapshots behind gates, a checkpoint of this run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_rows
from datasets import Dataset
from helpers import logged, make_rollouts, make_student, make_trainer, move, prepared, snapshot

from opsd import EMATeacher, OPSDTrainer, PastCheckpointTeacher, SnapshotTeacher, load_teacher
from opsd.errors import ConfigError
from opsd.teachers import Gate
from opsd.teachers.gate import mean

# ---- averages -----------------------------------------------------------------------------------------------------


def averaged(
    teacher: EMATeacher, student: torch.nn.Module, steps: int, by: float = 0.02
) -> list[dict[str, torch.Tensor]]:
    """Move the student, let the teacher follow, and return the student's states, the first one included."""
    history = [snapshot(student)]
    for step in range(1, steps + 1):
        move(student, by=by)
        teacher.after_step(step)
        history.append(snapshot(student))
    return history


def closed_form(history: list[torch.Tensor], decays: list[float]) -> torch.Tensor:
    """Σ of the states, each times what is left of its share, in float64."""
    expected = history[0].double()
    for value, decay in zip(history[1:], decays, strict=True):
        expected = decay * expected + (1.0 - decay) * value.double()
    return expected


def test_a_decay_of_nearly_one_moves_a_bfloat16_student_s_average() -> None:
    """In bfloat16 0.9999 never moves; in float32 it follows the closed form to 1e-6."""
    student = make_student("full").to(torch.bfloat16)
    teacher = prepared(EMATeacher(0.9999), student)
    history = averaged(teacher, student, steps=30, by=0.5)
    moved = 0.0
    for name, value in teacher.weight_copy.values.items():
        expected = closed_form([h[name] for h in history], [0.9999] * 30)
        assert (value.double() - expected).abs().max() <= 1e-6, name
        moved = max(moved, float((value.double() - history[0][name].double()).abs().max()))
    assert moved > 1e-3


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("warmup", [False, True])
def test_updates_come_every_n_steps_and_warm_up_forgets_the_start_sooner(every: int, warmup: bool) -> None:
    student = make_student("full")
    teacher = prepared(EMATeacher(0.9, every=every, warmup=warmup), student)
    history = averaged(teacher, student, steps=7)
    updates = range(1, 7 // every + 1)
    decays = [min(0.9, (1 + n) / (10 + n)) if warmup else 0.9 for n in updates]
    for name, value in teacher.weight_copy.values.items():
        used = [history[0][name], *(history[n * every][name] for n in updates)]
        assert (value.double() - closed_form(used, decays)).abs().max() <= 1e-6, name
    assert teacher.progress == len(decays)


def test_a_warm_up_goes_on_after_a_resume_where_it_was() -> None:
    """Counted anew, it would forget the average at the first step after a stop."""
    student = make_student("lora")
    whole, first, rest = (prepared(EMATeacher(0.99, warmup=True, every=2), student) for _ in range(3))
    for step in range(1, 9):
        move(student)
        if step == 5:
            rest.load_state_dict(first.state_dict())
        for teacher in (whole, first if step < 5 else rest):
            teacher.after_step(step)
    assert all(torch.equal(v, rest.weight_copy.values[n]) for n, v in whole.weight_copy.values.items())
    assert [round(whole.decay_of(n), 4) for n in (1, 2, 8, 1000)] == [0.1818, 0.25, 0.5, 0.99]
    assert rest.progress == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading is from a GPU to CPU memory")
def test_an_offloaded_average_stays_in_cpu_memory() -> None:
    student = make_student("lora").cuda()
    teacher = prepared(EMATeacher(0.7, offload=True), student)
    averaged(teacher, student, steps=4)
    scores(teacher)
    assert {v.device.type for v in teacher.tensors} == {"cpu"} and teacher.cost.offloaded == teacher.cost.megabytes


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"decay": 1}, "at least 0 and below 1"),
    ({"decay": 0.9, "every": 0}, "every must be a whole number"),
    ({"decay": 0.9, "every": 2.0}, "every must be a whole number"),
    ({"decay": 0.9, "warmup": "yes"}, "warmup is true or false"),
    ({"decay": 0.9, "warmup": 10}, "warmup is true or false"),
    ({"decay": 0.9, "evry": 2}, "Did you mean 'every'"),
    ({}, "needs decay"),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS)
def test_settings_of_an_average_outside_their_range_are_refused_as_they_are_read(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_teacher({"strategy": "ema", **settings})
    assert message in str(error.value)


# ---- snapshots ----------------------------------------------------------------------------------------------------


def scores(teacher: Any) -> torch.Tensor:
    rollouts = teacher.prompts.render(make_rollouts())
    return teacher.score(rollouts).logprobs(torch.tensor(rollouts.scored_ids))


def test_a_snapshot_stands_still_between_renewals_and_then_is_the_student() -> None:
    student = make_student("lora").eval()
    teacher = prepared(SnapshotTeacher(3), student)
    before = scores(teacher)
    for step in (1, 2):
        move(student)
        assert teacher.before_step(step, []) is None and torch.equal(scores(teacher), before)
    move(student)
    assert teacher.before_step(3, []) == "the teacher was renewed: it is now the student of step 3"
    assert not torch.equal(scores(teacher), before)
    assert all(torch.equal(v, student.get_parameter(n)) for n, v in teacher.weight_copy.values.items())


def log(name: str, values: list[float | None], start: int = 1) -> list[dict[str, float]]:
    return [{"step": start + n, name: value} for n, value in enumerate(values) if value is not None]


RANGES = [range(1, 4), range(1, 4), range(4, 7)]  # the run's first window, the last renewal's, the one that ended
CASES = [
    ({"metric": "reward"}, log("reward", [1, 1, 1, 2, 2, 2]), None),
    ({"metric": "reward"}, log("reward", [1, 1, 1, 1, 1, 0.7]), "reward went from 1 to 0.9 (higher is better)"),
    ({"metric": "reward", "tolerance": 0.1}, log("reward", [1, 1, 1, 1, 1, 0.7]), None),
    ({"metric": "eval_loss", "better": "lower"}, log("eval_loss", [1, 1, 1, 2, 2, 2]), "went from 1 to 2"),
    ({"metric": "eval_loss", "better": "lower"}, log("eval_loss", [2, 2, 2, 1, 1, 1]), None),
    ({"metric": "reward"}, log("reward", [1, 1, 1]), "nothing was logged for reward in steps 4 to 6"),
    ({"bounds": {"entropy": [0.5, 2.0]}}, log("entropy", [2, 2, 2, 3, 3, 3]), None),
    ({"bounds": {"entropy": [0.5, 2.0]}}, log("entropy", [2, 2, 2, 0.9, 0.9, 0.9]), "0.45 times the 2 it began with"),
    ({"bounds": {"entropy": [0.5, 2.0]}}, log("entropy", [2, 2, 2, 5, 5, 5]), "2.50 times"),
    ({"bounds": {"entropy": [0.5, 2.0]}}, log("entropy", [2, 2, 2]), "nothing was logged for entropy"),
]


@pytest.mark.parametrize(("settings", "entries", "problem"), CASES)
def test_a_gate_opens_where_its_conditions_hold(settings: dict, entries: list, problem: str | None) -> None:
    found = Gate(**settings).problem(entries, *RANGES)
    assert found is None if problem is None else problem in (found or "")


def test_before_the_first_renewal_there_is_nothing_to_fall_behind() -> None:
    assert Gate(metric="reward").problem(log("reward", [0.0] * 6), range(1, 4), range(1, 0), range(4, 7)) is None


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"metric": "reward", "better": "more"},
        {"metric": "reward", "tolerance": -1.0},
        {"bounds": {"entropy": [2.0, 1.0]}},
        {"bounds": {"entropy": [1.0]}},
        {"metrics": "reward"},
    ],
)
def test_gates_that_cannot_work_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigError):
        SnapshotTeacher(10, gate=settings)


def test_a_refused_renewal_is_said_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The gate reads the run's own log: here lengths must grow, and they cannot."""
    gate = {"bounds": {"completions/mean_length": [1.5, 9.0]}}
    trainer = make_trainer(tmp_path, SnapshotTeacher(3, gate=gate, context="answer_only"), max_steps=6)
    trainer.train()
    out = capsys.readouterr().out
    assert "the teacher was not renewed at step 3: completions/mean_length was 6, 1.00 times the 6 it began with" in out
    assert "it stays the student of step 0" in out and logged(trainer, "teacher/snapshot_of_step") == [0] * 6


def test_an_open_gate_renews_and_logs_the_step(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    gate = {"metric": "eval_entropy", "tolerance": 9.0, "bounds": {"entropy": [0.1, 9.0]}}
    args = {"max_steps": 7, "eval_strategy": "steps", "eval_steps": 3, "logging_steps": 3}
    trainer = make_trainer(
        tmp_path,
        SnapshotTeacher(3, gate=gate, context="answer_only"),
        eval_rows=Dataset.from_list(make_rows(16)[12:]),
        **args,
    )
    trainer.train()
    assert capsys.readouterr().out.count("the teacher was renewed") == 2
    assert logged(trainer, "teacher/snapshot_of_step") == [0, 3] and trainer.teacher.progress == 6, (
        "the latest, not a mean of the window"
    )


@pytest.mark.slow
@pytest.mark.parametrize("stop", [3, 5])
def test_a_gate_decides_alike_after_a_resume(tmp_path: Path, stop: int) -> None:
    """Metrics since the last log entry belong into a checkpoint, and an entry counts for the steps it covers."""

    def reward(completions: list, trainer_state: Any, **columns: Any) -> list[float]:
        return [{4: 1.0, 5: 0.0, 6: 0.9}.get(trainer_state.global_step, 0.5)] * len(completions)

    def run(folder: Path, resume: bool, max_steps: int = 9) -> OPSDTrainer:
        gate = {"metric": "reward", "bounds": {"entropy": [0.1, 9.0]}}
        settings = {"max_steps": max_steps, "logging_steps": 2, "save_strategy": "steps", "save_steps": 1}
        teacher = SnapshotTeacher(4, gate=gate, context="answer_only")
        trainer = make_trainer(folder, teacher, "lora", reward_funcs=reward, lr_scheduler_type="constant", **settings)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole", resume=False)
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{stop}", tmp_path / "again" / f"checkpoint-{stop}")
    again = run(tmp_path / "again", resume=True)
    assert whole.teacher.progress == again.teacher.progress == 8
    for key in ("reward", "entropy", "divergence", "group/right"):
        assert logged(whole, key) == logged(again, key), key
    for (name, a), (_, b) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_run_that_logs_too_seldom_for_its_gate_is_refused(tmp_path: Path) -> None:
    teacher = SnapshotTeacher(4, gate={"metric": "entropy"})
    with pytest.raises(ConfigError, match=r"reads 'entropy' every 4 steps, and logging_steps is 5"):
        make_trainer(tmp_path, teacher, "no/such-model", logging_steps=5)


def test_an_entry_counts_for_the_steps_it_covers() -> None:
    """A stop logs once more: entries of one step must not weigh as much as those of two."""
    rare = [{"step": 2, "reward": 1.0}, {"step": 4, "reward": 0.5}]
    often = [{"step": 2, "reward": 1.0}, {"step": 3, "reward": 0.75}, {"step": 4, "reward": 0.25}]
    assert mean(rare, "reward", range(1, 5)) == mean(often, "reward", range(1, 5)) == 0.75


@pytest.mark.parametrize("name", ["eval_loss", "divergence", "divergence/max"])
def test_less_of_a_loss_is_better(name: str) -> None:
    assert Gate(metric=name).better == "lower" and Gate(metric="reward").better == "higher"
    assert "does not rise" in Gate(metric=name).describe()


def test_bounds_of_a_metric_that_began_below_zero_or_at_zero() -> None:
    gate = Gate(bounds={"reward": [0.5, 2.0]})
    assert gate.problem(log("reward", [-0.5] * 6), *RANGES) is None
    assert "1.5" not in (gate.problem(log("reward", [-0.5] * 3 + [-2.0] * 3), *RANGES) or "")
    assert "of which there are no multiples" in (gate.problem(log("reward", [0.0] * 6), *RANGES) or "")


@pytest.mark.parametrize("metric", ["rewrd", "reward", "eval_loss", "completions/mean_lenght"])
def test_a_gate_on_a_metric_that_nobody_computes_is_refused_before_a_model_loads(tmp_path: Path, metric: str) -> None:
    with pytest.raises(ConfigError, match=f"reads '{metric}', and this run logs no such metric"):
        make_trainer(tmp_path, SnapshotTeacher(3, gate={"metric": metric}), "no/such-model")


def test_a_checkpoint_of_this_run_becomes_the_teacher_at_its_step(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    student = make_student("full").eval()
    teacher = prepared(PastCheckpointTeacher("checkpoint-2"), student)
    first = scores(teacher)
    move(student)
    teacher.after_step(1)
    assert torch.equal(scores(teacher), first)
    move(student)
    assert teacher.after_step(2) == "the teacher is now the student of step 2, and stays so"
    second = scores(teacher)
    move(student)
    teacher.after_step(3)
    assert not torch.equal(first, second) and torch.equal(scores(teacher), second)
    again = prepared(PastCheckpointTeacher("checkpoint-2"), make_student("full").eval())
    again.load_state_dict(teacher.state_dict())
    assert torch.equal(scores(again), second)
