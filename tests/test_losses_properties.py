"""Properties of divergences: bounds, limits, unbiased estimates, refused settings, descriptions."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses_cases import BETAS, DIVERGENCE_CASES, OBJECTIVES, TOP_K, name_of, of_logits, problem, random
from losses_twin import measured

from opsd.errors import ConfigError
from opsd.losses import Divergence, Objective
from opsd.losses.estimators import ESTIMATORS
from opsd.losses.supports import TAILS
from opsd.models.head import Head
from opsd.signals import HiddenSignal, MixtureSignal, TopKSignal

NEVER_NEGATIVE = [
    d
    for d in DIVERGENCE_CASES
    if d.support != "sampled" and d.entry_clip is None and (d.support == "full" or d.tail != "none")
]
quick = settings(max_examples=8, deadline=None, derandomize=True)
seeds, spreads = st.integers(0, 10_000), st.floats(0.01, 30.0)


def values_of(divergence: Divergence, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return measured(Objective(divergence), of_logits(student, teacher)).values["divergence"].double()


def logits(seed: int, spread: float = 1.0, n: int = 4, v: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    return spread * random(n, v, seed=seed), spread * random(n, v, seed=seed + 1)


# ---- bounds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", NEVER_NEGATIVE, ids=name_of)
@quick
@given(seed=seeds, spread=spreads)
def test_a_divergence_is_never_negative(divergence: Divergence, seed: int, spread: float) -> None:
    result = values_of(divergence, *logits(seed, spread))
    assert (result >= -1e-6).all() and result.isfinite().all()


@quick
@given(beta=st.floats(0, 1), seed=seeds, spread=st.floats(0.1, 30.0))
def test_a_divergence_is_zero_where_both_are_equal_and_only_there(beta: float, seed: int, spread: float) -> None:
    beta = min(max(beta, 1e-2), 1 - 1e-2) if 0 < beta < 1 else beta
    student, teacher = logits(seed, spread)
    assert (values_of(Divergence(beta), student, student + 7.0).abs() <= 1e-6).all()
    differ = (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1) > 0.1  # two that are certain of one token do not
    assert (values_of(Divergence(beta), student, teacher)[differ] > 1e-7).all()


EQUAL_IS_STILL = [d for d in NEVER_NEGATIVE if d.support != "sampled"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "divergence", [d for d in DIVERGENCE_CASES if d.support == "full" or d.tail == "bucket"], ids=name_of
)
def test_equal_sides_have_a_gradient_of_exactly_zero(divergence: Divergence, dtype: torch.dtype) -> None:
    if divergence.support == "sampled" or divergence.entry_clip is not None:
        return
    case = problem(9, dtype=dtype, head="all of it")
    case = replace(case, signal=HiddenSignal(case.hidden_ND, case.head))
    result = measured(Objective(divergence), case)
    assert all(g.abs().max().item() == 0.0 for g in result.gradients.values())


@pytest.mark.parametrize("divergence", EQUAL_IS_STILL, ids=name_of)
def test_equal_sides_have_hardly_any_gradient_on_any_support(divergence: Divergence) -> None:
    case = problem(9)
    result = measured(Objective(divergence), replace(case, signal=HiddenSignal(case.hidden_ND, case.head)))
    assert all(g.abs().max().item() < 1e-13 for g in result.gradients.values())


@quick
@given(seed=seeds, spread=st.floats(0.1, 1e4))
def test_the_jensen_shannon_divergence_is_at_most_ln_2(seed: int, spread: float) -> None:
    assert (values_of(Divergence(0.5), *logits(seed, spread)) <= math.log(2) + 1e-6).all()


@pytest.mark.parametrize(("beta", "end"), [(1e-4, 0.0), (1 - 1e-4, 1.0)])
def test_the_divided_jsd_tends_to_the_kls(beta: float, end: float) -> None:
    student, teacher = logits(3, 0.4)
    divided = measured(Objective(Divergence(beta)), of_logits(student, teacher)).gradients["states"]
    exact = measured(Objective(Divergence(end)), of_logits(student, teacher)).gradients["states"]
    assert torch.allclose(divided / (beta * (1 - beta)), exact, rtol=2e-2, atol=1e-4)
    ratio = values_of(Divergence(beta), student, teacher) / (beta * (1 - beta))
    assert torch.allclose(ratio, values_of(Divergence(end), student, teacher), rtol=1e-2)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("support", TOP_K)
def test_a_support_with_its_bucket_grows_to_the_whole_vocabulary(support: str, beta: float) -> None:
    """Coarsening never adds divergence, and the order of the teacher adds entries one by one."""
    student, teacher = logits(5, 2.0)
    of_k = [values_of(Divergence(beta, support=support, support_k=k), student, teacher) for k in (1, 3, 6, 10, 11, 99)]
    whole = values_of(Divergence(beta), student, teacher)
    assert all((a <= b + 1e-6).all() for a, b in itertools.pairwise(of_k) if support != "union")
    assert all((a <= whole + 1e-6).all() for a in of_k)
    assert torch.allclose(of_k[-1], whole, atol=1e-6) and torch.allclose(of_k[-2], whole, atol=1e-6)


def test_a_clipped_forward_kl_may_be_negative() -> None:
    """t = (.9, .1), s = (.5, .5): .529 is capped at .05, and .1·log .2 = -.161 stands."""
    result = values_of(Divergence(0.0, entry_clip=0.05), torch.zeros(1, 2), torch.tensor([[math.log(9.0), 0.0]]))
    assert result.item() == pytest.approx(0.05 + 0.1 * math.log(0.2), abs=1e-6)


def test_mass_that_leaves_the_support_makes_tail_none_negative() -> None:
    d = Divergence(support="teacher_top_k", support_k=1, tail="none", force_tail=True)
    assert values_of(d, torch.tensor([[-3.0, 0.0]]), torch.tensor([[3.0, 0.0]])).item() < 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("gap", [80.0, 110.0, 1e3, 1e4, math.inf])
def test_a_teachers_probability_that_underflows_is_bounded(gap: float, beta: float, dtype: torch.dtype) -> None:
    student = torch.tensor([[0.0, 0.0, 0.0]], dtype=dtype)
    case = of_logits(student, torch.tensor([[0.0, -gap, 1.0]]))
    eye = Head(torch.eye(3, dtype=dtype))
    case = replace(case, hidden_ND=student, head=eye)
    if gap == math.inf:  # as states they would be 0 · inf
        masked = Head(eye.weight_VD, torch.tensor([0.0, -gap, 1.0], dtype=dtype))
        case = replace(case, signal=HiddenSignal(student, masked))
    result = measured(Objective(Divergence(beta)), case)
    assert result.values["loss"].item() <= 100.0 and result.gradients["states"].abs().max().item() <= 100.0


# ---- estimates from sampled tokens ----------------------------------------------------------------------------------

SAMPLES, ERROR_RATE = 20_000, 1e-4  # chance that a correct implementation fails one of these tests, Bonferroni over z
STUDENT, TEACHER = [0.3, -0.5, 1.0, 0.0, -2.0], [1.0, 0.0, -0.5, 0.4, 0.2]
FAR_TEACHER = [-3.0, -2.0, -3.0, -3.5, 4.0]


def sampled(
    baseline: str, sampler: list[float] | None = None, teacher: list[float] = TEACHER
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One gradient per sampled token, all of one distribution; and the metrics."""
    drawn_from = torch.tensor(sampler or STUDENT, dtype=torch.float64).log_softmax(-1)
    ids = torch.multinomial(drawn_from.exp(), SAMPLES, replacement=True, generator=torch.Generator().manual_seed(1))
    case = of_logits([STUDENT] * SAMPLES, [teacher] * SAMPLES, ids_N=ids, rollout_logprobs_N=drawn_from[ids].float())
    clip = None if sampler is None else 1e6
    result = measured(Objective(Divergence(support="sampled", baseline=baseline), importance_clip=clip), case)
    return result.gradients["states"], result.values


def assert_unbiased(samples: torch.Tensor, expected: torch.Tensor) -> None:
    error = samples.std(0) / math.sqrt(len(samples))
    z = (samples.mean(0) - expected).abs() / error
    assert z.max().item() < NormalDist().inv_cdf(1 - ERROR_RATE / 2 / z.numel()), z


def exact(beta: float = 1.0) -> tuple[torch.Tensor, float]:
    result = measured(Objective(Divergence(beta)), of_logits([STUDENT], [TEACHER]))
    return result.gradients["states"][0], result.values["loss"].item()


@pytest.mark.parametrize("sampler", [None, [0.0, 0.0, 0.5, 0.2, -1.0]], ids=["student", "another, corrected"])
@pytest.mark.parametrize("baseline", ["optimal", "none"])
def test_the_policy_gradient_is_unbiased(baseline: str, sampler: list[float] | None) -> None:
    assert_unbiased(sampled(baseline, sampler)[0], exact()[0])


def test_no_other_baseline_varies_less() -> None:
    """The mean of the log-ratio, the usual baseline, does worse than none here."""
    result, metrics = sampled("none")
    size = result / metrics["k1"].double()[:, None]  # ∇log s(y)
    at_best = sampled("optimal")[0].var(0).sum().item()
    usual = (metrics["k1"].double() - exact()[1])[:, None] * size
    assert at_best < result.var(0).sum().item() < usual.var(0).sum().item()
    for other in torch.linspace(-1.0, 1.0, 21, dtype=torch.float64):
        assert at_best <= 1.01 * ((metrics["k1"].double() - other)[:, None] * size).var(0).sum().item()


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_estimators_are_unbiased(name: str) -> None:
    assert_unbiased(sampled("none")[1][name].double()[:, None], torch.tensor([exact()[1]]))


def test_the_test_of_bias_rejects_a_biased_estimator() -> None:
    with pytest.raises(AssertionError):
        assert_unbiased(sampled("none")[1]["k2"].double()[:, None], torch.tensor([exact()[1]]))


def test_k3_is_never_negative_and_varies_less_than_k1() -> None:
    r = random(1000, seed=3)
    near = sampled("none")[1]
    assert (ESTIMATORS["k3"](r) >= 0).all() and near["k3"].var() < near["k1"].var()


@pytest.mark.parametrize(
    "divergence",
    [Divergence(), Divergence(support="sampled"), Divergence(support="sampled", baseline="none")],
    ids=name_of,
)
def test_rewards_to_go_give_the_gradient_of_whole_rollouts(divergence: Divergence) -> None:
    """Exactly: all rollouts of two tokens, each weighed by its probability, against autograd of the rollouts' KL."""
    v = 3
    first, second = random(1, v, seed=1)[0].requires_grad_(), random(v, v, seed=2).requires_grad_()
    teacher_first, teacher_second = random(1, v, seed=3)[0], random(v, v, seed=4)
    s1, s2, t1, t2 = (x.log_softmax(-1) for x in (first, second, teacher_first, teacher_second))
    log_s, log_t = s1[:, None] + s2, t1[:, None] + t2
    (log_s.exp() * (log_s - log_t)).sum().backward()
    pairs = list(itertools.product(range(v), repeat=2))
    stack = lambda one, two: torch.stack([x for a, _ in pairs for x in (one, two[a])]).detach()  # noqa: E731
    case = of_logits(
        stack(first, second),
        stack(teacher_first, teacher_second),
        weight_N=torch.stack([log_s[a, b].exp().detach() for a, b in pairs for _ in range(2)]),
        ids_N=torch.tensor(pairs).flatten(),
        row_N=torch.arange(len(pairs)).repeat_interleave(2),
    )
    result = measured(Objective(divergence, reward_to_go="discounted"), case).gradients["states"]
    assert torch.allclose(result[0::2].sum(0), first.grad, atol=1e-12)
    by_first = torch.stack(
        [sum(result[2 * i + 1] for i, (a, _) in enumerate(pairs) if a == first_id) for first_id in range(v)]
    )
    assert torch.allclose(by_first, second.grad, atol=1e-12)


# ---- refused --------------------------------------------------------------------------------------------------------

NONE = {"support": "union", "tail": "none"}
REFUSED = [
    ({"beta": -0.1}, "between 0 and 1", "interpolates", "Use 1 for reverse"),
    ({"beta": 1.1}, "between 0 and 1", "interpolates", "Use 1 for reverse"),
    ({"beta": math.nan}, "between 0 and 1", "interpolates", "Use 1 for reverse"),
    ({"temperature": 0.0}, "above 0", "divided by it", "Use 1"),
    ({"temperature": math.nan}, "above 0", "divided by it", "Use 1"),
    ({"support": "teacher_topk"}, "support is 'teacher_topk'", "must be one of", "Did you mean 'teacher_top_k'"),
    ({"tail": "buckets"}, "tail is 'buckets'", "must be one of", "Did you mean 'bucket'"),
    ({"baseline": "mean"}, "baseline is 'mean'", "must be one of", "optimal"),
    ({"support_k": 0}, "at least 1", "is 0", "size of the support"),
    ({"entry_clip": 0.0}, "entry_clip must be above 0", "is 0", "Leave it out"),
    ({"token_clip": -1.0}, "token_clip must be above 0", "is -1", "Leave it out"),
    ({"entropy_gate": 0.0}, "entropy_gate must be above 0", "is 0", "Leave it out"),
    ({"entropy_gate": 1.0, "beta": 0.0}, "entropy_gate adds the forward KL", "beta is 0", "Set beta to 1"),
    (NONE, "is refused", "falls", "Use tail 'bucket'"),
    (NONE | {"beta": 0.5}, "is refused", "falls", "force_tail"),
    ({"support": "sampled", "beta": 0.5}, "reverse KL", "beta is 0.5", "Set beta to 1"),
    ({"divergence": "forward_ki"}, "divergence is 'forward_ki'", "must be one of", "Did you mean 'forward_kl'"),
    ({"divergence": "generalised_jsd"}, "needs a beta between 0 and 1", "beta is 1", "Set beta to 0.5"),
    (NONE | {"divergence": "generalised_jsd", "beta": 0.5}, "is refused", "falls", "force_tail"),
    (
        {"support": "sampled", "divergence": "forward_kl"},
        "reverse KL",
        "divergence is 'forward_kl'",
        "Set divergence to 'reverse_kl'",
    ),
    ({"entropy_gate": 1.0, "divergence": "forward_kl"}, "entropy_gate adds", "divergence is", "Set divergence to"),
    ({"support": "sampled", "entry_clip": 0.1}, "entry_clip needs the whole", "one token", "token_clip"),
    ({"support": "sampled", "entropy_gate": 1.0}, "entropy_gate needs the whole", "one token", "another support"),
    ({"keep_by": "entropie"}, "keep_by is 'entropie'", "must be one of", "Did you mean 'entropy'"),
    ({"reward_to_go": "all"}, "reward_to_go is 'all'", "must be one of", "discounted"),
    ({"keep_fraction": 0.0}, "keep_fraction", "above 0", "is 0"),
    ({"keep_fraction": 1.1}, "keep_fraction", "up to 1", "is 1.1"),
    ({"prefix_weight": -0.5}, "at least 0", "Below 0", "leave it out"),
    ({"prefix_weight": math.inf}, "must be a number", "is inf", "leave it out"),
    ({"reward_to_go": "discounted", "discount": 0.0}, "discount", "above 0", "is 0"),
    ({"discount": 0.5}, "discount", "no effect", "Set reward_to_go"),
    ({"importance_clip": 0.5}, "at least 1", "Below 1", "leave it out"),
    ({"importance_clip": math.nan}, "at least 1", "Below 1", "leave it out"),
    ({"ref_kl_coef": -0.1}, "must not be negative", "push the student away", "Use 0"),
    ({"loss_budget_mb": 0.0}, "loss_budget_mb must be above 0", "is 0", "Leave it out"),
    ({"reward_to_go": "discounted", "beta": 0.5}, "belongs to the reverse KL", "beta is 0.5", "Set beta to 1"),
    ({"reward_to_go": "mean", "divergence": "forward_kl"}, "belongs to", "divergence is 'forward_kl'", "reverse_kl"),
]


def objective_of(settings: dict) -> Objective:
    inner = {k: v for k, v in settings.items() if k in Divergence.__dataclass_fields__}
    return Objective(Divergence(**inner), **{k: v for k, v in settings.items() if k not in inner})


@pytest.mark.parametrize(("refused", "rule", "reason", "way_out"), REFUSED, ids=[str(r[0]) for r in REFUSED])
def test_what_cannot_work_is_refused(refused: dict, rule: str, reason: str, way_out: str) -> None:
    with pytest.raises(ConfigError) as caught:
        objective_of(refused)
    assert all(part in str(caught.value) for part in (rule, reason, way_out)), str(caught.value)


LISTS = problem(3, signal="top-k lists")
REFUSED_FOR_LISTS = [
    ({}, "whole distribution", "likeliest tokens only", "teacher_top_k"),
    ({"support": "student_top_k"}, "whole distribution", "likeliest tokens only", "teacher_top_k"),
    ({"support": "union"}, "whole distribution", "likeliest tokens only", "a teacher that runs here"),
    ({"support": "teacher_top_k", "temperature": 2.0}, "temperature is 2", "cannot be known", "renormalise"),
    ({"support": "sampled", "temperature": 2.0}, "temperature is 2", "cannot be known", "Set temperature to 1"),
]


@pytest.mark.parametrize(
    ("refused", "rule", "reason", "way_out"), REFUSED_FOR_LISTS, ids=[str(r[0]) for r in REFUSED_FOR_LISTS]
)
def test_what_a_teacher_of_lists_does_not_know_is_refused(refused: dict, rule: str, reason: str, way_out: str) -> None:
    with pytest.raises(ConfigError) as caught:
        measured(objective_of(refused), LISTS)
    assert all(part in str(caught.value) for part in (rule, reason, way_out)), str(caught.value)


@pytest.mark.parametrize("tail", TAILS)
def test_a_teacher_of_lists_answers_for_its_own_support(tail: str) -> None:
    Divergence(support="teacher_top_k", tail=tail, force_tail=True).check_signal(LISTS.signal)
    assert isinstance(LISTS.signal, TopKSignal) and len(LISTS.signal) == 3


@pytest.mark.parametrize(
    ("weights", "kind", "message"),
    [
        ((1.0, 1.0), "arithmetic", "adding up to 1"),
        ((1.5, -0.5), "arithmetic", "geometric"),
        ((0.5, 0.5), "mean", "one of"),
    ],
)
def test_mixtures_that_are_no_distribution_are_refused(weights: tuple, kind: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MixtureSignal([LISTS.reference, LISTS.reference], weights, kind)


# ---- descriptions ---------------------------------------------------------------------------------------------------


def test_descriptions_and_formulas_are_distinct_for_distinct_settings() -> None:
    texts = [(d.describe(), d.formula) for d in DIVERGENCE_CASES]
    assert len(set(texts)) == len(texts)
    objectives = [Objective(**settings) for settings in ({}, *OBJECTIVES.values())]
    assert len({o.describe() for o in objectives}) == len(objectives)


@pytest.mark.parametrize(("beta", "direction"), [(1.0, "KL(student ‖ teacher)"), (0.0, "KL(teacher ‖ student)")])
def test_descriptions_name_the_direction(beta: float, direction: str) -> None:
    assert direction in Divergence(beta).describe() and direction in Objective(Divergence(beta)).describe()


def test_formulas_name_the_direction() -> None:
    assert "s(v)·[log s(v) − log t(v)]" in Divergence(1.0).formula
    assert "t(v)·[log t(v) − log s(v)]" in Divergence(0.0).formula
    assert "0.7·s(v)·[log s(v) − log m(v)]" in Divergence(0.3).formula and "m = 0.3·t" in Divergence(0.3).formula


@pytest.mark.parametrize(("name", "beta"), [("reverse_kl", 1.0), ("forward_kl", 0.0), ("generalised_jsd", 0.3)])
def test_a_divergence_by_name_is_the_one_that_beta_chooses(name: str, beta: float) -> None:
    named, chosen = Divergence(0.3, divergence=name), Divergence(beta)
    assert named.kind is chosen.kind and named.describe() == chosen.describe() and named.formula == chosen.formula
    a, b = (measured(Objective(d), problem(5)) for d in (named, chosen))
    assert torch.equal(a.values["loss"], b.values["loss"])
    assert torch.equal(a.gradients["states"], b.gradients["states"])
