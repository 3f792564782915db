"""Mixtures against their definition in float64: which distribution, what they cost, who is told of a step how often."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama, make_tokenizer
from helpers import make_rollouts, make_student, make_trainer, move, prepared
from torch import Tensor, nn

from opsd import (
    EMATeacher,
    LiveTeacher,
    MixtureTeacher,
    PrivilegedContext,
    RoutedTeacher,
    SameCheckpointTeacher,
    SiblingTeacher,
    SnapshotTeacher,
    load_teacher,
)
from opsd.contexts.renderer import PromptRenderer
from opsd.errors import ConfigError, TokenizerMismatchError
from opsd.models.forward import counting_passes
from opsd.rollouts import Rollouts
from opsd.teachers import Teacher
from opsd.teachers.weight_copy import megabytes

SHOWN = ("answer_only", None, "worked_solution")
MIXED = [
    ("arithmetic", [0.2, 0.3, 0.5]),
    ("arithmetic", [0.0, 1.0, 0.0]),
    ("geometric", [0.2, 0.3, 0.5]),
    ("geometric", [1.5, -1.0, 0.5]),
]


def make_sibling(seed: int = 5, **settings: Any) -> SiblingTeacher:
    return SiblingTeacher(make_llama(seed), tokenizer=make_tokenizer(), **settings)


# ---- the slow twin ------------------------------------------------------------------------------------------------


def plain_logprobs(model: nn.Module, context: str | None, rollouts: Rollouts) -> list[Tensor]:
    """(C, V) of each row from the model's own logits in float64, one row at a time."""
    model, renderer = copy.deepcopy(model).double().eval(), PromptRenderer(make_tokenizer())
    found = []
    for row, completion in zip(rollouts.rows, rollouts.completion_ids, strict=True):
        if context is None:
            prompt = renderer.ids(row["prompt"])
        else:
            prompt = PrivilegedContext(context).render(row, renderer=renderer)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        found.append((logits.exp() / logits.exp().sum(-1, keepdim=True)).log())
    return found


def mean_of(parts: Sequence[list[Tensor]], weights: Sequence[float], kind: str) -> list[Tensor]:
    """log Σ w·p, or the log of ∏ p^w over its sum, row by row."""
    rows = []
    for of_row in zip(*parts, strict=True):
        p = [log_p.exp() for log_p in of_row]
        if kind == "arithmetic":
            mean = sum(w * each for w, each in zip(weights, p, strict=True))
        else:
            mean = torch.stack([each**w for w, each in zip(weights, p, strict=True)]).prod(0)
            mean = mean / mean.sum(-1, keepdim=True)
        rows.append(torch.as_tensor(mean).log())
    return rows


def assert_says(teacher: Teacher, rollouts: Rollouts, expected: list[Tensor], atol: float = 2e-4) -> None:
    """Compare at the scored tokens, at the likeliest ids and at the unlikeliest: the whole row must be right."""
    masks = zip(expected, rollouts.loss_mask or (), strict=True)
    expected_NV = torch.cat([values[torch.tensor(mask, dtype=torch.bool)] for values, mask in masks])
    signal = teacher.score(teacher.prompts.render(rollouts))
    for ids_N in (torch.tensor(rollouts.scored_ids), expected_NV.argmax(-1), expected_NV.argmin(-1)):
        wanted_N = expected_NV.gather(-1, ids_N[:, None])[:, 0]
        assert (signal.logprobs(ids_N).double() - wanted_N).abs().max() <= atol


@pytest.mark.parametrize(("kind", "weights"), MIXED)
def test_several_teachers_are_the_mean_of_their_distributions(kind: str, weights: list[float]) -> None:
    """Weights given to the wrong part, logs mixed in place of probabilities, a product that is not normalised."""
    student = make_student("full").eval()
    start, models = copy.deepcopy(student), [make_llama(3), make_llama(4)]
    parts = [
        make_sibling(3, context=SHOWN[0]),
        make_sibling(4),
        SameCheckpointTeacher(context=SHOWN[2]),
    ]
    mixture = prepared(MixtureTeacher(parts, weights, kind=kind), student)
    move(student)
    rollouts = make_rollouts()
    each = [plain_logprobs(m, name, rollouts) for m, name in zip([*models, start], SHOWN, strict=True)]
    assert_says(mixture, rollouts, mean_of(each, weights, kind))


@pytest.mark.parametrize("make", [LiveTeacher, SameCheckpointTeacher, make_sibling])
@pytest.mark.parametrize(("kind", "weights"), MIXED)
def test_one_teacher_under_several_contexts_is_their_mean(
    kind: str, weights: list[float], make: Callable[[], Teacher]
) -> None:
    """The stacked pass must hand each context its own rows back: an order mixed up would still be finite."""
    student = make_student("full").eval()
    start = copy.deepcopy(student)
    mixture = prepared(MixtureTeacher(make(), weights, kind=kind, contexts=SHOWN), student)
    move(student)
    model = {"live": student, "same_checkpoint": start, "sibling": make_llama(5)}[make().strategy]
    rollouts = make_rollouts()
    assert_says(mixture, rollouts, mean_of([plain_logprobs(model, n, rollouts) for n in SHOWN], weights, kind))


# ---- what it costs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "lora", "arriving adapter"])
@pytest.mark.parametrize(
    "make", [LiveTeacher, SameCheckpointTeacher, lambda: EMATeacher(0.5), lambda: SnapshotTeacher(2)]
)
def test_contexts_are_one_batched_pass_over_one_copy_of_the_weights(
    kind: str, make: Callable[[], Teacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    single = prepared(make(), make_student(kind))
    mixture = prepared(MixtureTeacher(make(), [0.2, 0.3, 0.5], contexts=SHOWN), make_student(kind))
    rollouts = mixture.prompts.render(make_rollouts())
    monkeypatch.setattr("opsd.models.passes.PASS", 10**9)  # rows of unlike lengths are not worth another pass
    with counting_passes() as sequences:
        mixture.score(rollouts)
    assert sequences == [3 * len(rollouts)]
    assert mixture.cost.megabytes == single.cost.megabytes


def reachable(thing: Any, seen: dict[int, Any]) -> list[Tensor]:
    """Every tensor that can be found from an object through attributes, containers and modules."""
    if id(thing) in seen:
        return []
    seen[id(thing)] = thing
    if isinstance(thing, Tensor):
        return [thing]
    inside: list[Any] = []
    if isinstance(thing, nn.Module):
        inside = [*thing.parameters(), *thing.buffers()]
    elif isinstance(thing, dict):
        inside = list(thing.values())
    elif isinstance(thing, list | tuple | set):
        inside = list(thing)
    elif type(thing).__module__.startswith("opsd"):
        inside = list(vars(thing).values())
    return [tensor for each in inside for tensor in reachable(each, seen)]


@pytest.mark.parametrize("kind", ["lora", "arriving adapter"])
def test_a_lora_run_of_many_teachers_holds_one_copy_of_the_base(kind: str) -> None:
    """Counted by storages over everything reachable from the teacher, also what `tensors` forgets to list."""
    student = make_student(kind)
    adapter = megabytes([p for p in student.parameters() if p.requires_grad])
    base = megabytes([p for p in student.parameters() if not p.requires_grad])
    parts: list[Teacher] = [SameCheckpointTeacher(context="answer_only"), SameCheckpointTeacher()]
    parts += [LiveTeacher(context="answer_only"), EMATeacher(0.9), EMATeacher(0.5, context="worked_solution")]
    several = MixtureTeacher(parts, [0.2] * 5)
    of_contexts = MixtureTeacher(EMATeacher(0.1), [0.2, 0.3, 0.5], contexts=SHOWN)
    teacher = prepared(RoutedTeacher("domain", {"even": several, "odd": of_contexts}), student)
    teacher.score(teacher.prompts.render(make_rollouts()))
    copies = 3 + (2 if kind == "arriving adapter" else 0)  # of the adapter: a fresh one is switched off instead
    found = megabytes([*student.parameters(), *reachable(teacher, {})])
    assert found == pytest.approx(base + (1 + copies) * adapter, abs=1e-3)
    assert teacher.cost.megabytes == pytest.approx(copies * adapter)


# ---- how it is written --------------------------------------------------------------------------------------------


def test_an_outer_context_is_shown_to_parts_that_have_none() -> None:
    parts = [EMATeacher(0.9, context="worked_solution"), LiveTeacher(), LiveTeacher(context="answer_only")]
    mixture = prepared(MixtureTeacher(parts, [0.2, 0.3, 0.5], context="answer_only"), make_student("full"))
    rollouts = mixture.prompts.render(make_rollouts())
    side = PromptRenderer(make_tokenizer())
    for part, name in zip(mixture.prompts.leaves, ("worked_solution", "answer_only", "answer_only"), strict=True):
        expected = [PrivilegedContext(name).render(row, renderer=side) for row in rollouts.rows]
        assert rollouts.teacher_prompt_ids[part] == expected


def test_an_outer_context_reaches_only_those_that_were_given_none() -> None:
    """It would overwrite what a mixture inside a route is shown, and its contrast would cancel out."""
    ema = EMATeacher(0.9)
    inner = MixtureTeacher([EMATeacher(0.9, context="hint"), LiveTeacher()], [0.5, 0.5])
    several = MixtureTeacher(EMATeacher(0.5), [1.5, -0.5], kind="geometric", contexts=["hint", None])
    teachers = {"a": inner, "b": several, "c": ema, "d": ema}
    route = RoutedTeacher("domain", teachers, context="answer_only")
    shown = [leaf.context and leaf.context.name for leaf in route.prompts.leaves]
    assert shown == ["hint", "answer_only", "hint", None, "answer_only", "answer_only"]
    assert len(route.members) == 4 and len(route.prompts.distinct) == 3, "one teacher under two names stays one"  # type: ignore[attr-defined]
    assert inner.prompts.leaves[1].context is None and ema.context is None, "the parts themselves are left alone"


def test_a_mixture_reads_from_yaml_as_from_python(tmp_path: Path) -> None:
    """Parts are recipes' names, changed recipes or strategies; a part's own context wins over the recipe's."""
    (tmp_path / "mine.yaml").write_text(
        "about: a test\nsource: none\ncontext: worked_solution\n"
        "teacher:\n  strategy: mixture\n  kind: geometric\n  weights: [0.7, 0.5, -0.2]\n  teachers:\n"
        "  - {strategy: ema, decay: 0.9, context: answer_only}\n  - {strategy: live}\n  - {recipe: ema, decay: 0.5}\n"
    )
    read = load_teacher(tmp_path / "mine.yaml")
    parts = [EMATeacher(0.9, context="answer_only"), LiveTeacher(), EMATeacher(0.5)]
    built = MixtureTeacher(parts, [0.7, 0.5, -0.2], kind="geometric", context="worked_solution")
    student = make_student("lora").eval()
    said = []
    for teacher in (prepared(read, student), prepared(built, student)):
        shown = teacher.prompts.render(make_rollouts())
        said.append(teacher.score(shown).logprobs(torch.tensor(shown.scored_ids)))
    assert torch.equal(*said) and read.describe() == built.describe()
    assert {**read.description, "context": None} == {**built.description, "context": None}


PAIR: dict[str, Any] = {"strategy": "mixture", "teachers": [{"strategy": "live"}, {"strategy": "ema", "decay": 0.9}]}
ONE: dict[str, Any] = {"strategy": "mixture", "teachers": {"strategy": "live"}}
INNER = {**PAIR, "weights": [0.5, 0.5]}
ROUTE = {"strategy": "routed", "column": "a", "teachers": {"b": {"strategy": "live"}}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({**PAIR, "weights": [0.5, 0.49]}, "adding up to 1"),
    ({**PAIR, "weights": [1.0]}, "needs one weight for each"),
    ({**PAIR, "weights": [0.2, 0.3, 0.5]}, "needs one weight for each"),
    ({**PAIR, "weights": [1.2, -0.2]}, 'negative probabilities. Use kind="geometric"'),
    ({**PAIR, "weights": [float("nan"), 1.0]}, "must be a number"),
    ({**PAIR, "weights": [0.5, 0.5], "kind": "aritmetic"}, "Did you mean 'arithmetic'"),
    ({**PAIR, "weights": [0.5, 0.5], "contexts": ["hint", None]}, "2 teachers were given"),
    ({**ONE, "weights": [0.5, 0.5], "contexts": ["hint"]}, "needs one weight for each"),
    ({**ONE, "weights": [1.0], "contexts": ["hint"], "context": "hint"}, "Name it among the contexts"),
    ({**PAIR, "weights": [0.5, 0.5], "teachers": [INNER, {"strategy": "live"}]}, "'mixture' does not run"),
    ({**PAIR, "weights": [0.5, 0.5], "teachers": [{"strategy": "live"}, ROUTE]}, "'routed' does not run"),
    ({**PAIR, "weights": [0.5, 0.5], "teachers": [None, {"strategy": "live"}]}, "part '0' of this mixture"),
    ({**PAIR, "weights": [0.5, 0.5], "teachers": [{"strategy": "live"}, {"strategy": "emma"}]},
     "part '1' of this mixture teacher: no teacher strategy is called 'emma'. Did you mean 'ema'"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_a_mixture_that_is_no_distribution_or_no_model_is_refused_as_it_is_read(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load_teacher(settings)
    assert message in str(error.value)


@pytest.mark.parametrize("weights", [["1e-1", 0.9], "0.5", [None, 1.0]])
def test_weights_that_are_no_numbers_are_refused(weights: Any) -> None:
    with pytest.raises(ConfigError, match="number"):
        MixtureTeacher([LiveTeacher(), EMATeacher(0.9)], weights)


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        ("live", "part '0' of this mixture teacher is a Teacher object, and this is 'live'"),
        ([LiveTeacher(), {"strategy": "ema"}], "Write load_teacher({'strategy': 'ema'})"),
        ([LiveTeacher(), LiveTeacher], "this is the class LiveTeacher. Make one: LiveTeacher(…)"),
        ([LiveTeacher(), None], "part '1' of this mixture teacher is a Teacher object, and this is a NoneType"),
    ],
)
def test_a_constructor_takes_teachers_and_says_who_reads_names(teachers: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        MixtureTeacher(teachers, [0.5, 0.5])
    assert message in str(error.value)


def test_a_mixture_cannot_sample_and_that_is_said_before_a_model_loads(tmp_path: Path) -> None:
    mixture = MixtureTeacher([LiveTeacher(), EMATeacher(0.9)], [0.5, 0.5])
    with pytest.raises(ConfigError, match="seq_kd trains on the teacher's samples"):
        make_trainer(tmp_path, mixture, "no/such-model", seq_kd=True, lmbda=0.5)


def test_a_part_with_a_foreign_tokenizer_is_refused_however_deep_it_is() -> None:
    """Also where it is the one that is shown several contexts."""
    foreign = SiblingTeacher(make_llama(1), tokenizer=make_tokenizer(390))
    for mixture in (
        MixtureTeacher([LiveTeacher(), foreign], [0.5, 0.5]),
        MixtureTeacher(foreign, [0.5, 0.5], contexts=["answer_only", None]),
    ):
        with pytest.raises(TokenizerMismatchError, match="for the student and"):
            prepared(RoutedTeacher("domain", {"even": mixture, "odd": LiveTeacher()}), make_llama())


# ---- who is told of a step ----------------------------------------------------------------------------------------


def alone(decay: float, steps: int) -> dict[str, Tensor]:
    """What an average by itself holds after these steps of `follow`."""
    student = make_student("lora")
    teacher = prepared(EMATeacher(decay), student)
    follow(teacher, student, steps)
    return teacher.weight_copy.values  # type: ignore[attr-defined]


def follow(teacher: Teacher, student: nn.Module, steps: int) -> None:
    for step in range(1, steps + 1):
        move(student)
        teacher.before_step(step - 1, [])
        teacher.after_step(step)


def in_both(ema: Teacher) -> dict[str, Teacher]:
    return {"even": MixtureTeacher([ema, LiveTeacher()], [0.5, 0.5]), "odd": ema}


def in_two(ema: Teacher) -> dict[str, Teacher]:
    return {name: MixtureTeacher(ema, [0.5, 0.5], contexts=[name, None]) for name in ("answer_only", "worked_solution")}


SHARED: dict[str, Callable[[Teacher], Teacher]] = {
    "several contexts": lambda ema: MixtureTeacher(ema, [0.5, 0.5], contexts=["answer_only", None]),
    "twice in a mixture": lambda ema: MixtureTeacher([ema, LiveTeacher(), ema], [0.2, 0.3, 0.5]),
    "two names of a route": lambda ema: RoutedTeacher("domain", {"even": ema, "odd": ema}),
    "in a mixture and beside it": lambda ema: RoutedTeacher("domain", in_both(ema)),
    "in two mixtures": lambda ema: RoutedTeacher("domain", in_two(ema)),
}


@pytest.mark.parametrize("how", SHARED)
def test_a_teacher_that_is_part_of_several_things_follows_once_a_step(how: str) -> None:
    """Updated twice, an average of decay d is one of d²; prepared twice, a part keeps weights that nobody updates."""
    ema, student = EMATeacher(0.8), make_student("lora")
    teacher = prepared(SHARED[how](ema), student)
    follow(teacher, student, steps=3)
    assert ema.progress == 3
    expected = alone(0.8, steps=3)
    assert {id(leaf.teacher) for leaf in teacher.prompts.leaves} == {id(member) for member in teacher.members}
    for name, value in ema.weight_copy.values.items():
        assert torch.equal(value, expected[name]), name
    assert teacher.cost.megabytes == ema.cost.megabytes
    assert len(teacher.state_dict()) == len(ema.state_dict())


def test_parts_keep_their_own_states_through_a_checkpoint() -> None:
    """Two averages in one mixture, a snapshot in another: each must get back what it gave, and how far it had come."""

    def make() -> Teacher:
        several = MixtureTeacher([EMATeacher(0.9), LiveTeacher(), EMATeacher(0.1, every=2)], [0.2, 0.3, 0.5])
        renewed = MixtureTeacher(SnapshotTeacher(2), [0.5, 0.5], contexts=["answer_only", None])
        return RoutedTeacher("domain", {"even": several, "odd": renewed})

    student = make_student("lora")
    before, after = prepared(make(), student), prepared(make(), student)
    follow(before, student, steps=4)
    after.load_state_dict({name: value.clone() for name, value in before.state_dict().items()})
    slow, fast = (each.weight_copy.values for each in after.members if isinstance(each, EMATeacher))
    assert all(torch.equal(slow[n], v) for n, v in alone(0.9, steps=4).items())
    assert any(not torch.equal(slow[n], fast[n]) for n in slow)
    shown = [t.prompts.render(make_rollouts()) for t in (before, after)]
    ids = torch.tensor(shown[0].scored_ids)
    assert torch.equal(*(t.score(r).logprobs(ids) for t, r in zip((before, after), shown, strict=True)))
    assert before.metrics == after.metrics == {"teacher/snapshot_of_step": 2}
    for teacher in (before, after):  # and they go on alike: the second average counts its own updates
        follow(teacher, make_student("lora"), steps=0)
        teacher.after_step(6)
    assert all(torch.equal(v, after.state_dict()[n]) for n, v in before.state_dict().items())
