"""The order of a generation batch: rollouts of one prompt stand together where that computes fewer tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import make_rows
from datasets import Dataset
from helpers import make_trainer

from opsd import SameCheckpointTeacher
from opsd.models.forward import counting_passes
from opsd.rollouts import Rollouts
from opsd.training.micro_batches import in_order

READER = "teacher"


def rollouts(prompts: list[list[int]], lengths: list[int], shown: list[list[int]]) -> Rollouts:
    rows = [{"number": number} for number in range(len(prompts))]
    return Rollouts(rows, prompts, [[5] * length for length in lengths], teacher_prompt_ids={READER: shown})


def numbers(made: Rollouts) -> list[int]:
    return [row["number"] for row in made.rows]


def test_rollouts_of_a_long_prompt_stand_together_and_others_longest_first() -> None:
    lengths = [30, 10, 29, 9, 28, 8, 27, 7]
    long = [list(range(place % 2, 3000 + place % 2)) for place in range(8)]
    grouped = rollouts([[1]] * 8, lengths, long)
    assert numbers(in_order(grouped, 2)) == [0, 2, 4, 6, 1, 3, 5, 7]
    mixed = rollouts([[1]] * 8, [30, 10, 9, 29, 28, 8, 7, 27], [long[place // 2 % 2] for place in range(8)])
    assert numbers(in_order(mixed, 2)) == [0, 4, 1, 5, 3, 7, 2, 6]
    by_length = numbers(mixed.sorted_by_length())
    assert numbers(in_order(mixed, 8)) == by_length, "one row in each: no two could share anything"
    short = rollouts([[1]] * 8, [30, 10, 9, 29, 28, 8, 7, 27], [[place // 2 % 2] for place in range(8)])
    assert numbers(in_order(short, 2)) == by_length, "prompts too short to matter"


@pytest.mark.parametrize("together", [True, False])
def test_a_run_computes_a_long_trace_once_per_group(
    together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups of four in micro-batches of four: a prefix in each, whatever the rollouts' lengths."""
    monkeypatch.setattr("opsd.models.passes.PASS", 16)
    if not together:
        monkeypatch.setattr("opsd.training.loss.in_order", lambda made, parts, **rule: made.sorted_by_length())
    rows = [{**make_rows(1)[0], "solution": f"{number} is it. " * 30} for number in range(8)]
    trainer = make_trainer(
        tmp_path, SameCheckpointTeacher(context="worked_solution"), rows=Dataset.from_list(rows), num_generations=4,
        max_steps=1,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, max_completion_length=8,
    )  # fmt: skip
    score, counts = trainer.teacher.score, list[list[int]]()
    generate = trainer._generate_and_score_completions

    def uneven(inputs: object) -> Rollouts:
        made: Rollouts = generate(inputs)
        cut = [ids[: 1 + 7 * (number % 2)] for number, ids in enumerate(made.completion_ids)]
        return replace(made, completion_ids=cut, loss_mask=[[1] * len(ids) for ids in cut])

    trainer._generate_and_score_completions = uneven

    def counted(rollouts: Rollouts) -> object:
        with counting_passes() as made:
            signal = score(rollouts)
        counts.append(made)
        return signal

    trainer.teacher.score = counted  # type: ignore[method-assign]
    trainer.train()
    assert len(counts) == 2
    assert counts == [[0, 4] if together else [0, 2, 0, 2]] * 2
