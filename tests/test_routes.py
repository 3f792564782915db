"""Routes: every row has one teacher, whatever its company, and the loss is the sum over the teachers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_gpt2, make_llama, make_rows, make_tokenizer
from datasets import Dataset
from helpers import logged, make_rollouts, make_student, make_trainer, move, prepared
from torch import Tensor, nn

from opsd import (
    EMATeacher,
    LiveTeacher,
    MixtureTeacher,
    PrivilegedContext,
    RoutedTeacher,
    SameCheckpointTeacher,
    SiblingTeacher,
)
from opsd.contexts.renderer import PromptRenderer
from opsd.errors import ConfigError, DataError
from opsd.losses import Divergence, LossOutput, Objective, Tokens
from opsd.models.forward import counting_passes, last_hidden
from opsd.models.head import Head
from opsd.rollouts import Rollouts
from opsd.signals import RoutedSignal
from opsd.teachers import Teacher, TeacherView

NAMES = ("maths", "code", "maths", "chat", "code", "chat", "maths")  # of the rows, in no order


def make_sibling(model: nn.Module, **settings: Any) -> SiblingTeacher:
    return SiblingTeacher(model, tokenizer=make_tokenizer(), **settings)


def make_mixture() -> MixtureTeacher:
    return MixtureTeacher([make_sibling(make_llama(4)), LiveTeacher(context="answer_only")], [0.25, 0.75])


def make_route(**settings: Any) -> RoutedTeacher:
    """A sibling with a context, a mixture, and the student at step 0."""
    maths = make_sibling(make_llama(3), context="worked_solution")
    return RoutedTeacher("topic", {"maths": maths, "code": make_mixture(), "chat": SameCheckpointTeacher()}, **settings)


def with_topics(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "topic": NAMES[number % len(NAMES)]} for number, row in enumerate(rows)]


def topical(count: int = len(NAMES)) -> Rollouts:
    rollouts = make_rollouts(count)
    return replace(rollouts, rows=with_topics(rollouts.rows))


def scores(teacher: Teacher, rollouts: Rollouts) -> Tensor:
    return teacher.score(rollouts).logprobs(torch.tensor(rollouts.scored_ids, dtype=torch.long))


# ---- each row its own teacher -------------------------------------------------------------------------------------

CUTS: dict[str, Callable[[Rollouts], list[Rollouts]]] = {
    "whole": lambda rollouts: [rollouts],
    "reversed": lambda rollouts: [rollouts.select(range(len(rollouts))[::-1])],
    "sorted by length": lambda rollouts: [rollouts.sorted_by_length()],
    "micro-batches of one": lambda rollouts: list(rollouts.sorted_by_length().split(len(rollouts))),
    "micro-batches of two": lambda rollouts: list(rollouts.select([5, 0, 3, 1, 2, 6]).split(3)),
    "one route only": lambda rollouts: [rollouts.select([0, 2, 6]), rollouts.select([4, 1])],
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_row_is_scored_by_its_own_teacher_in_any_cut_of_the_batch(cut: str) -> None:
    """Rows are shown their prompts before any sort or split; a teacher that is asked by position would err here."""
    student = make_student("full").eval()
    route = prepared(make_route(), student)
    move(student)
    for part in CUTS[cut](route.prompts.render(topical())):
        expected = []
        for number in range(len(part)):
            row = part.select([number])
            own = route.parts[row.rows[0]["topic"]]  # type: ignore[attr-defined]
            expected.append(scores(own, own.prompts.render(replace(row, teacher_prompt_ids={}))))
        assert torch.allclose(scores(route, part), torch.cat(expected), atol=1e-5)


def test_a_mixture_in_a_route_says_what_it_says_alone() -> None:
    """Its parts are shown their prompts through the route, those of other rows not at all."""
    student = make_student("full").eval()
    route, alone = prepared(make_route(), student), prepared(make_mixture(), student)
    rollouts = topical().select([1, 4])
    assert torch.allclose(
        scores(route, route.prompts.render(rollouts)), scores(alone, alone.prompts.render(rollouts)), atol=1e-6
    )
    with counting_passes() as sequences:
        route.score(route.prompts.render(topical()))
    assert sequences == [3, 2, 2, 2], "rows of maths; twice those of code; those of chat"


def test_a_teacher_with_a_short_context_is_not_asked_about_other_rows() -> None:
    """A small model for short rows: the length of the others' prompts is not its concern. Its own are checked."""
    rows = make_rows(4)
    for row in rows[::2]:
        row["prompt"] = [{"role": "user", "content": "What is it? " * 20}]
    prompts = [PromptRenderer(make_tokenizer()).ids(row["prompt"]) for row in rows]
    rollouts = Rollouts(rows, prompts, [[5, 6, 7]] * 4)
    small = make_gpt2(3)
    small.config.n_positions = 48
    assert max(map(len, prompts)) > 48 > 3 + max(map(len, prompts[1::2]))
    route = prepared(RoutedTeacher("domain", {"even": LiveTeacher(), "odd": make_sibling(small)}), make_llama())
    assert scores(route, route.prompts.render(rollouts)).isfinite().all()
    wrong = prepared(RoutedTeacher("domain", {"odd": LiveTeacher(), "even": make_sibling(small)}), make_llama())
    with pytest.raises(DataError, match=f"row 0: the teacher's prompt has {len(prompts[0])} tokens"):
        wrong.prompts.render(rollouts)


def test_each_row_is_sampled_by_its_own_teacher_under_its_own_context() -> None:
    student = make_student("full").eval()
    maths, chat = make_sibling(make_llama(3), context="worked_solution"), make_sibling(make_llama(4))
    route = prepared(RoutedTeacher("topic", {"maths": maths, "code": chat, "chat": chat}), student)
    rows = with_topics(make_rows(7))
    sampling = {"max_new_tokens": 5, "do_sample": False, "batch_size": 8}
    found = route.sample(rows, **sampling)
    for row, completion in zip(rows, found, strict=True):
        own = maths if row["topic"] == "maths" else chat
        assert completion == own.sample([row], **sampling)[0]
    assert found[0] != chat.sample(rows[:1], **sampling)[0], "else any teacher would do"


# ---- the loss is the sum over the teachers ------------------------------------------------------------------------

OBJECTIVES: dict[str, dict[str, Any]] = {
    "reverse KL": {},
    "JSD": {"divergence": Divergence(0.5)},
    "half of the tokens": {"keep_fraction": 0.5},
    "by drift": {"prefix_weight": 1.0},
    "half, by disagreement": {"keep_fraction": 0.5, "keep_by": "disagreement"},
    "discounted future": {"reward_to_go": "discounted", "discount": 0.9},
    "sampled, discounted": {"divergence": Divergence(1.0, support="sampled"), "reward_to_go": "discounted"},
    "mean future of a half": {"reward_to_go": "mean", "keep_fraction": 0.5},
    "anchored": {"ref_kl_coef": 0.3},
    "contrasted": {},
}


class Losses:
    """The objective of one student in float64, for any rollouts and their answers."""

    def __init__(self, name: str):
        self.student, other = make_student("full").eval(), make_llama(3)
        teachers = {"even": make_sibling(other, context="worked_solution"), "odd": SameCheckpointTeacher()}
        self.route = prepared(RoutedTeacher("domain", teachers), self.student)
        self.anchor = prepared(SameCheckpointTeacher(), self.student)
        for model in (self.student, other):
            model.double()
        self.contrast = None
        if name == "contrasted":
            self.contrast = TeacherView(self.route, self.route.prompts.with_context("answer_only"))
        self.objective = Objective(**{"divergence": Divergence(1.0), **OBJECTIVES[name]})
        move(self.student)
        shown = self.anchor.prompts.render(self.route.prompts.render(make_rollouts(6)))
        self.rollouts = shown if self.contrast is None else self.contrast.prompts.render(shown)

    def __call__(self, part: Rollouts, own: str | None = None) -> tuple[LossOutput, dict[str, Tensor]]:
        """Return the record of these rows and its gradient, asked of the route or of one of its teachers."""
        self.student.zero_grad()
        batch = part.pad("cpu")
        hidden_ND = last_hidden(self.student, batch.ids_BL, batch.row_N, batch.position_N)
        weight_B = torch.tensor([0.5 + self.rollouts.rows.index(row) for row in part.rows])
        tokens = Tokens(weight_B[batch.row_N].float(), batch.scored_ids_N, batch.row_N)
        teacher, contrast = self.route if own is None else self.route.parts[own], self.contrast
        if own is not None and contrast is not None:
            contrast = TeacherView(teacher, contrast.prompts.parts[own])  # type: ignore[attr-defined]
        record = self.objective(
            hidden_ND,
            Head.from_model(self.student),
            teacher.score(part),
            tokens,
            reference=self.anchor.score(part),  # type: ignore[arg-type]
            contrast_signal=None if contrast is None else contrast.score(part),
        )
        record.loss.backward()
        return record, {name: p.grad.clone() for name, p in self.student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradient_of_a_route_are_the_sums_over_its_rows_with_their_own_teachers(name: str) -> None:
    """Also where tokens are ranked or charged within their rollout, and records stand where their tokens do."""
    losses = Losses(name)
    together, gradient = losses(losses.rollouts)
    apart = [losses(losses.rollouts.select([n]), row["domain"]) for n, row in enumerate(losses.rollouts.rows)]
    total = sum(record.loss.item() for record, _ in apart)
    assert together.loss.item() == pytest.approx(total, rel=1e-6) and total != 0.0
    for parameter, value in gradient.items():
        expected = torch.stack([each[parameter] for _, each in apart]).sum(0)
        assert torch.allclose(value, expected, rtol=1e-6, atol=1e-9), parameter
    row_N = losses.rollouts.pad("cpu").row_N
    for number, (record, _) in enumerate(apart):
        mine = row_N == number
        assert together.metrics.keys() == record.metrics.keys()
        pairs = {
            "divergence": (together.divergence_N, record.divergence_N),
            "entropy": (together.entropy_N, record.entropy_N),
        }
        pairs |= {key: (together.metrics[key], values) for key, values in record.metrics.items()}
        for key, (of_all, of_one) in pairs.items():
            assert torch.allclose(of_all[mine], of_one, atol=1e-6), key


@pytest.mark.parametrize("rows", [[0, 2, 4], [3]])
def test_a_micro_batch_without_one_of_the_routes_is_the_other_teachers_alone(rows: list[int]) -> None:
    losses = Losses("half of the tokens")
    part = losses.rollouts.select(rows)
    assert len(losses.route.score(part).groups()) == 1
    (routed, gradient), (plain, expected) = losses(part), losses(part, part.rows[0]["domain"])
    assert torch.equal(routed.loss, plain.loss) and torch.equal(routed.divergence_N, plain.divergence_N)
    assert all(torch.equal(value, expected[name]) for name, value in gradient.items())


def test_contrasted_teachers_with_padded_heads_are_compared_over_the_ids_both_have() -> None:
    """What the wrong context says must be narrowed too: ids that the student lacks took a share of its mass."""
    student = make_llama(0).eval()
    records = []
    for make in (lambda t: t, lambda t: RoutedTeacher("domain", {"even": t, "odd": t})):
        teacher = prepared(make(make_sibling(make_llama(1, 448), context="answer_only")), student)
        wrong = TeacherView(teacher, teacher.prompts.with_context("worked_solution"))
        rollouts = wrong.prompts.render(teacher.prompts.render(make_rollouts()))
        batch = rollouts.pad("cpu")
        hidden_ND = last_hidden(student, batch.ids_BL, batch.row_N, batch.position_N)
        tokens = Tokens(torch.ones(len(hidden_ND)), batch.scored_ids_N, batch.row_N)
        answers = teacher.score(rollouts), wrong.score(rollouts)
        records.append(
            Objective(Divergence(1.0))(
                hidden_ND, Head.from_model(student), answers[0], tokens, contrast_signal=answers[1]
            )
        )
    assert records[1].loss.item() == pytest.approx(records[0].loss.item(), rel=1e-5)


# ---- the signal ---------------------------------------------------------------------------------------------------


def routed_signal() -> tuple[RoutedSignal, Tensor]:
    route = prepared(make_route(), make_student("full").eval())
    rollouts = route.prompts.render(topical())
    return route.score(rollouts), torch.tensor(rollouts.scored_ids)  # type: ignore[return-value]


def test_a_routed_signal_answers_every_token_once() -> None:
    signal, ids = routed_signal()
    places = torch.cat([index for index, _ in signal.groups()])
    assert torch.equal(places.sort().values, torch.arange(len(ids))) and len(signal) == len(ids)


@pytest.mark.parametrize(
    "choose",
    [
        lambda n: torch.arange(n) % 3 == 1,
        lambda n: torch.zeros(n, dtype=torch.bool),
        lambda n: slice(3, 9),
        lambda n: slice(None),
        lambda n: slice(5, 6),
        lambda n: torch.randperm(n, generator=torch.Generator().manual_seed(1)),
        lambda n: torch.tensor([n - 1, 0, 4, 4]),
    ],
    ids=["mask", "no token", "slice", "all", "one token", "permutation", "places, one of them twice"],
)
def test_a_choice_of_a_routed_signals_tokens_is_the_same_choice_of_its_answers(choose: Callable[[int], Any]) -> None:
    """Where a choice mixed up whose token is whose, answers would be finite and another teacher's."""
    signal, ids = routed_signal()
    whole, index = signal.logprobs(ids), choose(len(ids))
    chosen = signal.select(index)
    assert len(chosen) == len(ids[index])
    assert torch.allclose(chosen.logprobs(ids[index]), whole[index], atol=1e-6)
    again = torch.arange(len(chosen) - 1, -1, -1)
    assert torch.allclose(chosen.select(again).logprobs(ids[index][again]), whole[index][again], atol=1e-6)


# ---- rows ---------------------------------------------------------------------------------------------------------


def test_a_run_needs_a_teachers_context_on_that_teachers_rows_only(tmp_path: Path) -> None:
    """Two domains in one table: each has its own privileged column, empty for the other."""
    rows = [{**row, "answer" if row["domain"] == "odd" else "solution": None} for row in make_rows()]
    teachers = {"even": EMATeacher(0.9, context="answer_only"), "odd": LiveTeacher(context="worked_solution")}
    trainer = make_trainer(tmp_path, RoutedTeacher("domain", teachers), rows=Dataset.from_list(rows))
    trainer.train()
    assert all(value > 0 for value in logged(trainer, "divergence"))
    swapped = {"odd": EMATeacher(0.9, context="answer_only"), "even": LiveTeacher(context="worked_solution")}
    with pytest.raises(DataError, match="'answer', which is empty in 6 rows"):
        make_trainer(tmp_path, RoutedTeacher("domain", swapped), "no/such-model", rows=Dataset.from_list(rows))


@pytest.mark.parametrize(
    ("column", "names", "message"),
    [
        (
            "domain",
            ("even", "ood"),
            "'domain', which holds 'odd' (Did you mean 'ood'?) in 6 rows of the train dataset: 1, 3",
        ),
        (
            "domain",
            ("a", "b"),
            "Fill these rows, drop them, or name a teacher for every value of the column, now: a, b.",
        ),
        (
            "domains",
            ("even", "odd"),
            "column 'domains', and the train dataset has: prompt, answer, solution, domain. Did",
        ),
    ],
)
def test_rows_that_no_teacher_would_score_are_refused_before_a_model_loads(
    tmp_path: Path, column: str, names: Sequence[str], message: str
) -> None:
    route = RoutedTeacher(column, {name: LiveTeacher() for name in names})
    with pytest.raises(DataError) as error:
        make_trainer(tmp_path, route, "no/such-model")
    assert message in str(error.value)


def test_values_of_a_column_are_compared_as_text() -> None:
    """Numbers in a table and numbers in YAML: 1 names the teacher '1'."""
    route = RoutedTeacher("level", {1: LiveTeacher(), "2": EMATeacher(0.9), None: SameCheckpointTeacher()})
    strategies = [route.prompts.leaves_of({"level": value})[0].teacher.strategy for value in (1, "1", 2, None)]
    assert strategies == ["live", "live", "ema", "same_checkpoint"]
    with pytest.raises(DataError, match=r"holds '1\.0'"):
        route.prompts.leaves_of({"level": 1.0})


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        ({1: RoutedTeacher("b", {1: LiveTeacher()})}, "is itself one"),
        ({}, "needs a teacher for each value"),
        ([LiveTeacher()], "needs a teacher for each value"),
        ({"math": "live"}, r"part 'math' of this routed teacher .* Write load_teacher\('live'\)"),
    ],
)
def test_teachers_that_make_no_route_are_refused(teachers: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RoutedTeacher("a", teachers)


def test_a_route_to_a_mixture_cannot_sample_which_is_said_before_a_model_loads(tmp_path: Path) -> None:
    rows = Dataset.from_list(with_topics(make_rows()))
    with pytest.raises(ConfigError, match="'routed' is no single model that could sample"):
        make_trainer(tmp_path, make_route(), "no/such-model", rows=rows, seq_kd=True, lmbda=0.5)


# ---- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "arriving adapter"])
def test_a_lora_run_with_a_route_swaps_adapters_over_one_base(kind: str) -> None:
    """While any of its teachers scores, the base's weights are the student's own, at the same address."""
    student = make_student(kind)
    teachers = {"maths": EMATeacher(0.9), "code": SameCheckpointTeacher(context="answer_only"), "chat": LiveTeacher()}
    route = prepared(RoutedTeacher("topic", teachers), student)
    base = {name: p.data_ptr() for name, p in student.named_parameters() if not p.requires_grad}
    for part in teachers.values():
        assert part.model is student
        with part.active_weights():
            held = dict(student.named_parameters())
            assert {name: held[name].data_ptr() for name in base} == base
    adapter = sum(p.numel() * p.element_size() for p in student.parameters() if p.requires_grad) / 2**20
    assert route.cost.megabytes == pytest.approx(adapter * (1 if kind == "lora" else 2))


def test_a_context_for_all_is_shown_where_a_teacher_has_none() -> None:
    route = prepared(make_route(context="answer_only"), make_student("full"))
    names = [view.context.name for view in route.prompts.leaves]  # type: ignore[union-attr]
    assert names == ["worked_solution", "answer_only", "answer_only", "answer_only"]
    rollouts = route.prompts.render(topical())
    side = PromptRenderer(make_tokenizer())
    chat = route.prompts.parts["chat"]  # type: ignore[attr-defined]
    for row, ids in zip(rollouts.rows, rollouts.teacher_prompt_ids[chat], strict=True):
        if row["topic"] == "chat":
            assert ids == PrivilegedContext("answer_only").render(row, renderer=side) == route.prompts.ids(row)
