"""Averages: of the product B·A and of factors, against closed forms and hand-merged weights in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama
from helpers import LORA, logged, make_rollouts, make_student, make_trainer, prepared, snapshot
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from opsd import EMATeacher, MixtureTeacher, RoutedTeacher, load_teacher
from opsd.errors import ConfigError
from opsd.teachers.products import A, B
from opsd.training.checkpoints import read, write

Values = dict[str, Tensor]


def lora(model: nn.Module | None = None, **settings: Any) -> nn.Module:
    """A student whose adapter training has moved already."""
    torch.manual_seed(0)
    student = get_peft_model(model or make_llama(), LoraConfig(**{**LORA, **settings}))
    train(student, step=100, by=0.005)
    return student


def train(model: nn.Module, step: int, by: float = 0.05) -> None:
    """Move every trainable parameter, in each step in another direction and further."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(by * step**0.5 * torch.randn(p.shape, generator=generator).to(p))


def products(values: Values) -> Values:
    """B·A of each layer in float64."""
    return {name: values[name.replace(A, B)].double() @ values[name].double() for name in values if A in name}


def average(history: list[Tensor], decays: list[float]) -> Tensor:
    """Σ shareᵢ·θᵢ with shareᵢ = (1 - decayᵢ)·∏_{j>i} decayⱼ, and ∏ decayⱼ for the start."""
    total = torch.zeros_like(history[0], dtype=torch.float64)
    for number, value in enumerate(history):
        share = 1.0 if number == 0 else 1.0 - decays[number - 1]
        for later in decays[number:]:
            share *= later
        total += share * value.double()
    return total


def follow(teacher: EMATeacher, student: nn.Module, steps: int, first: int = 1) -> list[Values]:
    """Train and average; return the student's weights at every update, the start included."""
    found = [snapshot(student)]
    for step in range(first, first + steps):
        train(student, step)
        assert teacher.after_step(step) is None
        if step % teacher.every == 0:
            found.append(snapshot(student))
    return found


# ---- of the product -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "arriving adapter"])
@pytest.mark.parametrize(("every", "warmup"), [(1, False), (2, False), (1, True), (2, True)])
def test_the_average_of_products_follows_its_closed_form(kind: str, every: int, warmup: bool) -> None:
    """The mean of products is not the product of means: factors averaged one by one are far away."""
    student = make_student(kind)
    teacher = prepared(EMATeacher(0.6, average="product", rank=1000, every=every, warmup=warmup), student)
    factors = prepared(EMATeacher(0.6, every=every, warmup=warmup), copy.deepcopy(student))
    history = follow(teacher, student, steps=6)
    follow(factors, factors.model, steps=6)
    decays = [min(0.6, (1 + n) / (10 + n)) if warmup else 0.6 for n in range(1, 6 // every + 1)]
    found, apart = products(teacher.weights.values), products(factors.weights.values)
    for name, value in found.items():
        expected = average([products(weights)[name] for weights in history], decays)
        assert (value - expected).abs().max() <= 1e-6, name
        assert (apart[name] - expected).abs().max() > 1e-3, name
    assert teacher.metrics == {"teacher/average_lost": 0.0} and teacher.moved == len(decays)


def merged(base: nn.Module, student: nn.Module, history: list[Values], decay: float, scaling: float) -> nn.Module:
    """The base model with `scaling · mean(B·A)` added to its layers and every other trained weight averaged."""
    start, decays = "base_model.model.", [decay] * (len(history) - 1)
    for name, p in student.named_parameters():
        if not p.requires_grad or f"{B}default.weight" in name:
            continue
        if A in name:
            added = scaling * average([products(weights)[name] for weights in history], decays)
            target = base.get_parameter(name.removeprefix(start).split(A)[0] + ".weight")
        elif B in name:  # what `lora_bias` trains
            added = scaling * average([weights[name] for weights in history], decays)
            target = base.get_parameter(name.removeprefix(start).split(B)[0] + ".bias")
        else:
            own = name.removeprefix(start).replace("modules_to_save.default.", "").replace("base_layer.", "")
            target = base.get_parameter(own)
            added = average([weights[name] for weights in history], decays) - target.double()
        target.data = (target.double() + added).float()
    return base


BIASED = {"attention_bias": True, "mlp_bias": True}
ADAPTERS: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {  # settings, the model's, the factor of B·A
    "plain": ({}, {}, 2.0),
    "scaled by the root of the rank": ({"use_rslora": True}, {}, 4.0),
    "with biases of its own": ({"lora_bias": True}, BIASED, 2.0),
    "with the model's biases": ({"bias": "lora_only"}, BIASED, 2.0),
    "with a whole head": ({"modules_to_save": ["lm_head"]}, {"tie": False}, 2.0),
    "on some layers, with dropout": ({"target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.5}, {}, 2.0),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_stacked_factors_compute_what_the_averaged_product_would(name: str) -> None:
    """Wider factors go through PEFT's own layers, whose scaling and biases must stay what they were."""
    settings, of_model, scaling = ADAPTERS[name]
    student = lora(make_llama(**of_model), **settings)
    teacher = prepared(EMATeacher(0.7, average="product", rank=1000), student)
    history = follow(teacher, student, steps=3)
    expected = merged(make_llama(**of_model), student, history, 0.7, scaling).eval()
    rollouts = make_rollouts()
    found = teacher.logprobs(rollouts.rows, rollouts.completion_ids)
    for row, completion, values in zip(rollouts.rows, rollouts.completion_ids, found, strict=True):
        prompt = teacher.prompt_ids(row)
        with torch.no_grad():
            logits = expected(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double()
        wanted = torch.log_softmax(logits, -1).gather(-1, torch.tensor(completion)[:, None])[:, 0]
        assert values == pytest.approx(wanted.tolist(), abs=2e-4)
    assert all(p.shape == history[0][n].shape for n, p in student.named_parameters()), "the student got its own back"


def test_a_factor_that_a_user_froze_leaves_an_average_of_the_other() -> None:
    """With one factor fixed the product is linear in the other; some layers may be frozen, others not."""
    student = lora()
    for name, p in student.named_parameters():
        if "layers.0" in name and (B if "q_proj" in name else A if "k_proj" in name else "none") in name:
            p.requires_grad_(False)
    teacher = prepared(EMATeacher(0.7, average="product", rank=1000), student)
    history = follow(teacher, student, steps=4)
    with teacher.teaching():
        found = products(snapshot(student))
    for name, value in found.items():
        expected = average([products(weights)[name] for weights in history], [0.7] * 4)
        assert (value - expected).abs().max() <= 1e-6, name


def test_the_first_re_factorisation_is_the_best_one_of_its_rank() -> None:
    """By Eckart and Young no product of that rank is nearer than the singular value decomposition, cut off."""
    student = lora()
    teacher = prepared(EMATeacher(0.5, average="product", rank=4), student)
    history = follow(teacher, student, steps=2)  # stacks of 4, 8 and then 12, above twice the rank
    shares = []
    for name, value in products(teacher.weights.values).items():
        assert len(teacher.weights.values[name]) == 4 == teacher.weights.values[name.replace(A, B)].shape[1]
        exact = average([products(weights)[name] for weights in history], [0.5] * 2)
        u, s, vh = torch.linalg.svd(exact)
        assert torch.allclose(value, (u[:, :4] * s[:4]) @ vh[:4], atol=1e-6), name
        shares.append(float((value - exact).norm() / exact.norm()))
    assert min(shares) > 1e-3, "else nothing was left out"
    assert teacher.metrics["teacher/average_lost"] == pytest.approx(max(shares), rel=1e-4)


@pytest.mark.parametrize(("rank", "refactored"), [(4, 8), (6, 7), (40, 0)])
def test_the_error_of_a_low_rank_stays_within_what_is_said_to_be_lost(rank: int, refactored: int) -> None:
    """Each re-factorisation leaves out at most `lost` of what it got; what was left out before fades with the decay."""
    student = lora()
    teacher = prepared(EMATeacher(0.8, average="product", rank=rank), student)
    history, count = [snapshot(student)], 0
    bounds = dict.fromkeys(products(history[0]), 0.0)
    events: list[dict[str, tuple[bool, float]]] = []
    for step in range(1, 17):
        before = {name: len(v) for name, v in teacher.weights.values.items() if A in name}
        train(student, step, by=0.02)
        teacher.after_step(step)
        history.append(snapshot(student))
        made = products_of_all(history)
        exact = {name: average(made[name], [0.8] * step) for name in bounds}
        events.append({n: (len(teacher.weights.values[n]) <= before[n], float(exact[n].norm())) for n in bounds})
        count += all(now for now, _ in events[-1].values())
        assert all(len(teacher.weights.values[name]) <= 2 * rank for name in bounds)
    lost = teacher.metrics["teacher/average_lost"]
    for happened in events:
        for name, (now, norm) in happened.items():
            bounds[name] = 0.8 * bounds[name] + (lost * (norm + 0.8 * bounds[name]) if now else 0.0)
    assert count == refactored and (lost > 1e-3) == (refactored > 0)
    for name, value in products(teacher.weights.values).items():
        error = float((value - exact[name]).norm())
        assert error <= bounds[name] + 1e-5, name
        assert (error > 1e-4) == (refactored > 0), name


def products_of_all(history: list[Values]) -> dict[str, list[Tensor]]:
    each = [products(weights) for weights in history]
    return {name: [of_step[name] for of_step in each] for name in each[0]}


def test_what_is_lost_is_in_the_log_of_a_run(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, EMATeacher(0.5, average="product", rank=1, context="answer_only"), "arriving adapter", max_steps=3
    )
    trainer.train()
    lost = logged(trainer, "teacher/average_lost")
    assert len(lost) == 3 and 0 < lost[0] <= lost[1] <= lost[2] == trainer.teacher.metrics["teacher/average_lost"] < 1


@pytest.mark.parametrize("steps", [1, 3, 6])
@pytest.mark.parametrize("inside", [False, True])
def test_an_averaged_product_comes_back_at_the_rank_it_had(tmp_path: Path, steps: int, inside: bool) -> None:
    """Its factors have other shapes than at the start, so a copy into place would fail; through a checkpoint's file."""

    def make() -> Any:
        ema = EMATeacher(0.7, average="product", rank=5, warmup=True)
        mixture = MixtureTeacher(ema, [0.5, 0.5], contexts=["answer_only", None])
        return (RoutedTeacher("domain", {"even": mixture, "odd": ema}), ema) if inside else (ema, ema)

    (before, ema), (after, again), student = make(), make(), lora()
    prepared(before, student)
    follow(ema, student, steps)
    write(tmp_path / "checkpoint-1", before.state_dict(), {}, step=1)
    prepared(after, copy.deepcopy(student)).load_state_dict(read(tmp_path / "checkpoint-1", {})[0])
    assert again.moved == steps and again.metrics == ema.metrics
    for more in range(4):  # they go on alike, through the next re-factorisation
        for name, value in ema.weights.values.items():
            assert torch.equal(value, again.weights.values[name]), (more, name)
        for teacher in (ema, again):
            follow(teacher, teacher.model, 1, first=steps + 1 + more)
    assert torch.equal(before.state_dict().popitem()[1], after.state_dict().popitem()[1])


NOT_PRODUCTS: list[tuple[Callable[[], nn.Module], str]] = [
    (make_llama, "has no LoRA factors"),
    (lambda: lora(use_dora=True), "lora_magnitude_vector"),
    (lambda: lora(target_modules=["q_proj", "embed_tokens"]), "lora_embedding_"),
]


@pytest.mark.parametrize(("make", "why"), NOT_PRODUCTS, ids=["full model", "DoRA", "embeddings"])
def test_a_student_without_products_is_refused_also_within_a_mixture(make: Callable, why: str) -> None:
    ema = EMATeacher(0.9, average="product")
    teacher = MixtureTeacher([EMATeacher(0.9), ema], [0.5, 0.5])
    with pytest.raises(ConfigError, match=rf'averages what LoRA adds.*{why}.*Use average="factors"'):
        prepared(teacher, make())
    prepared(EMATeacher(0.9, average="factors"), make())  # the way out


# ---- of the factors, and settings of both -------------------------------------------------------------------------


@pytest.mark.parametrize("average_of", ["factors", "product"])
def test_a_decay_of_nearly_one_moves_the_average_of_a_bfloat16_adapter(average_of: str) -> None:
    """In bfloat16 0.9999 would never move; the average is in float32 whatever the student's dtype."""
    student = lora().to(torch.bfloat16)
    teacher = prepared(EMATeacher(0.9999, average=average_of), student)
    history = [snapshot(student)]
    for step in range(1, 6):
        train(student, step, by=0.5)
        teacher.after_step(step)
        history.append(snapshot(student))
    of = products if average_of == "product" else dict
    found, moved = of(teacher.weights.values), 0.0
    for name, value in found.items():
        each = [of(weights)[name].double() for weights in history]
        assert (value.double() - average(each, [0.9999] * 5)).abs().max() <= 1e-6 * max(
            1.0, float(each[-1].abs().max())
        )
        moved = max(moved, float((value.double() - each[0]).abs().max()))
    assert moved > 1e-4 and all(v.dtype == torch.float32 for v in teacher.weights.values.values())


def test_a_warm_up_goes_on_after_a_resume_where_it_was() -> None:
    """Counted anew, it would forget the average at the first step after a stop."""
    student = make_student("lora")
    whole, first, rest = (prepared(EMATeacher(0.99, warmup=True, every=2), student) for _ in range(3))
    for step in range(1, 9):
        train(student, step)
        if step == 5:
            rest.load_state_dict(first.state_dict())
        for teacher in (whole, first if step < 5 else rest):
            teacher.after_step(step)
    assert all(torch.equal(v, rest.weights.values[n]) for n, v in whole.weights.values.items())
    assert [round(whole.decay_of(n), 4) for n in (1, 2, 8, 1000)] == [0.1818, 0.25, 0.5, 0.99]
    assert rest.moved == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading is from a GPU to CPU memory")
@pytest.mark.parametrize("average_of", ["factors", "product"])
def test_an_offloaded_average_stays_in_cpu_memory(average_of: str) -> None:
    student = lora().cuda()
    teacher = prepared(EMATeacher(0.7, average=average_of, offload=True), student)
    follow(teacher, student, steps=4)
    teacher.score(teacher.render_prompts(make_rollouts()))
    assert {v.device.type for v in teacher.tensors} == {"cpu"} and teacher.cost.offloaded == teacher.cost.megabytes


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"decay": 1}, "at least 0 and below 1"),
    ({"decay": 0.9, "every": 0}, "every must be a whole number"),
    ({"decay": 0.9, "every": 2.0}, "every must be a whole number"),
    ({"decay": 0.9, "warmup": "yes"}, "warmup is true or false"),
    ({"decay": 0.9, "warmup": 10}, "warmup is true or false"),
    ({"decay": 0.9, "average": "factor"}, "Did you mean 'factors'"),
    ({"decay": 0.9, "rank": 8}, "rank is that of an averaged product"),
    ({"decay": 0.9, "average": "product", "rank": "8"}, "rank must be a whole number"),
    ({"decay": 0.9, "averge": "product"}, "Did you mean 'average'"),
    ({}, "needs decay"),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS)
def test_settings_of_an_average_outside_their_range_are_refused_as_they_are_read(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_teacher({"strategy": "ema", **settings})
    assert message in str(error.value)
