"""Levels of help: which one a row gets at a step, what it falls back to, what is counted, and that it resumes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_rows, make_tokenizer
from datasets import Dataset
from helpers import logged, make_trainer, returns, snapshot

from opsd import ContextSchedule, EMATeacher, PrivilegedContext, SameCheckpointTeacher
from opsd.contexts.privileged import Context
from opsd.contexts.renderer import PromptRenderer
from opsd.contexts.schedule import LEVELS
from opsd.errors import ConfigError, DataError, TemplateError

SIDE = PromptRenderer(make_tokenizer())
ROWS = make_rows(40)


def test_every_named_level_renders_and_shows_what_it_is_called_after() -> None:
    shown = ("rule", "hint", "outline", "critique", "sibling", "demonstration", "feedback", "answer")
    row = {**ROWS[0], **{name: name.upper() for name in shown}, "wrong_answer": "WRONG", "other_answer": "OTHER"}
    row["solution"] = "Take tens. Then take the ones of both numbers. Then add all that you have."
    words = {
        "none": "What is 0", "rule": "RULE", "answer": "ANSWER", "hint": "HINT", "outline": "OUTLINE",
        "part": "Take tens. …", "trace": "Then add all", "critique": "CRITIQUE", "demonstration": "DEMONSTRATION",
        "own_success": "SIBLING", "feedback": "FEEDBACK", "wrong_answer": "WRONG", "other_answer": "OTHER",
    }  # fmt: skip
    assert list(words) == list(LEVELS)
    for level, word in words.items():
        schedule = ContextSchedule([level])
        text = SIDE.tokenizer.decode(schedule.render(row, side=SIDE))
        assert word in text, level
        assert schedule.counts.levels == {level: 1}
    assert "Then take the ones" not in SIDE.tokenizer.decode(ContextSchedule(["part"]).render(row, side=SIDE))


def test_controls_say_the_same_as_the_answer_but_for_the_value() -> None:
    row = {**ROWS[0], "answer": "19", "wrong_answer": "18", "other_answer": "7"}
    texts = [
        SIDE.tokenizer.decode(ContextSchedule([name]).render(row, side=SIDE))
        for name in ("answer", "wrong_answer", "other_answer")
    ]
    assert texts[1] == texts[0].replace("is 19.", "is 18.") and texts[2] == texts[0].replace("is 19.", "is 7.")


# ---------------------------------------------------------------- which level


def test_fixed_is_the_first_level_at_every_step() -> None:
    schedule = ContextSchedule(["trace", "answer"])
    for step in (0, 7):
        schedule.step = step
        assert {schedule.pick(row) for row in ROWS} == {"trace"}


def test_drawn_levels_come_up_at_their_weights_anew_at_each_step_and_repeatably() -> None:
    weights = {"trace": 1.0, "answer": 3.0}
    schedule, again = (ContextSchedule(["trace", "answer", "none"], weights=weights) for _ in range(2))
    drawn = Counter()
    differs = 0
    for step in range(50):
        schedule.step = again.step = step
        picks = [schedule.pick(row) for row in ROWS]
        assert picks == [again.pick(dict(row)) for row in ROWS]
        differs += step > 0 and picks != last  # noqa: F821
        last = picks  # noqa: F841
        drawn.update(picks)
    assert set(drawn) == {"trace", "answer"} and differs == 49
    assert 0.22 < drawn["trace"] / 2000 < 0.28  # 0.25 ± 3 standard errors
    other = ContextSchedule(["trace", "answer"], weights=weights, seed=1)
    other.step = again.step
    assert [other.pick(row) for row in ROWS] != [again.pick(row) for row in ROWS]


def test_a_curriculum_changes_level_at_its_steps_and_stays_at_the_last() -> None:
    schedule = ContextSchedule(["trace", "answer", "none"], until_step={"trace": 2, "answer": 5})
    seen = []
    for step in range(8):
        schedule.step = step
        seen.append(schedule.pick(ROWS[0]))
    assert seen == ["trace"] * 2 + ["answer"] * 3 + ["none"] * 3


def test_rows_that_are_answered_right_more_often_are_told_less() -> None:
    schedule = ContextSchedule(["trace", "answer", "none"], until_pass_rate={"trace": 0.25, "answer": 0.75})
    picks = [schedule.pick({**ROWS[0], "pass_rate": rate}) for rate in (0, 0.25, 0.3, 0.75, 0.8, 1.0)]
    assert picks == ["trace", "trace", "answer", "answer", "none", "none"]
    assert schedule.pick({**ROWS[0], "pass_rate": 1.0}, {"pass_rate": 0.0}) == "trace"
    for rate in (None, "0.5", 1.5, True):
        with pytest.raises(DataError, match="share of right answers"):
            schedule.pick({**ROWS[0], "pass_rate": rate})


# ---------------------------------------------------------------- rows that lack something


def test_rows_lacking_what_a_level_needs_fall_back_and_are_counted() -> None:
    rows = [
        {**row, "solution": row["solution"] if i % 4 else None, "answer": row["answer"] if i % 8 else ""}
        for i, row in enumerate(ROWS)
    ]
    schedule = ContextSchedule(["trace", "answer", "none"], fallback={"trace": "answer", "answer": "none"})
    schedule.check_columns(["prompt", "solution", "answer"])
    schedule.check_rows(rows)
    for row in rows:
        ids = schedule.render(row, side=SIDE)
        wanted = "trace" if row["solution"] else "answer" if row["answer"] else "none"
        same = SIDE.ids(row["prompt"]) if wanted == "none" else ContextSchedule([wanted]).render(row, side=SIDE)
        assert ids == same
    counts = schedule.counts
    assert (counts.rendered, counts.fell_back, dict(counts.levels)) == (40, 10, {"none": 5, "trace": 30, "answer": 5})
    assert counts.metrics["context/fell_back"] == 0.25 and counts.metrics["context/level/trace"] == 0.75
    schedule.forget_counts()
    assert schedule.counts.rendered == schedule.counts.fell_back == sum(schedule.counts.levels.values()) == 0


def test_a_level_that_nothing_can_fill_is_an_error_before_training() -> None:
    schedule = ContextSchedule(["trace", "none"])
    with pytest.raises(TemplateError, match=r"level 'trace'.*'solution'(?s:.*)fallback="):
        schedule.check_columns(["prompt", "answer"])
    with pytest.raises(TemplateError, match="row 1 has too little for level 'trace'"):
        schedule.check_rows([ROWS[0], {**ROWS[1], "solution": " "}])
    ContextSchedule(["trace", "none"], fallback={"trace": "none"}).check_columns(["prompt"])
    with pytest.raises(DataError, match=r"'pass_rate'.*Measure it"):
        ContextSchedule(["none", "answer"], until_pass_rate={"none": 0.5}).check_columns(["prompt", "answer"])


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"levels": []}, "levels is a list of names"),
        ({"levels": "trace"}, "levels is a list of names"),
        ({"levels": ["trase"]}, "'trase'. Did you mean 'trace'"),
        ({"levels": ["trace"], "weights": {"answer": 1}}, "names the level 'answer' and has: trace"),
        ({"levels": ["trace", "none"], "weights": {"trace": 1}, "until_step": {"trace": 1}}, "one rule"),
        ({"levels": ["trace", "none"], "weights": {"trace": -1, "none": 2}}, "not negative"),
        ({"levels": ["trace", "none"], "weights": {"trace": 0}}, "not all 0"),
        ({"levels": ["trace", "none"], "until_step": {"trace": 5, "none": 5}}, "must rise"),
        ({"levels": ["trace", "none"], "until_step": {"trace": "5"}}, "must be a number"),
        ({"levels": ["trace", "answer"], "fallback": {"trace": "answer", "answer": "trace"}}, "leads back"),
        ({"levels": ["trace"], "fallback": {"trace": "non"}}, "names the level 'non'"),
        ({"levels": {"a": {"levels": ["trace"]}}}, "itself a schedule"),
        ({"levels": ["trace"], "weigths": {}}, "Did you mean 'weights'"),
    ],
)
def test_a_schedule_that_cannot_work_is_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Context.of(settings)


# ---------------------------------------------------------------- in a run


def test_a_curriculum_moves_with_the_steps_of_a_run_and_is_logged(tmp_path: Path) -> None:
    schedule = ContextSchedule(["trace", "answer"], until_step={"trace": 2})
    trainer = make_trainer(tmp_path, SameCheckpointTeacher(context=schedule), max_steps=4)
    trainer.train()
    assert logged(trainer, "context/level/trace") == [1.0, 1.0, 0.0, 0.0]
    assert logged(trainer, "context/level/answer") == [0.0, 0.0, 1.0, 1.0]


def test_a_run_with_a_drawn_schedule_resumes_to_the_same_weights(tmp_path: Path) -> None:
    def teacher() -> EMATeacher:
        return EMATeacher(
            0.8, context={"levels": ["trace", "answer", "none"], "weights": {"trace": 1, "answer": 1, "none": 1}}
        )

    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tmp_path / "whole", teacher(), **settings)
    whole.train()
    again = make_trainer(tmp_path / "whole", teacher(), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, value in snapshot(whole.model).items():
        assert torch.equal(value, dict(again.model.named_parameters())[name]), name


def test_a_run_measures_the_pass_rate_of_a_group_itself(tmp_path: Path) -> None:
    schedule = ContextSchedule(["answer", "none"], until_pass_rate={"answer": 0.5})
    rewards = returns([1.0, 0.0, 1.0, 1.0])
    teacher = SameCheckpointTeacher(context=schedule)
    trainer = make_trainer(tmp_path, teacher, reward_funcs=rewards, num_generations=2, max_steps=1)
    trainer.train()
    # the first group is right half the time, the second always
    assert logged(trainer, "context/level/answer") == [0.5]


def test_a_schedule_in_yaml_is_the_schedule_in_python() -> None:
    settings = {
        "levels": {"all": "worked_solution", "some": {"template": "worked_solution", "reveal": 0.5}, "no": None}
    }
    context = Context.of({**settings, "until_step": {"all": 3, "some": 6}})
    assert isinstance(context, ContextSchedule)
    assert context.fields == frozenset() and context.optional_fields == {"solution"}
    assert isinstance(context.levels["some"], PrivilegedContext) and context.levels["no"] is None
    assert PrivilegedContext.of(settings).digest == PrivilegedContext.of(dict(settings)).digest
    assert PrivilegedContext.of(settings).digest != context.digest


def test_rows_are_checked_with_the_schedule_before_a_model_loads(tmp_path: Path) -> None:
    rows = Dataset.from_list([{**row, "solution": None} for row in make_rows(8)])
    with pytest.raises(TemplateError, match="row 0 has too little"):
        make_trainer(tmp_path, SameCheckpointTeacher(context={"levels": ["trace", "none"]}), rows=rows)


def test_a_level_that_comes_later_is_checked_before_step_1(tmp_path: Path) -> None:
    rows = Dataset.from_list([{**row, "solution": "word " * 600} for row in make_rows()])
    rules = {"until_step": {"answer": 1}}, {"weights": {"answer": 9, "trace": 1}}, {"fallback": {"answer": "trace"}}
    for rule in rules:
        teacher = SameCheckpointTeacher(context={"levels": ["answer", "trace"], **rule})
        if "fallback" in rule:
            make_trainer(tmp_path, teacher, rows=rows)  # no row falls back
        else:
            with pytest.raises(DataError, match="together more than the 512 tokens"):
                make_trainer(tmp_path, teacher, rows=rows)


def test_a_level_of_weight_0_needs_nothing() -> None:
    ContextSchedule(["answer", "trace"], weights={"answer": 1, "trace": 0}).check_columns(["prompt", "answer"])


def test_an_evaluation_after_a_step_is_shown_that_steps_level(tmp_path: Path) -> None:
    schedule = ContextSchedule(["answer", "none"], until_step={"answer": 2})
    rows = Dataset.from_list(make_rows(16)[12:])
    teacher = SameCheckpointTeacher(context=schedule)
    make_trainer(tmp_path, teacher, eval_rows=rows, eval_strategy="steps", eval_steps=2).train()
    assert schedule.step == 2 and schedule.pick(rows[0]) == "none"


def test_a_rate_that_was_measured_before_training_wins_in_every_preview(tmp_path: Path) -> None:
    schedule = ContextSchedule(["trace", "none"], until_pass_rate={"trace": 0.5})
    rows = Dataset.from_list([{**row, "pass_rate": 1.0} for row in make_rows()])
    teacher = SameCheckpointTeacher(context=schedule)
    settings = {"reward_funcs": returns([0.0] * 4), "num_generations": 2, "max_steps": 1}
    trainer = make_trainer(tmp_path, teacher, rows=rows, **settings)
    assert "A correct solution" not in trainer.run_card["prompts"][0]["teacher"][0]["prompt"]
    trainer.train()
    assert logged(trainer, "context/level/none") == [1.0]
