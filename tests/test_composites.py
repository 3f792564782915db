"""Mixtures and routes: against their definitions, written as loops over plain forward passes in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import make_llama, make_rows, make_tokenizer
from datasets import Dataset
from helpers import make_rollouts, make_student, make_trainer, move, prepared

from opsd import (
    EMATeacher,
    LiveTeacher,
    MixtureTeacher,
    RoutedTeacher,
    SameCheckpointTeacher,
    SiblingTeacher,
    SnapshotTeacher,
    load_teacher,
)
from opsd.errors import ConfigError, DataError, TemplateError, TokenizerMismatchError
from opsd.losses import Divergence, Objective, Tokens
from opsd.models.forward import counting_passes, last_hidden
from opsd.models.head import Head
from opsd.teachers import Teacher
from opsd.teachers.weight_copy import megabytes

WEIGHTS = [0.3, 0.7]


def plain_logprobs(model: torch.nn.Module, teacher: Teacher, rollouts) -> list[torch.Tensor]:
    """(C, V) float64 log-probabilities of each row, from the model's own logits; nothing of opsd but the prompt."""
    found = []
    for row, completion in zip(rollouts.rows, rollouts.completion_ids, strict=True):
        prompt = teacher.prompt_ids(row)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0].double()
        found.append(torch.log_softmax(logits[len(prompt) - 1 : -1], -1))
    return found


def scored(values_by_row: list[torch.Tensor], rollouts) -> torch.Tensor:
    """The scored tokens' log-probabilities, row by row."""
    return torch.stack(
        [
            values[n, token]
            for values, ids, mask in zip(values_by_row, rollouts.completion_ids, rollouts.loss_mask, strict=True)
            for n, (token, on) in enumerate(zip(ids, mask, strict=True))
            if on
        ]
    )


def mixed(parts: list[list[torch.Tensor]], weights: list[float], kind: str) -> list[torch.Tensor]:
    """Σ w·p, or ∏ p^w divided by its sum, row by row."""
    rows = []
    for of_row in zip(*parts, strict=True):
        if kind == "arithmetic":
            rows.append(sum(w * p.exp() for w, p in zip(weights, of_row, strict=True)).log())
        else:
            product = torch.stack([w * p for w, p in zip(weights, of_row, strict=True)]).sum(0).exp()
            rows.append((product / product.sum(-1, keepdim=True)).log())
    return rows


# ---- mixtures -----------------------------------------------------------------------------------------------------


KINDS = [("arithmetic", WEIGHTS), ("geometric", WEIGHTS), ("geometric", [2.0, -1.0])]


@pytest.mark.parametrize(("kind", "weights"), KINDS)
def test_a_mixture_of_models_is_what_its_definition_says(kind: str, weights: list[float]) -> None:
    models = [make_llama(3).eval(), make_llama(4).eval()]
    parts = [SiblingTeacher(models[0], tokenizer=make_tokenizer(), context="answer_only")]
    parts.append(SiblingTeacher(models[1], tokenizer=make_tokenizer()))
    mixture = prepared(MixtureTeacher(parts, weights, kind=kind), make_llama())
    rollouts = mixture.render_prompts(make_rollouts())
    each = [plain_logprobs(model, part, rollouts) for model, part in zip(models, parts, strict=True)]
    expected = scored(mixed(each, weights, kind), rollouts)
    got = mixture.score(rollouts).logprobs(torch.tensor(rollouts.scored_ids))
    assert (got.double() - expected).abs().max() <= 1e-4


def test_several_contexts_of_one_set_of_weights_are_one_pass_and_one_copy() -> None:
    student = make_student("full").eval()
    mixture = prepared(MixtureTeacher(EMATeacher(0.5), WEIGHTS, contexts=["answer_only", "worked_solution"]), student)
    single = prepared(EMATeacher(0.5), student)
    move(student)
    assert mixture.after_step(1) is None and single.after_step(1) is None
    rollouts = mixture.render_prompts(make_rollouts())
    with counting_passes() as sequences:
        got = mixture.score(rollouts).logprobs(torch.tensor(rollouts.scored_ids))
    assert sequences == [2 * len(rollouts)]
    assert mixture.cost.megabytes == single.cost.megabytes
    with single.teaching():
        parts = [plain_logprobs(student, view, rollouts) for view in mixture.views]
    expected = scored(mixed(parts, WEIGHTS, "arithmetic"), rollouts)
    assert (got.double() - expected).abs().max() <= 1e-4, "also: an average that moved twice in one step"


def test_a_lora_run_with_every_kind_of_teacher_holds_one_copy_of_the_base() -> None:
    student = make_student("lora")
    adapter = megabytes([p for p in student.parameters() if p.requires_grad])
    base = megabytes([p for p in student.parameters() if not p.requires_grad])
    contexts = ["answer_only", "worked_solution"]
    of_contexts = MixtureTeacher(SnapshotTeacher(5), [0.5, 0.5], contexts=contexts)
    several = MixtureTeacher(
        [SameCheckpointTeacher(context="answer_only"), LiveTeacher(), EMATeacher(0.9), EMATeacher(0.5)], [0.25] * 4
    )
    teacher = prepared(RoutedTeacher("domain", {"even": of_contexts, "odd": several}), student)
    assert megabytes([*student.parameters(), *teacher.tensors]) <= base + (1 + 3) * adapter + 1e-3
    assert teacher.cost.megabytes == pytest.approx(3 * adapter)


def test_parts_keep_states_of_their_own() -> None:
    def make() -> Teacher:
        return MixtureTeacher([EMATeacher(0.9), EMATeacher(0.1)], [0.5, 0.5])

    student = make_student("lora")
    teacher, other = prepared(make(), student), prepared(make(), student)
    for step in (1, 2):
        move(student)
        teacher.after_step(step)
    other.load_state_dict(teacher.state_dict())
    slow, fast = (part.weights.values for part in other.parts.values())
    assert all(torch.equal(v, other.state_dict()[n]) for n, v in teacher.state_dict().items())
    assert any(not torch.equal(slow[n], fast[n]) for n in slow)


def test_a_mixture_can_be_written_as_nested_settings_and_shows_its_own_context_to_those_without() -> None:
    teacher = load_teacher(
        {"strategy": "mixture", "weights": [0.5, 0.5],
         "teachers": [{"strategy": "ema", "decay": 0.9, "context": "hint"}, {"strategy": "live"}]},
        context="answer_only",
    )  # fmt: skip
    assert [view.context.name for view in teacher.views] == ["hint", "answer_only"]
    assert [view.strategy for view in teacher.views] == ["ema", "live"]


def two() -> list[Teacher]:
    return [LiveTeacher(), EMATeacher(0.9)]


def route_of_one() -> RoutedTeacher:
    return RoutedTeacher("a", {1: LiveTeacher()})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MixtureTeacher(two(), [0.5, 0.6]), "adding up to 1"),
        (lambda: MixtureTeacher([LiveTeacher()], [0.5, 0.5]), "needs one weight for each"),
        (lambda: MixtureTeacher(two(), [1.5, -0.5]), "negative"),
        (lambda: MixtureTeacher(two(), [0.5, 0.5], kind="geometrc"), "Did you mean 'geometric'"),
        (lambda: MixtureTeacher(two(), [0.5, 0.5], contexts=["hint", None]), "a single teacher"),
        (lambda: MixtureTeacher([route_of_one(), LiveTeacher()], [0.5, 0.5]), "whole distribution"),
        (lambda: RoutedTeacher("a", {1: route_of_one()}), "is itself one"),
        (lambda: RoutedTeacher("a", {}), "needs a teacher for each value"),
    ],
)  # fmt: skip
def test_teachers_that_cannot_be_put_together_are_refused(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_part_with_another_tokenizer_is_refused() -> None:
    with pytest.raises(TokenizerMismatchError):
        parts = [LiveTeacher(), SiblingTeacher(make_llama(1), tokenizer=make_tokenizer(390))]
        prepared(MixtureTeacher(parts, WEIGHTS), make_llama())


def test_an_outer_context_reaches_only_those_that_were_given_none() -> None:
    """It would overwrite what a mixture inside a route is shown, and its contrast would cancel out."""
    ema = EMATeacher(0.9)
    inner = MixtureTeacher([EMATeacher(0.9, context="hint"), LiveTeacher()], [0.5, 0.5])
    several = MixtureTeacher(EMATeacher(0.5), [1.5, -0.5], kind="geometric", contexts=["hint", None])
    teachers = {"a": inner, "b": several, "c": ema, "d": ema}
    route = RoutedTeacher("domain", teachers, context="answer_only")
    shown = [view.context and view.context.name for view in route.views]
    assert shown == ["hint", "answer_only", "hint", None, "answer_only", "answer_only"]
    assert len(route.owners) == 3, "one teacher under two names stays one"


@pytest.mark.parametrize("weights", [["1e-1", 0.9], 0.5, "0.5", [None, 1.0]])
def test_weights_that_are_no_numbers_are_refused(weights: object) -> None:
    with pytest.raises(ConfigError, match="number"):
        MixtureTeacher(two(), weights)  # type: ignore[arg-type]


def test_a_mixture_cannot_sample_and_that_is_said_before_a_model_loads(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="seq_kd takes the teacher's own samples"):
        make_trainer(tmp_path, MixtureTeacher(two(), [0.5, 0.5]), "no/such-model", seq_kd=True, lmbda=0.5)


# ---- routes -------------------------------------------------------------------------------------------------------


def make_route(**kwargs: object) -> tuple[torch.nn.Module, RoutedTeacher]:
    student = make_student("full").eval()
    even = SiblingTeacher(make_llama(3), tokenizer=make_tokenizer(), context="answer_only")
    odd = SiblingTeacher(make_llama(4), tokenizer=make_tokenizer())
    return student, prepared(RoutedTeacher("domain", {"even": even, "odd": odd}, **kwargs), student)


def test_each_row_is_scored_by_its_own_teacher_in_any_order() -> None:
    _, route = make_route()
    rollouts = route.render_prompts(make_rollouts())
    for order in (range(5), [4, 1, 0, 3, 2], [1, 3], [0]):
        part = rollouts.select(list(order))
        got = route.score(part).logprobs(torch.tensor(part.scored_ids, dtype=torch.long))
        expected = []
        for row in range(len(part)):
            alone = part.select([row])
            own = route.parts[alone.rows[0]["domain"]]
            expected.append(own.score(own.render_prompts(alone)).logprobs(torch.tensor(alone.scored_ids)))
        assert torch.allclose(got, torch.cat(expected), atol=1e-5)


def test_one_teacher_under_two_names_is_one_teacher() -> None:
    ema = EMATeacher(0.5, context="answer_only")
    student = make_student("full").eval()
    route = prepared(RoutedTeacher("domain", {"even": ema, "odd": ema}), student)
    move(student)
    route.after_step(1)
    alone = prepared(EMATeacher(0.5, context="answer_only"), make_student("full").eval())
    assert ema.moved == 1 and route.cost.megabytes == alone.cost.megabytes
    routed, plain = route.render_prompts(make_rollouts()), ema.render_prompts(make_rollouts())
    ids = torch.tensor(routed.scored_ids)
    assert torch.allclose(route.score(routed).logprobs(ids), ema.score(plain).logprobs(ids), atol=1e-6)


SETTINGS = [
    {},
    {"keep_fraction": 0.5},
    {"reward_to_go": "discounted", "discount": 0.9},
    {"divergence": Divergence(0.5, support="union", support_k=5, tail="bucket")},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_routes_loss_and_gradient_are_the_sum_over_its_teachers(settings: dict) -> None:
    student, route = make_route()
    rollouts = route.render_prompts(make_rollouts())
    objective = Objective(**{"divergence": Divergence(1.0), **settings})

    def loss_of(part, signal) -> tuple[torch.Tensor, dict]:
        batch = part.pad("cpu")
        hidden_ND = last_hidden(student, batch.ids_BL, batch.mask_BL, batch.predicts_scored_BL)
        weight_N = torch.linspace(0.5, 1.5, 5)[[rollouts.rows.index(part.rows[b]) for b in batch.row_N.tolist()]]
        return objective(hidden_ND, Head.from_model(student), signal, Tokens(weight_N, batch.scored_ids_N, batch.row_N))

    student.zero_grad()
    together = loss_of(rollouts, route.score(rollouts))
    together.loss.backward()
    got = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    total = 0.0
    for name, rows in {"even": [0, 2, 4], "odd": [1, 3]}.items():
        part = rollouts.select(rows)
        record = loss_of(part, route.parts[name].score(part))
        record.loss.backward()
        total += float(record.loss.detach())
    assert float(together.loss.detach()) == pytest.approx(total, rel=1e-5, abs=1e-7)
    for name, gradient in got.items():
        assert torch.allclose(gradient, student.get_parameter(name).grad, atol=1e-6), name
    assert len(together.divergence_N) == rollouts.num_scorable and together.divergence_N.abs().sum() > 0


def test_any_choice_of_a_routed_signals_tokens_keeps_their_teachers() -> None:
    _, route = make_route()
    rollouts = route.render_prompts(make_rollouts())
    signal, ids = route.score(rollouts), torch.tensor(rollouts.scored_ids)
    whole = signal.logprobs(ids)
    mask = torch.arange(len(ids)) % 3 != 1
    for index in (mask, slice(2, 7), torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))):
        assert torch.allclose(signal.select(index).logprobs(ids[index]), whole[index], atol=1e-6)


def test_a_teachers_context_is_needed_on_its_own_rows_only() -> None:
    rows = [{**row, "answer": row["answer"] if row["domain"] == "even" else None} for row in make_rows()]
    shown = {"even": "answer_only", "odd": "worked_solution"}
    route = RoutedTeacher("domain", {name: LiveTeacher(context=context) for name, context in shown.items()})
    route.check_rows(Dataset.from_list(rows), list(rows[0]))
    with pytest.raises(TemplateError, match="needs the column 'answer', empty in"):
        other = RoutedTeacher("domain", {"odd": LiveTeacher(context="answer_only"), "even": LiveTeacher()})
        other.check_rows(Dataset.from_list(rows), list(rows[0]))


def test_a_row_without_a_teacher_is_refused_by_name() -> None:
    rows = Dataset.from_list(make_rows())
    route = RoutedTeacher("domain", {"even": LiveTeacher(), "od": LiveTeacher()})
    with pytest.raises(DataError, match=r"row 1: column 'domain' holds 'odd'.*Did you mean 'od'"):
        route.check_rows(rows, rows.column_names)
    with pytest.raises(DataError, match=r"the column 'domian'.*Did you mean 'domain'"):
        RoutedTeacher("domian", {"even": LiveTeacher()}).check_rows(rows, rows.column_names)


def test_a_route_samples_each_row_from_its_own_teacher() -> None:
    _, route = make_route()
    rows = make_rows(4)
    sampling = {"max_new_tokens": 4, "do_sample": False, "batch_size": 4}
    expected = [route.parts[row["domain"]].sample([row], **sampling)[0] for row in rows]
    assert route.sample(rows, **sampling) == expected
