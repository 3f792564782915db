"""Schedules: the level of a row at a step, the level that it falls back to, counts, and that a run resumes."""

from __future__ import annotations

from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_rows, make_tokenizer
from datasets import Dataset
from helpers import logged, make_trainer, returns, snapshot

from opsd import ContextSchedule, EMATeacher, PrivilegedContext, SameCheckpointTeacher
from opsd.contexts.base import Context, ContextCounts
from opsd.contexts.reading import as_context
from opsd.contexts.renderer import PromptRenderer
from opsd.data.needs import check_columns, check_rows
from opsd.errors import ConfigError, DataError, TemplateError

RENDERER = PromptRenderer(make_tokenizer())
ROWS = make_rows(40)


def picked(schedule: ContextSchedule, row: dict[str, Any], rollout_fields: dict[str, Any] | None = None) -> str:
    context = schedule.pick(row, rollout_fields)
    return "none" if context is None else context.name


def decoded(context: Context, row: dict[str, Any]) -> str:
    return RENDERER.tokenizer.decode(context.render(row, renderer=RENDERER))


# ---------------------------------------------------------------- what a level is


def test_a_level_is_a_template_a_mapping_a_context_or_none(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{% block user %}{{ prompt }} Mine: {{ answer }}{% endblock %}")
    part = {"template": "partial_solution", "reveal": 0.3, "truncate_at": "sentence"}
    levels = [part, "worked_solution", str(tmp_path / "mine.jinja"), PrivilegedContext("hint"), "none"]
    row = {
        **ROWS[0],
        "answer": "19",
        "hint": "HINT",
        "solution": "Take tens. Then the ones. Then add all that you have.",
    }
    names = ["partial_solution", "worked_solution", "mine", "hint", "none"]
    words = ["Take tens. …", "Then add all that you have.", "Mine: 19", "HINT", "What is 0"]
    assert list(ContextSchedule(levels).levels) == names
    for number, (name, word) in enumerate(zip(names, words, strict=True)):
        schedule = ContextSchedule(levels[number:])
        assert word in decoded(schedule, row)
        assert schedule.counts.levels[name] == sum(schedule.counts.levels.values()) == 1
    assert "Then the ones" not in decoded(ContextSchedule(levels), row)


@pytest.mark.parametrize(
    "given",
    [
        ["worked_solution", None],
        {"worked_solution": "worked_solution", "none": None},
        {"worked_solution": {"template": "worked_solution"}, "none": "none"},
    ],
)
def test_a_list_of_levels_is_the_mapping_with_their_names(given: Any) -> None:
    assert ContextSchedule(given).description == ContextSchedule(["worked_solution", "none"]).description


def test_controls_say_the_same_as_the_answer_but_for_the_value() -> None:
    row = {**ROWS[0], "answer": "19", "wrong_answer": "18", "other_answer": "7"}
    right = decoded(ContextSchedule(["answer_only"]), row)
    for column in ("wrong_answer", "other_answer"):
        schedule = ContextSchedule([{"template": "answer_only", "fields": {"answer": column}}])
        assert schedule.fields == {column}
        assert decoded(schedule, row) == right.replace("is 19.", f"is {row[column]}.")


@pytest.mark.parametrize(
    ("levels", "way"),
    [
        (["trace"], "'trace' is now written worked_solution"),
        (["answer", "none"], "'answer' is now written answer_only"),
        (["rule"], "'rule' is now written system_rule"),
        (["part"], r"\{template: partial_solution, reveal: 0.3, truncate_at: sentence\}"),
        ({"no": "wrong_answer"}, r"\{template: answer_only, fields: \{answer: wrong_answer\}\}"),
        (["other_answer"], r"\{template: answer_only, fields: \{answer: other_answer\}\}"),
    ],
)
def test_the_old_name_of_a_level_is_answered_with_the_new_way(levels: Any, way: str) -> None:
    with pytest.raises(ConfigError, match=way):
        ContextSchedule(levels)


def test_the_order_of_levels_is_part_of_what_a_resume_compares() -> None:
    levels = ["worked_solution", "answer_only"]
    schedule, reversed_ = ContextSchedule(levels), ContextSchedule(levels[::-1])
    assert schedule.description != reversed_.description and schedule.digest != reversed_.digest


# ---------------------------------------------------------------- which level


def test_fixed_is_the_first_level_at_every_step() -> None:
    schedule = ContextSchedule(["worked_solution", "answer_only"])
    for step in (0, 7):
        schedule.step = step
        assert {picked(schedule, row) for row in ROWS} == {"worked_solution"}


def test_drawn_levels_come_up_at_their_weights_anew_at_each_step_and_repeatably() -> None:
    weights = {"worked_solution": 1.0, "answer_only": 3.0}
    schedule, again = (ContextSchedule(["worked_solution", "answer_only", "none"], weights=weights) for _ in range(2))
    drawn = Counter()
    differs = 0
    for step in range(50):
        schedule.step = again.step = step
        picks = [picked(schedule, row) for row in ROWS]
        assert picks == [picked(again, dict(row)) for row in ROWS]
        differs += step > 0 and picks != last  # noqa: F821
        last = picks  # noqa: F841
        drawn.update(picks)
    assert set(drawn) == {"worked_solution", "answer_only"} and differs == 49
    assert 0.22 < drawn["worked_solution"] / 2000 < 0.28  # 0.25 ± 3 standard errors
    other = ContextSchedule(["worked_solution", "answer_only"], weights=weights, seed=1)
    other.step = again.step
    assert [picked(other, row) for row in ROWS] != [picked(again, row) for row in ROWS]


def test_a_curriculum_changes_level_at_its_steps_and_stays_at_the_last() -> None:
    schedule = ContextSchedule(
        ["worked_solution", "answer_only", "none"], until_step={"worked_solution": 2, "answer_only": 5}
    )
    seen = []
    for step in range(8):
        schedule.step = step
        seen.append(picked(schedule, ROWS[0]))
    assert seen == ["worked_solution"] * 2 + ["answer_only"] * 3 + ["none"] * 3


def test_rows_that_are_answered_right_more_often_are_told_less() -> None:
    schedule = ContextSchedule(
        ["worked_solution", "answer_only", "none"], until_pass_rate={"worked_solution": 0.25, "answer_only": 0.75}
    )
    picks = [picked(schedule, {**ROWS[0], "pass_rate": rate}) for rate in (0, 0.25, 0.3, 0.75, 0.8, 1.0)]
    assert picks == ["worked_solution", "worked_solution", "answer_only", "answer_only", "none", "none"]
    assert picked(schedule, {**ROWS[0], "pass_rate": 1.0}, {"pass_rate": 0.0}) == "worked_solution"
    for rate in (None, "0.5", 1.5, True):
        with pytest.raises(DataError, match="share of right answers"):
            picked(schedule, {**ROWS[0], "pass_rate": rate})


# ---------------------------------------------------------------- rows that lack something


def test_a_row_gets_the_next_level_in_order_that_it_can_fill_and_is_counted() -> None:
    rows = [
        {**row, "solution": row["solution"] if i % 4 else None, "answer": row["answer"] if i % 8 else ""}
        for i, row in enumerate(ROWS)
    ]
    schedule = ContextSchedule(["worked_solution", "answer_only", "none"])
    check_rows(Dataset.from_list(rows), schedule.needs)
    for row in rows:
        level = "worked_solution" if row["solution"] else "answer_only" if row["answer"] else None
        expected = PrivilegedContext(level).render(row, renderer=RENDERER) if level else RENDERER.ids(row["prompt"])
        assert schedule.render(row, renderer=RENDERER) == expected
        assert [context.name for context in schedule.possible_contexts(row)] == ([level] if level else [])
    counts = schedule.counts
    assert (counts.rendered, counts.fell_back) == (40, 10)
    assert counts.levels == {"worked_solution": 30, "answer_only": 5, "none": 5}
    assert counts.metrics["context/fell_back"] == (10, 40)
    assert counts.metrics["context/level/worked_solution"] == (30, 40)
    schedule.forget_counts()
    assert schedule.counts == ContextCounts(levels=dict.fromkeys(schedule.levels, 0))


def test_a_row_never_gets_an_earlier_level() -> None:
    schedule = ContextSchedule(["answer_only", "hint"], weights={"hint": 1})
    with pytest.raises(TemplateError, match="too little for level 'hint'"):
        schedule.render({**ROWS[0], "hint": ""}, renderer=RENDERER)
    assert not schedule.has_fields({**ROWS[0], "hint": ""}) and schedule.has_fields({**ROWS[0], "hint": "h"})


@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        ({"levels": ["worked_solution"]}, [("solution",)]),
        ({"levels": ["worked_solution", "none"]}, []),
        ({"levels": ["worked_solution", "concise"]}, []),  # which reads no column
        ({"levels": ["worked_solution", "answer_only"]}, [("solution", "answer")]),
        ({"levels": ["worked_solution", "hint"], "until_step": {"worked_solution": 9}}, [("hint",)]),
        ({"levels": ["hint", "own_success"]}, [("hint", "feedback", "sibling")]),
        ({"levels": ["answer_only", "hint"], "weights": {"hint": 1, "answer_only": 0}}, [("hint",)]),
        ({"levels": ["hint", "none"], "until_pass_rate": {"hint": 0.5}}, [("pass_rate",)]),
    ],
)
def test_needs_are_what_a_row_must_have_for_each_level_or_a_later_one(
    settings: dict[str, Any], needs: list[tuple[str, ...]]
) -> None:
    assert [need.names for need in as_context(settings).needs] == needs


def test_a_level_of_two_columns_or_a_later_one_of_one_column_needs_two_pairs() -> None:
    """(a and b) or c is (a or c) and (b or c)."""
    both = PrivilegedContext.from_string("{% block user %}{{ a }} {{ b }}{% endblock %}", name="both")
    schedule = ContextSchedule([both, "hint"])
    assert [need.names for need in schedule.needs] == [("a", "hint"), ("b", "hint")]
    for filled in product([0, 1], repeat=3):
        row = {**ROWS[0], **{name: "x" * n for name, n in zip(("a", "b", "hint"), filled, strict=True)}}
        assert schedule.has_fields(row) == all(need.is_met_by(row) for need in schedule.needs)


def test_a_level_that_nothing_can_fill_is_an_error_before_training() -> None:
    schedule = ContextSchedule(["worked_solution", "answer_only"])
    with pytest.raises(DataError, match=r"level 'worked_solution' .*'solution' or 'answer', (?s:.*)with none"):
        check_columns(["prompt", "hint"], schedule.needs)
    rows = Dataset.from_list([ROWS[0], {**ROWS[1], "solution": " ", "answer": None}])
    with pytest.raises(DataError, match=r"'solution' or 'answer', which is empty in 1 row .*: 1\.\n(?s:.*)with none"):
        check_rows(rows, schedule.needs)
    by_rate = ContextSchedule(["none", "answer_only"], until_pass_rate={"none": 0.5})
    with pytest.raises(DataError, match=r"by pass rate needs the column 'pass_rate'(?s:.*)measure it"):
        check_columns(["prompt", "answer"], by_rate.needs)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"levels": []}, "levels is a list of contexts"),
        ({"levels": "hint"}, "levels is a list of contexts"),
        ({"levels": ["hint", 3]}, "not int"),
        ({"levels": ["hint"], "weights": {"answer_only": 1}}, "names the level 'answer_only' and has: hint"),
        ({"levels": ["worked_solution"], "until_step": {"trace": 1}}, "'trace' is now written worked_solution"),
        ({"levels": ["hint", "none"], "weights": {"hint": 1}, "until_step": {"hint": 1}}, "one rule"),
        ({"levels": ["hint", "none"], "weights": {"hint": -1, "none": 2}}, "not negative"),
        ({"levels": ["hint", "none"], "weights": {"hint": 0}}, "not all 0"),
        ({"levels": ["hint", "none"], "until_step": {"hint": 5, "none": 5}}, "must rise"),
        ({"levels": ["hint", "none"], "until_step": {"hint": "5"}}, "must be a number"),
        ({"levels": ["hint", {"template": "hint", "reveal": 0.5}]}, "two levels are called 'hint'. Name them"),
        ({"levels": {"a": {"levels": ["hint"]}}}, "itself a schedule"),
        ({"levels": [ContextSchedule(["hint"])]}, "itself a schedule"),
        ({"levels": ["hint"], "weigths": {}}, "Did you mean 'weights'"),
    ],
)
def test_a_schedule_that_cannot_work_is_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        as_context(settings)


def test_a_level_that_is_no_template_is_refused() -> None:
    with pytest.raises(TemplateError, match=r"'hnit'\. Did you mean 'hint'"):
        as_context({"levels": ["hnit"]})


# ---------------------------------------------------------------- in a run


def test_a_curriculum_moves_with_the_steps_of_a_run_and_is_logged(tmp_path: Path) -> None:
    schedule = ContextSchedule(["worked_solution", "answer_only"], until_step={"worked_solution": 2})
    trainer = make_trainer(tmp_path, SameCheckpointTeacher(context=schedule), max_steps=4)
    trainer.train()
    assert logged(trainer, "context/level/worked_solution") == [1.0, 1.0, 0.0, 0.0]
    assert logged(trainer, "context/level/answer_only") == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.slow
def test_a_run_with_a_drawn_schedule_resumes_to_the_same_weights(tmp_path: Path) -> None:
    def teacher() -> EMATeacher:
        return EMATeacher(
            0.8,
            context={
                "levels": ["worked_solution", "answer_only", "none"],
                "weights": {"worked_solution": 1, "answer_only": 1, "none": 1},
            },
        )

    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tmp_path / "whole", teacher(), **settings)
    whole.train()
    again = make_trainer(tmp_path / "whole", teacher(), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, value in snapshot(whole.model).items():
        assert torch.equal(value, dict(again.model.named_parameters())[name]), name


def test_a_run_measures_the_pass_rate_of_a_group_itself(tmp_path: Path) -> None:
    schedule = ContextSchedule(["answer_only", "none"], until_pass_rate={"answer_only": 0.5})
    rewards = returns([1.0, 0.0, 1.0, 1.0])
    teacher = SameCheckpointTeacher(context=schedule)
    trainer = make_trainer(tmp_path, teacher, reward_funcs=rewards, num_generations=2, max_steps=1)
    trainer.train()
    # the first group is right half the time, the second always
    assert logged(trainer, "context/level/answer_only") == [0.5]


def test_a_schedule_in_yaml_is_the_schedule_in_python() -> None:
    settings = {
        "levels": {"all": "worked_solution", "some": {"template": "worked_solution", "reveal": 0.5}, "no": None}
    }
    context = as_context({**settings, "until_step": {"all": 3, "some": 6}})
    assert isinstance(context, ContextSchedule)
    assert context.fields == frozenset() and context.optional_fields == {"solution"}
    assert isinstance(context.levels["some"], PrivilegedContext) and context.levels["no"] is None
    assert as_context(settings).digest == as_context(dict(settings)).digest
    assert as_context(settings).digest != context.digest


def test_rows_are_checked_with_the_schedule_before_a_model_loads(tmp_path: Path) -> None:
    rows = Dataset.from_list([{**row, "solution": None} for row in make_rows(8)])
    with pytest.raises(DataError, match="empty in 8 rows of the train dataset: 0, 1, 2, 3, 4 and 3 more"):
        make_trainer(tmp_path, SameCheckpointTeacher(context={"levels": ["worked_solution", "hint"]}), rows=rows)


def test_a_level_that_comes_later_is_checked_before_step_1(tmp_path: Path) -> None:
    rows = Dataset.from_list([{**row, "solution": "word " * 600} for row in make_rows()])
    levels = ["answer_only", "worked_solution"]
    for rule in {"until_step": {"answer_only": 1}}, {"weights": {"answer_only": 9, "worked_solution": 1}}:
        with pytest.raises(DataError, match="together more than the 512 tokens"):
            make_trainer(tmp_path, SameCheckpointTeacher(context={"levels": levels, **rule}), rows=rows)
    # without a rule no row gets the second level, since every row fills the first
    make_trainer(tmp_path, SameCheckpointTeacher(context={"levels": levels}), rows=rows)


def test_an_evaluation_after_a_step_is_shown_that_steps_level(tmp_path: Path) -> None:
    schedule = ContextSchedule(["answer_only", "none"], until_step={"answer_only": 2})
    rows = Dataset.from_list(make_rows(16)[12:])
    teacher = SameCheckpointTeacher(context=schedule)
    make_trainer(tmp_path, teacher, eval_rows=rows, eval_strategy="steps", eval_steps=2).train()
    assert schedule.step == 2 and picked(schedule, rows[0]) == "none"


def test_a_rate_that_was_measured_before_training_wins_in_every_preview(tmp_path: Path) -> None:
    schedule = ContextSchedule(["worked_solution", "none"], until_pass_rate={"worked_solution": 0.5})
    rows = Dataset.from_list([{**row, "pass_rate": 1.0} for row in make_rows()])
    teacher = SameCheckpointTeacher(context=schedule)
    settings = {"reward_funcs": returns([0.0] * 4), "num_generations": 2, "max_steps": 1}
    trainer = make_trainer(tmp_path, teacher, rows=rows, **settings)
    assert "A correct solution" not in trainer.run_card["prompts"][0]["teacher"][0]["prompt"]
    trainer.train()
    assert logged(trainer, "context/level/none") == [1.0]
