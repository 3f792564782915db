"""Prompts are distilled where the teacher's own answer verifiably leads (SKALD)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import make_trainer

from opsd import SameCheckpointTeacher
from opsd.errors import ConfigError
from opsd.rollouts import Rollouts
from opsd.training.groups import Groups
from opsd.training.rewards import Rewards

STATE = SimpleNamespace(global_step=0)


def test_a_prompt_is_distilled_only_where_the_teachers_own_answer_leads() -> None:
    """Four prompts of two rollouts; the teacher is right, wrong, right and unknown, the student 0, 0, 1/2 and 0."""
    student, teacher = [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, None]
    asked: list[Any] = []

    def reward(completions: Any, **columns: Any) -> list[float | None]:
        return teacher if len(completions) == 4 else student

    def answer(rows: Any) -> list[list[int]]:
        asked.extend(row["prompt"] for row in rows)
        return [[7]] * len(rows)

    rows = [{"prompt": f"prompt {n // 2}", "answer": "19"} for n in range(8)]
    rollouts = Rollouts(rows, [[1]] * 8, [[5]] * 8)
    distilled = {}
    for lead in (0.0, 0.5):
        groups = Groups(Rewards.parse(reward, None), num_generations=2, teacher_lead=lead)
        found, values = groups.grade(rollouts, lambda ids: ["text"] * len(ids), lambda row, made: True, STATE, answer)
        distilled[lead] = found.is_distilled
        assert values["lead/teacher"][:6] == [1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
        assert values["lead/withheld"] == [float(not chosen) for chosen in found.is_distilled]
    assert asked[:4] == ["prompt 0", "prompt 1", "prompt 2", "prompt 3"], "one answer per prompt"
    assert distilled[0.0] == [True, True, False, False, True, True, False, False]
    assert distilled[0.5] == [True, True, False, False, False, False, False, False], "more than the lead asked for"


LEADS_REFUSED = {
    "no rewards": ({}, "answer_only", "there is no reward function"),
    "a context that reads rollouts": (
        {"reward_funcs": "exact", "num_generations": 2},
        "own_success",
        "reads feedback, ",
    ),
}


@pytest.mark.parametrize(("settings", "context", "says"), LEADS_REFUSED.values(), ids=LEADS_REFUSED)
def test_a_lead_that_cannot_be_verified_is_refused(
    settings: dict[str, Any], context: str, says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        make_trainer(tmp_path, SameCheckpointTeacher(context=context), teacher_lead=0.0, **settings)
