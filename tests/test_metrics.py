"""Every metric that a run logs stands in the table, and the table says where it is made."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import make_llama, make_rows, make_tokenizer
from datasets import Dataset
from helpers import MAKE_TEACHER, make_args, make_trainer

import opsd
from opsd import MixtureTeacher, OPSDTrainer, SameCheckpointTeacher, SiblingTeacher, SnapshotTeacher
from opsd.training.metrics import METRICS, as_markdown, find_metric, gate_metrics

DOCUMENT = Path(__file__).parents[1] / "docs" / "metrics.md"
TOP_K = {"support": "student_top_k", "support_k": 5, "beta": 0.5}
SCHEDULE = {
    "levels": {"answer": "answer_only", "solution": "worked_solution"},
    "weights": {"answer": 1.0, "solution": 1.0},
}
SETS = ("one", "two")
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}
EXCHANGES = 6  # a step: four in TRL's sampling, the number of scored tokens, the metrics


def other_rows() -> list[dict[str, Any]]:
    return [{**row, "prompt": [{"role": "user", "content": f"Other {n}"}]} for n, row in enumerate(make_rows(4))]


def low_ids(completion_ids: Any, **columns: Any) -> list[float]:
    return [float(ids[0] < 200) for ids in completion_ids]


def same_checkpoint() -> SameCheckpointTeacher:
    return SameCheckpointTeacher(context="answer_only")


# name -> (teacher, settings), each with metrics that the others do not log
RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (same_checkpoint, {"include_num_input_tokens_seen": "all", "skip_memory_metrics": False}),
    "groups and rewards": (
        lambda: SameCheckpointTeacher(context="own_success"),
        {"reward_funcs": [low_ids, low_ids], "num_generations": 2, "distill_on": "wrong", "grpo_coef": 0.1},
    ),
    "schedule of contexts": (lambda: SameCheckpointTeacher(context=SCHEDULE), {}),
    "off-policy": (lambda: SiblingTeacher(make_llama(5), tokenizer=make_tokenizer()), {"lmbda": 0.5, "seq_kd": True}),
    "schedules": (
        lambda: SiblingTeacher(make_llama(5), tokenizer=make_tokenizer()),
        {"lmbda_schedule": {0: 0.0, 1: 1.0}, "seq_kd": True, "completion_length_schedule": {0: 4, 1: 6}},
    ),
    "a teacher that leads": (same_checkpoint, {"reward_funcs": low_ids, "num_generations": 2, "teacher_lead": 0.0}),
    "served": (MAKE_TEACHER["served"], {}),
    "snapshot with a gate": (MAKE_TEACHER["snapshot"], {}),
    "mixture of snapshots": (lambda: MixtureTeacher([SnapshotTeacher(1), SnapshotTeacher(2)], [0.5, 0.5]), {}),
    "top-k support": (same_checkpoint, {**TOP_K, "tail": "bucket", "entry_clip": 0.1}),
    "clips, gate and reference": (same_checkpoint, {"token_clip": 0.5, "entropy_gate": 1.0, "ref_kl_coef": 0.1}),
    "token selection": (same_checkpoint, {"keep_fraction": 0.5, "skip_first_tokens": 1}),
    "samples of older weights": (same_checkpoint, {"steps_per_generation": 4, "importance_clip": 1.0}),
    "sampled": (same_checkpoint, {"support": "sampled", "reward_to_go": "discounted"}),
    "long rollouts that loop": (same_checkpoint, {"max_completion_length": 24, "temperature": 0.02}),
    "evaluation rows": (same_checkpoint, {"eval_rows": Dataset.from_list(other_rows()), **EVALUATED}),
    "named evaluation rows": (
        same_checkpoint,
        {"eval_rows": {name: Dataset.from_list(other_rows()) for name in SETS}, **EVALUATED},
    ),
}
WITHOUT_A_RUN = {"tools/call_frequency", "tools/failure_frequency"}  # tests/test_tools.py has one


def plain_run(folder: Path, teacher: Any, settings: dict[str, Any]) -> OPSDTrainer:
    return make_trainer(folder, teacher(), per_device_eval_batch_size=2, **settings)


def run_with_plan(folder: Path) -> OPSDTrainer:
    rows = other_rows()
    return OPSDTrainer(
        make_llama(0),
        same_checkpoint(),
        args=make_args(folder),
        train_dataset=Dataset.from_list(make_rows()),
        processing_class=make_tokenizer(),
        evaluation={"test": rows[:2], "selection": rows[2:], "every": 1, "grader": "last_number"},
    )


@pytest.mark.slow
def test_every_logged_metric_is_in_the_table_and_every_row_of_it_is_logged(tmp_path: Path) -> None:
    make: dict[str, Callable[[Path], OPSDTrainer]] = {
        name: partial(plain_run, teacher=teacher, settings=settings) for name, (teacher, settings) in RUNS.items()
    }
    make |= {"evaluation plan": run_with_plan}
    used: set[str] = set()
    for name, run in make.items():
        trainer = run(tmp_path / name)
        trainer.train()
        metrics = {key: find_metric(key, SETS) for entry in trainer.state.log_history for key in entry}
        assert [key for key, metric in metrics.items() if metric is None] == [], name
        used |= {metric.name for metric in metrics.values() if metric}
    assert {metric.name for metric in METRICS} - used == WITHOUT_A_RUN


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_the_file_that_makes_a_metric_names_it(metric: Any) -> None:
    if "/" not in metric.made_in:
        assert metric.made_in in ("trl", "transformers")
        return
    source = (Path(opsd.__file__).parent / metric.made_in).read_text()
    stem = re.split(r"\{\w+\}", metric.name)[0].removesuffix("teacher/")
    assert stem.removeprefix("eval_") in source


def test_the_document_has_the_table() -> None:
    """Write it anew: python -c "from opsd.training.metrics import as_markdown; print(as_markdown())"."""
    assert as_markdown() in DOCUMENT.read_text()


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("divergence", "divergence"),
        ("eval_divergence", "divergence"),
        ("eval_hard_rewards/exact", "rewards/{function}"),
        ("context/level/outline", "context/level/{level}"),
        ("teacher/snapshot_of_step/1", "teacher/{metric}/{part}"),
        ("eval_runtime", "{phase}_runtime"),
        ("divergences", None),
        ("eval_soft_divergence", None),
        ("rewards/", None),
    ],
)
def test_a_logged_key_is_found_by_its_pattern(key: str, name: str | None) -> None:
    metric = find_metric(key, ["hard"])
    assert (metric.name if metric else None) == name


def test_names_are_unique() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_a_gate_reads_rewards_only_where_there_are_reward_functions() -> None:
    plain, rewarded = gate_metrics([]), gate_metrics(["exact"])
    assert "divergence" in plain and "loss" not in plain and "reward" not in plain
    assert set(rewarded) - set(plain) >= {"reward", "rewards/exact", "group/flat"}
    assert not any("{" in name for name in rewarded)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_a_step_exchanges_its_metrics_once(micro_batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL gathers twice in every micro-batch, and a GPU's host waits each time."""
    calls: list[Any] = []
    gather = Accelerator.gather

    def counted(self: Accelerator, tensor: Any) -> Any:
        calls.append(tensor)
        return gather(self, tensor)

    monkeypatch.setattr(Accelerator, "gather", counted)
    sizes = {"per_device_train_batch_size": 8 // micro_batches, "gradient_accumulation_steps": micro_batches}
    trainer = make_trainer(tmp_path, "ema", max_steps=2, **sizes)
    before = len(calls)
    trainer.train()
    assert len(calls) - before == 2 * EXCHANGES


def test_an_evaluation_after_a_step_that_broke_off_counts_nothing_of_it(tmp_path: Path) -> None:
    """The record of a micro-batch before an out-of-memory error was added to the first evaluation batch."""
    rows = Dataset.from_list(other_rows())
    trainer = make_trainer(tmp_path, "ema", eval_rows=rows, max_steps=2, learning_rate=0.0)
    expected = trainer.evaluate()["eval_loss"]
    scorer, calls = trainer.scorer, []

    def breaking(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        return scorer(*args)

    trainer.scorer = breaking  # type: ignore[assignment]
    for name in ("score", "prepare_rollouts", "in_order", "context_metrics", "selection", "objective"):
        setattr(breaking, name, getattr(scorer, name))
    with pytest.raises(MemoryError):
        trainer.train()
    trainer.scorer = scorer
    torch.manual_seed(trainer.args.seed)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=0.5)


def test_settings_that_a_trainer_derives_stay_out_of_the_users_object(tmp_path: Path) -> None:
    """One OPSDConfig may serve several runs."""
    args = make_args(tmp_path)
    make_llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    trainer = OPSDTrainer(str(tmp_path / "model"), "ema", args=args, train_dataset=Dataset.from_list(make_rows()))
    assert trainer.args.model_init_kwargs and args.model_init_kwargs is None
