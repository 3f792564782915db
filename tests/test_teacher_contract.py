"""What a strategy of one's own can get wrong, each with the rule, the reason and the way out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_llama
from helpers import make_rollouts, make_student, make_trainer, prepared
from torch import Tensor

from opsd import EMATeacher, Head, HiddenSignal, MixtureTeacher, RoutedSignal, RoutedTeacher, Teacher, TopKSignal
from opsd.errors import AlignmentError, CheckpointError, ConfigError, TeacherError
from opsd.rollouts import Rollouts
from opsd.teachers import LiveTeacher, PastCheckpointTeacher, SameCheckpointTeacher, TeacherView
from opsd.teachers.checks import load_state

N = make_rollouts().num_scorable
HEAD = Head.from_model(make_llama()).detach()
STATES = torch.zeros(N, 32)


class Fixed(Teacher):
    """Returns the same whatever it is asked."""

    def __init__(self, answer: Any = None, *, context: Any = None):
        super().__init__(context=context)
        self.answer = answer

    def score(self, rollouts: Rollouts) -> Any:
        return self.answer

    def sample(self, rows: Any, **sampling: Any) -> Any:
        return self.answer


def top_k(**changes: Any) -> TopKSignal:
    parts = {"ids_NK": torch.zeros(N, 2, dtype=torch.long), "logprobs_NK": -torch.ones(N, 2)}
    return TopKSignal(**{**parts, "sampled_logprobs_N": -torch.ones(N), **changes})


def like_a_signal(*, groups: Any) -> Any:
    """An object with the methods of a signal, which no loss knows."""

    class Foreign:
        def __len__(self) -> int:
            return N

        def logprobs(self) -> None: ...

        select = logprobs

        def groups(self) -> Any:
            return groups

    return Foreign()


def wide_head() -> Head:
    return Head(torch.zeros(400, 16))


FAULTS: dict[str, tuple[Any, str, str]] = {
    "nothing": (None, "score returned None. A loss reads a signal", "Return HiddenSignal("),
    "logits": (torch.zeros(N, 400), "score returned a Tensor", "Return HiddenSignal("),
    "a list": ([STATES], "score returned a list", "Return HiddenSignal("),
    "too few tokens": (HiddenSignal(STATES[1:], HEAD), f"of {N - 1} tokens for {N} scored", "position_N"),
    "too many tokens": (HiddenSignal(torch.zeros(N + 3, 32), HEAD), f"of {N + 3} tokens for {N}", "position_N"),
    "padded states": (HiddenSignal(STATES[:, None], HEAD), "of 2 dimension(s)", "packed without padding"),
    "whole numbers": (HiddenSignal(STATES.long(), HEAD), "hidden_ND is a Tensor torch.int64", "floating-point"),
    "no tensor": (SimpleNamespace, "score returned a type", "Return HiddenSignal("),
    "a gradient": (HiddenSignal(STATES.clone().requires_grad_(), HEAD), "hidden_ND carries a gradient", "evaluating"),
    "a head's gradient": (
        HiddenSignal(STATES, Head.from_model(make_llama())), "head.weight_VD carries a gradient", ".detach()"
    ),
    "another width": (HiddenSignal(STATES, wide_head()), "width 32 and a head of width 16", "Head.from_model(model)"),
    "a small vocabulary": (HiddenSignal(STATES, HEAD.narrow(300)), "over 300 ids, and the student's has", "vocabulary"),
    "another device": (HiddenSignal(STATES.to("meta"), HEAD), "is on meta, and the student is on cpu", ".to("),
    "ids of 32 bits": (top_k(ids_NK=torch.zeros(N, 2, dtype=torch.int32)), "with ids in torch.int32", "(N, K), (N, K)"),
    "other shapes": (top_k(ids_NK=torch.zeros(N, 3, dtype=torch.long)), f"({N}, 3), ({N}, 2)", "(N, K), (N, K), (N,)"),
    "sampled in 2D": (top_k(sampled_logprobs_N=torch.zeros(N, 1)), "sampled_logprobs_N is a", "1 dimension"),
    "a list's gradient": (top_k(logprobs_NK=-torch.ones(N, 2, requires_grad=True)), "logprobs_NK carries", "no_grad"),
    "ids of another tokenizer": (top_k(ids_NK=torch.full((N, 2), 400)), "ids from 400 to 400", "another tokenizer"),
    "negative ids": (top_k(ids_NK=torch.full((N, 2), -1)), "ids from -1 to -1", "log-probability of -inf"),
    "probabilities": (top_k(logprobs_NK=torch.full((N, 2), 0.5)), "a log-probability of 0.5", "log_softmax"),
    "not a number": (top_k(logprobs_NK=torch.full((N, 2), torch.nan)), "a log-probability of nan", "log_softmax"),
    "a part of a route": (
        RoutedSignal([HiddenSignal(STATES.clone().requires_grad_(), HEAD)], [torch.arange(N)]),
        "carries a gradient", "no_grad",
    ),
    "a foreign signal": (like_a_signal(groups=[(slice(None), 7)]), "made of a int", "Return HiddenSignal("),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_answer_is_refused_with_rule_reason_and_way_out(name: str) -> None:
    answer, rule, way_out = FAULTS[name]
    teacher = prepared(Fixed(answer), make_student("full"))
    with pytest.raises((TeacherError, AlignmentError)) as error:
        TeacherView(teacher).score(teacher.prompts.render(make_rollouts()))
    assert rule in str(error.value) and way_out in str(error.value)
    assert str(error.value).startswith(f"teacher '{__name__}:Fixed': score returned")


def test_right_answers_pass() -> None:
    """Also without a single token, with lists that are filled up, and with a head that is padded."""
    student = make_student("full")
    padded = Head(torch.zeros(448, 32))
    for answer in (HiddenSignal(STATES, HEAD), HiddenSignal(STATES.to(torch.bfloat16), padded), top_k(),
                   top_k(logprobs_NK=torch.full((N, 2), -torch.inf))):  # fmt: skip
        teacher = prepared(Fixed(answer), student)
        assert TeacherView(teacher).score(teacher.prompts.render(make_rollouts())) is answer
    none = make_rollouts().mask_rows([True] * 5)
    empty = top_k(
        ids_NK=torch.zeros(0, 2, dtype=torch.long), logprobs_NK=STATES[:0, :2], sampled_logprobs_N=STATES[:0, 0]
    )
    assert len(TeacherView(prepared(Fixed(empty), student)).score(none)) == 0


@pytest.mark.parametrize("how", ["alone", "in a route", "in a mixture", "by logprobs"])
def test_a_wrong_answer_is_named_wherever_the_teacher_is_asked(how: str) -> None:
    wrong = Fixed(HiddenSignal(STATES.clone().requires_grad_(), HEAD))
    makers: dict[str, Any] = {
        "in a route": lambda: RoutedTeacher("domain", {"even": wrong, "odd": wrong}),
        "in a mixture": lambda: MixtureTeacher([LiveTeacher(), wrong], [0.5, 0.5]),
    }
    teacher = prepared(makers.get(how, lambda: wrong)(), make_student("full"))
    rollouts = replace(make_rollouts(), loss_mask=None)
    wrong.answer = HiddenSignal(torch.zeros(rollouts.num_scorable, 32, requires_grad=True), HEAD)
    with pytest.raises(TeacherError, match="Fixed': score returned a signal whose hidden_ND carries a gradient"):
        if how == "by logprobs":
            teacher.logprobs(rollouts.rows, rollouts.completion_ids)
        else:
            TeacherView(teacher).score(teacher.prompts.render(rollouts))


def test_a_mixture_needs_whole_distributions_and_says_whose_is_none() -> None:
    teacher = prepared(MixtureTeacher([LiveTeacher(), Fixed(top_k())], [0.5, 0.5]), make_student("full"))
    with pytest.raises(ConfigError, match=r"Fixed' returned a TopKSignal.*RoutedTeacher"):
        TeacherView(teacher).score(teacher.prompts.render(make_rollouts()))


def test_a_run_says_so_before_its_first_step(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="score returned None"):
        make_trainer(tmp_path, Fixed())


# ---- a class that is no teacher yet ---------------------------------------------------------------------------------


class WithoutScore(Teacher):
    pass


class WithoutInit(Fixed):
    def __init__(self) -> None:
        self.answer = None


class WithoutPrepare(Fixed):
    def prepare(self, student: Any) -> None:
        self.model = student.model


def test_a_class_without_score_is_refused_in_words() -> None:
    with pytest.raises(TeacherError, match=r"WithoutScore is no teacher yet: it lacks score\(\).*your_own_teacher.md"):
        WithoutScore()


def test_an_init_that_forgets_its_parent_is_named(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"WithoutInit.__init__ does not call super\(\).__init__\(context=context\)"):
        make_trainer(tmp_path, WithoutInit(), "no/such-model")


def test_a_prepare_that_forgets_its_parent_is_named(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"was not prepared.*super\(\).prepare\(student\)"):
        make_trainer(tmp_path, WithoutPrepare())


def test_a_teacher_that_was_not_prepared_says_so() -> None:
    with pytest.raises(TeacherError, match=r"was not prepared.*Call teacher.prepare\(student\) first"):
        LiveTeacher().logprobs([{"prompt": "?"}], [[5]])


def test_rollouts_without_a_teachers_prompts_say_who_renders_them() -> None:
    teacher = prepared(LiveTeacher(context="answer_only"), make_student("full"))
    with pytest.raises(TeacherError, match=r"hold no prompts for this teacher.*teacher.prompts.render\(rollouts\)"):
        teacher.score(make_rollouts())


# ---- samples, settings, states --------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [None, [[1, 2]], torch.zeros(2, 3), ["a", "b"], [[1.5], [2]], [[1], torch.ones(2)]])
def test_samples_that_are_no_ids_are_refused(answer: Any) -> None:
    with pytest.raises(TeacherError, match=r"(?s)sample returned .* for 2 rows.*one list of int per row"):
        TeacherView(prepared(Fixed(answer), make_student("full"))).sample([{}, {}], max_new_tokens=3)


@pytest.mark.parametrize("settings", [{"table": torch.zeros(2)}, {"names": {1, 2}}, ["a"]])
def test_settings_that_a_checkpoint_cannot_hold_are_refused_before_training(tmp_path: Path, settings: Any) -> None:
    class Odd(LiveTeacher):
        @property
        def settings(self) -> Any:
            return settings

    with pytest.raises(TeacherError, match=r"settings are .*stores them as JSON"):
        make_trainer(tmp_path, Odd(context="answer_only"))


def test_settings_are_the_constructors_plain_arguments() -> None:
    class Many(Fixed):
        def __init__(self, rate: float, table: Tensor, names: list[str], **kwargs: Any):
            super().__init__(**kwargs)
            self.rate, self.table, self.names, self.other = rate, table, names, 3

    teacher = Many(0.5, torch.zeros(2), ["a"], context="hint")
    assert teacher.settings == {"rate": 0.5, "names": ["a"], "answer": None}
    assert teacher.describe() == "Many(rate=0.5, names=['a'], answer=None)"
    assert SameCheckpointTeacher(offload=True).settings == {}, "where a copy is kept is no matter of a resume"


def test_a_state_that_is_no_tensors_is_refused_where_it_is_saved(tmp_path: Path) -> None:
    class Counting(LiveTeacher):
        def state_dict(self) -> Any:
            return {"steps": 3}

    trainer = make_trainer(tmp_path, Counting(context="answer_only"), max_steps=1, save_strategy="steps", save_steps=1)
    with pytest.raises(TeacherError, match=r"state_dict returned \{'steps': 'int'\}.*torch.tensor\(number\)"):
        trainer.train()


STATES_OF: dict[str, tuple[Any, dict[str, Tensor], str]] = {
    "no state": (LiveTeacher, {"a": torch.ones(1)}, "'live' was given a state with unknown 'a'"),
    "another student's": (lambda: EMATeacher(0.9), {"a": torch.ones(1)}, "a state without 'base_model"),
    "a checkpoint of this run": (lambda: PastCheckpointTeacher("checkpoint-3"), {"a": torch.ones(1)}, "unknown 'a'"),
    "no such member": (
        lambda: MixtureTeacher([LiveTeacher(), EMATeacher(0.9)], [0.5, 0.5]), {"7/a": torch.ones(1)},
        "a state with '7/a', and has 2 member(s)",
    ),
    "a member's": (
        lambda: MixtureTeacher([LiveTeacher(), EMATeacher(0.9)], [0.5, 0.5]), {"0/a": torch.ones(1)},
        "'live' was given a state with unknown 'a'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES_OF)
def test_another_teachers_state_is_refused(name: str) -> None:
    make, state, message = STATES_OF[name]
    teacher = prepared(make(), make_student("lora"))
    with pytest.raises(CheckpointError) as error:
        teacher.load_state_dict(state)
    assert message in str(error.value) and "Resume with" in str(error.value)


def test_a_state_without_a_name_that_a_teacher_of_ones_own_reads_is_refused() -> None:
    class Reading(LiveTeacher):
        def load_state_dict(self, state: Any) -> None:
            self.count = int(state["count"])

    with pytest.raises(CheckpointError, match=r"load_state_dict reads 'count', and the checkpoint has: 'steps'"):
        load_state(Reading(), {"steps": torch.ones(1)})


# ---- one set of weights, several contexts ---------------------------------------------------------------------------


def test_a_view_leaves_its_teacher_as_it_was_also_where_a_call_fails() -> None:
    teacher = prepared(Fixed(), make_student("full"))
    own = teacher.prompts
    view = TeacherView(teacher, own.with_context("answer_only"))
    with pytest.raises(TeacherError):
        view.score(view.prompts.render(make_rollouts()))
    assert teacher.prompts is own


def test_what_a_teacher_remembers_of_a_call_under_another_context_stays() -> None:
    """A view that asked a copy would lose it, and a copy that was made early would not see what changed since."""

    class Counting(LiveTeacher):
        scored = 0

        def score(self, rollouts: Rollouts) -> HiddenSignal:
            self.scored += rollouts.num_scorable
            return super().score(rollouts)

    counting = Counting()
    route = prepared(RoutedTeacher("domain", {"even": counting, "odd": SameCheckpointTeacher()}, context="hint"),
                     make_student("full"))  # fmt: skip
    rollouts = make_rollouts()
    rollouts = route.prompts.render(replace(rollouts, rows=[{**row, "hint": "add"} for row in rollouts.rows]))
    TeacherView(route).score(rollouts)
    assert 0 < counting.scored < rollouts.num_scorable


def test_a_copy_with_other_prompts_reads_them_itself() -> None:
    """Prompts that still belonged to the original would ask one that nobody prepares."""
    teacher = LiveTeacher(context="answer_only")
    other = prepared(teacher.copy_with(teacher.prompts.with_context(None)), make_student("full"))
    assert teacher.context is not None and other.context is None
    assert other.prompts.ids(make_rollouts().rows[0]) == make_rollouts().prompt_ids[0]
