"""NaN is an empty value behind every door: files, datasets, streams, contexts, rewards, graders, the doctor.

pandas, Arrow and Python's own JSON write NaN where there is no value; as text it would be the answer "nan".
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import make_rows, make_tokenizer
from datasets import Dataset
from helpers import make_trainer, returns

from opsd import PrivilegedContext, SameCheckpointTeacher
from opsd.contexts.renderer import PromptRenderer
from opsd.data.files import load_rows
from opsd.data.needs import Need
from opsd.data.prepare import prepare_rows
from opsd.doctor import examine
from opsd.errors import DataError, TemplateError
from opsd.evaluation.graders import grade
from opsd.evaluation.plan import EvaluationPlan

NAN = float("nan")
VERL = {"template": "answer_only", "fields": {"answer": "reward_model.ground_truth"}}


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows(*answers: Any, **columns: Callable[[Any], Any]) -> list[dict[str, Any]]:
    made = []
    for number, answer in enumerate(answers):
        row: dict[str, Any] = {"prompt": [{"role": "user", "content": f"What is {number} + 1?"}], "answer": answer}
        made.append({**row, **{name: value(answer) for name, value in columns.items()}})
    return made


def jsonl(folder: Path, *answers: str) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "{number}?", "answer": {each}}}\n' for number, each in enumerate(answers)))
    return str(path)


def test_nan_is_none_in_every_column_of_prepared_rows() -> None:
    made = rows(NAN, 2.0, nested=lambda answer: {"truth": answer}, several=lambda answer: [answer, 1.0])
    for dataset in (Dataset.from_list(made), Dataset.from_list(made).to_iterable_dataset()):
        first, second = prepare_rows(dataset)
        assert (first["answer"], first["nested"], first["several"]) == (None, {"truth": None}, [None, 1.0])
        assert (second["answer"], second["nested"], second["several"]) == (2.0, {"truth": 2.0}, [2.0, 1.0])


@pytest.mark.parametrize("streaming", [False, True])
def test_nan_in_json_is_null_and_text_beside_it_stays_text(tmp_path: Path, streaming: bool) -> None:
    """A column of text with NaN was typed as a mixture, and "007" came back as the number 7."""
    loaded = load_rows(jsonl(tmp_path, "NaN", '"007"'), streaming=streaming)
    assert [row["answer"] for row in loaded] == [None, "007"]


def test_a_row_without_an_answer_is_refused_and_its_number_named() -> None:
    needs = [Need(("answer",), "a template", "It is shown.")]
    with pytest.raises(DataError, match="is empty in 2 rows of the train dataset: 0, 2"):
        prepare_rows(Dataset.from_list(rows(NAN, 1.0, NAN)), needs=needs)


@pytest.mark.parametrize("context", ["answer_only", VERL])
def test_a_run_does_not_show_nan_to_its_teacher(tmp_path: Path, context: Any) -> None:
    made = rows(NAN, 2.0, 3.0, 4.0, reward_model=lambda answer: {"ground_truth": answer})
    with pytest.raises(DataError, match=r"is empty in 1 row of the train dataset: 0"):
        make_trainer(tmp_path, SameCheckpointTeacher(context=context), rows=Dataset.from_list(made))


def test_a_context_that_is_rendered_by_hand_reads_nan_as_empty() -> None:
    (row,) = rows(NAN, reward_model=lambda answer: {"ground_truth": answer})
    for context in ("answer_only", VERL):
        with pytest.raises(TemplateError, match="which is empty here"):
            PrivilegedContext(**(context if isinstance(context, dict) else {"template": context})).messages(row)
    source = "{% block user %}{{ prompt }}{% if answer is defined %} ({{ answer }}){% endif %}{% endblock %}"
    optional = PrivilegedContext.from_string(source)
    assert optional.messages(row)[0] == row["prompt"]
    assert optional.render(row, renderer=PromptRenderer(make_tokenizer()))


@pytest.mark.parametrize("value", [{"truth": NAN, "unit": "m"}, {"truth": None, "unit": "m"}])
def test_a_missing_value_within_a_column_is_not_printed(value: Any) -> None:
    """Jinja prints None as "None", which a teacher would take for the answer."""
    context = PrivilegedContext.from_string("{% block user %}{{ prompt }} {{ answer.truth }}{% endblock %}")
    with pytest.raises(TemplateError, match="a value to be printed is None"):
        context.messages({"prompt": "1 + 1?", "answer": value})
    steps = PrivilegedContext.from_string("{% block user %}{{ prompt }} {{ answer }}{% endblock %}")
    with pytest.raises(TemplateError, match="a value to be printed is None"):
        steps.messages({"prompt": "1 + 1?", "answer": ["Add.", value["truth"]]})


def test_graders_fail_on_nan_and_never_grade_against_its_name() -> None:
    with pytest.warns(match="missing or empty"):
        assert grade("exact", ["nan", "2"], rows(NAN, "2")) == [None, True]
    with pytest.raises(DataError, match="can be graded: the grader needs an answer"):
        EvaluationPlan(test=rows(NAN, NAN), grader="contains").loaded()


def test_rewards_and_feedback_read_nan_as_empty(tmp_path: Path) -> None:
    seen: list[Any] = []

    def spying(*, answer: list[Any], log_extra: Any, **columns: Any) -> list[float]:
        seen.extend(answer)
        log_extra("feedback", [NAN] * len(answer))
        return [0.0] * len(answer)

    source = "{% block user %}{{ prompt }}{% if feedback is defined %} ({{ feedback }}){% endif %}{% endblock %}"
    teacher = SameCheckpointTeacher(context=PrivilegedContext.from_string(source))
    trainer = make_trainer(
        tmp_path, teacher, rows=Dataset.from_list(rows(NAN, 2.0, 3.0, 4.0)), reward_funcs=spying, num_generations=2
    )
    batch = [row for row in trainer.train_dataset for _ in range(2)]
    rollouts = trainer._generate_and_score_completions(batch)
    assert set(seen) == {None, 2.0, 3.0, 4.0}
    assert all("feedback" not in fields for fields in rollouts.rollout_fields)


def test_a_pass_rate_that_is_missing_is_measured_in_training(tmp_path: Path) -> None:
    made = [{**row, "pass_rate": NAN if number else 0.5} for number, row in enumerate(make_rows(4))]
    schedule = {"levels": ["answer_only", "none"], "until_pass_rate": {"answer_only": 0.9}}
    trainer = make_trainer(
        tmp_path,
        SameCheckpointTeacher(context=schedule),
        rows=Dataset.from_list(made),
        reward_funcs=returns([1.0] * 4),
        num_generations=2,
    )
    batch = [trainer.train_dataset[number] for number in (0, 0, 1, 1)]
    fields = trainer._generate_and_score_completions(batch).rollout_fields
    assert ["pass_rate" in each for each in fields] == [False, False, True, True]


def test_a_control_takes_no_missing_value_of_another_row() -> None:
    made = prepare_rows(Dataset.from_list(rows(1.0, NAN, 3.0, NAN)), reads=["other_answer"])
    assert set(made["other_answer"]) <= {1.0, 3.0}
    assert prepare_rows(Dataset.from_list(rows(1.0, NAN)), imitates=True)["completion"] == ["1.0", None]


@pytest.mark.slow
def test_the_doctor_measures_nothing_on_answers_that_are_missing(tmp_path: Path) -> None:
    """It graded answers that contain "nan" as right: 0 % without the context, 69 % with it."""
    made = [{**row, "answer": NAN} for row in make_rows(8)]
    trainer = make_trainer(tmp_path, SameCheckpointTeacher(context="worked_solution"), rows=Dataset.from_list(made))
    (lift,) = [finding for finding in examine(trainer).findings if finding.check == "lift"][:1]
    assert lift.status == "skip"
