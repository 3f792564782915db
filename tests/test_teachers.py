"""Every teacher × every kind of student, through the invariants. A new teacher joins by one line in TEACHERS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_gpt2, make_llama, make_tokenizer
from fault_server import FaultServer
from helpers import MAKE_TEACHER, STUDENTS, make_rollouts, make_student, move, prepared, snapshot

from opsd.errors import ConfigError, OPSDWarning, TokenizerMismatchError
from opsd.losses import Divergence, Objective, Tokens
from opsd.models.forward import last_hidden
from opsd.models.head import Head
from opsd.signals import DenseSignal, HiddenSignal, TeacherSignal
from opsd.teachers import TEACHERS as TABLE
from opsd.teachers import (
    EMATeacher,
    LiveTeacher,
    MixtureTeacher,
    PastCheckpointTeacher,
    RoutedTeacher,
    SameCheckpointTeacher,
    ServedTeacher,
    SiblingTeacher,
    SnapshotTeacher,
    Teacher,
)
from opsd.teachers.weight_copy import megabytes

Make = Callable[..., Teacher]


def _copy_of(cls: type[SiblingTeacher]) -> Make:
    """A teacher with weights of its own that equal the student's."""
    return lambda model, **kw: cls(model, tokenizer=make_tokenizer(), **kw)


# strategy -> (how to make it, given a copy of the student; whether it is still the old student after the student moved)
TEACHERS: dict[str, tuple[Make, bool]] = {
    "same_checkpoint": (lambda model, **kw: SameCheckpointTeacher(**kw), True),
    "live": (lambda model, **kw: LiveTeacher(**kw), False),
    "ema": (lambda model, **kw: EMATeacher(0.9, **kw), True),
    "snapshot": (lambda model, **kw: SnapshotTeacher(2, **kw), True),
    "past_checkpoint": (_copy_of(PastCheckpointTeacher), True),
    "sibling": (_copy_of(SiblingTeacher), True),
    "mixture": (lambda model, **kw: MixtureTeacher([SameCheckpointTeacher(), EMATeacher(0.9)], [0.3, 0.7], **kw), True),
    "routed": (
        lambda model, **kw: RoutedTeacher(
            "domain", {"even": SameCheckpointTeacher(), "odd": _copy_of(SiblingTeacher)(model)}, **kw
        ),
        True,
    ),
    "served": (
        lambda model, **kw: ServedTeacher(FaultServer(model, make_tokenizer()).start().url, top_k=100, **kw),
        True,
    ),
}
VARIANTS: dict[str, tuple[Make, bool]] = {
    "past_checkpoint of this run": (lambda model, **kw: PastCheckpointTeacher("checkpoint-3", **kw), True),
    "ema, offloaded": (lambda model, **kw: EMATeacher(0.9, offload=True, **kw), True),
    "sibling, offloaded": (
        lambda model, **kw: SiblingTeacher(model, tokenizer=make_tokenizer(), offload=True, **kw),
        True,
    ),
    "geometric mixture": (
        lambda model, **kw: MixtureTeacher(
            [SameCheckpointTeacher(), EMATeacher(0.9)], [2.0, -1.0], kind="geometric", **kw
        ),
        True,
    ),
    "mixture of contexts": (
        lambda model, **kw: MixtureTeacher(
            SnapshotTeacher(5), [0.5, 0.5], contexts=[None, None] if not kw else ["answer_only", "worked_solution"]
        ),
        True,
    ),
    "route to a mixture": (
        lambda model, **kw: RoutedTeacher(
            "domain",
            {"even": MixtureTeacher([SameCheckpointTeacher(), EMATeacher(0.9)], [0.5, 0.5]), "odd": EMATeacher(0.5)},
            **kw,
        ),
        True,
    ),
}
STRATEGIES = TEACHERS
TEACHERS = {**STRATEGIES, **VARIANTS}
CASES = [(t, s) for t in TEACHERS for s in STUDENTS]


def make_pair(strategy: str, kind: str, **kwargs: object) -> tuple[torch.nn.Module, Teacher]:
    student = make_student(kind).eval()
    teacher = TEACHERS[strategy][0](make_student(kind), **kwargs)
    return student, prepared(teacher, student)


def student_loss(student: torch.nn.Module, teacher: Teacher, beta: float = 1.0):
    rollouts = teacher.prompts.render(make_rollouts())
    signal = teacher.score(rollouts)
    batch = rollouts.pad("cpu")
    hidden_ND = last_hidden(student, batch.ids_BL, batch.row_N, batch.position_N)
    listed = {} if teacher.lists is None else {"support": "teacher_top_k", "support_k": teacher.lists}
    return Objective(Divergence(beta, **listed))(
        hidden_ND, Head.from_model(student), signal, Tokens(torch.ones(len(hidden_ND)))
    )


def test_every_strategy_of_the_table_is_tested() -> None:
    """Here, and in whole runs: training, resume, poison, two processes, shards."""
    given = TABLE.keys() - {"cached"}  # scores no new rollouts: tests/test_cached.py
    assert given == STRATEGIES.keys() == {make().strategy for make in MAKE_TEACHER.values()}


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("strategy", "kind"), CASES)
def test_the_same_weights_without_context_give_no_loss_and_no_gradient(strategy: str, kind: str, beta: float) -> None:
    """Invariant 1, also for a student that arrives with a trained adapter."""
    student, teacher = make_pair(strategy, kind)
    record = student_loss(student, teacher, beta)
    record.loss.backward()
    assert record.divergence_N.abs().max() <= 1e-6
    for name, p in student.named_parameters():
        assert p.grad is None or p.grad.abs().max() <= 1e-5, name


@pytest.mark.parametrize(("strategy", "kind"), CASES)
def test_a_context_changes_what_the_teacher_says(strategy: str, kind: str) -> None:
    """Without this, identity would also hold for a teacher that ignores its context."""
    student, teacher = make_pair(strategy, kind, context="answer_only")
    assert student_loss(student, teacher).divergence_N.mean() > 1e-3


@pytest.mark.parametrize(("strategy", "kind"), CASES)
def test_a_teacher_keeps_what_it_was_when_the_student_moves(strategy: str, kind: str) -> None:
    student, teacher = make_pair(strategy, kind)
    rollouts = teacher.prompts.render(make_rollouts())
    before = teacher.score(rollouts).logprobs(rollouts.pad("cpu").scored_ids_N)
    move(student)
    after = teacher.score(rollouts).logprobs(rollouts.pad("cpu").scored_ids_N)
    assert torch.equal(before, after) == TEACHERS[strategy][1]


@pytest.mark.parametrize(("strategy", "kind"), CASES)
def test_scoring_leaves_the_student_as_it_was(strategy: str, kind: str) -> None:
    """Invariant 4: weights, trainable set, gradients and modes, dropout and all."""
    student, teacher = make_pair(strategy, kind, context="answer_only")
    student.train()
    list(student.modules())[-1].eval()  # a module that a user keeps in eval mode
    frozen = next(p for p in student.parameters() if p.requires_grad)
    frozen.requires_grad_(False)  # and a parameter that a user froze
    weights, modes = snapshot(student), [m.training for m in student.modules()]
    trainable = [p.requires_grad for p in student.parameters()]
    teacher.score(teacher.prompts.render(make_rollouts()))
    assert [m.training for m in student.modules()] == modes
    assert [p.requires_grad for p in student.parameters()] == trainable
    assert all(p.grad is None for p in student.parameters())
    for name, p in student.named_parameters():
        assert torch.equal(p, weights[name]), name


@pytest.mark.parametrize(("strategy", "kind"), CASES)
def test_gradient_reaches_the_student_only(strategy: str, kind: str) -> None:
    student, teacher = make_pair(strategy, kind, context="answer_only")
    signal = teacher.score(teacher.prompts.render(make_rollouts()))
    for part in _hidden_signals(signal):
        assert not part.hidden_ND.requires_grad and not part.head.weight_VD.requires_grad
    student_loss(student, teacher).loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in student.parameters())
    assert all(tensor.grad is None for tensor in teacher.tensors)


def _hidden_signals(signal: TeacherSignal) -> list[HiddenSignal]:
    return [part for _, each in signal.groups() if isinstance(each, DenseSignal) for part in each.parts]


@pytest.mark.parametrize("make_model", [make_llama, make_gpt2])
@pytest.mark.parametrize("strategy", TEACHERS)
def test_a_rows_scores_do_not_depend_on_its_company(strategy: str, make_model: Callable) -> None:
    """Invariant 3, also on a model with learned positions."""
    teacher = prepared(TEACHERS[strategy][0](make_model(), context="answer_only"), make_model().eval())
    rollouts = teacher.prompts.render(make_rollouts())

    def scores(part):  # type: ignore[no-untyped-def]
        return teacher.score(part).logprobs(part.pad("cpu").scored_ids_N)

    together = scores(rollouts)
    alone = torch.cat([scores(rollouts.select([i])) for i in range(len(rollouts))])
    assert (together - alone).abs().max() <= 1e-5


@pytest.mark.parametrize("strategy", [s for s in TEACHERS if "mixture" not in s])
def test_logprobs_without_a_trainer_equal_a_plain_forward_pass(strategy: str) -> None:
    """Written from the definition: the model's own logits over prompt ++ completion, one row at a time."""
    student, teacher = make_pair(strategy, "full", context="worked_solution")
    rollouts = make_rollouts()
    got = teacher.logprobs(rollouts.rows, rollouts.completion_ids)
    for row, completion, values in zip(rollouts.rows, rollouts.completion_ids, got, strict=True):
        prompt = teacher.prompts.ids(row)
        with torch.no_grad():
            logits = student(torch.tensor([prompt + completion])).logits[0].double()
        expected = [
            torch.log_softmax(logits[len(prompt) + j - 1], -1)[token].item() for j, token in enumerate(completion)
        ]
        assert values == pytest.approx(expected, abs=1e-5)


# ---- memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [SameCheckpointTeacher, LiveTeacher, lambda: EMATeacher(0.9)])
def test_a_lora_run_holds_one_copy_of_the_base(make: Callable[[], Teacher]) -> None:
    """Counted by storages: everything reachable from the teacher beside the student is at most one adapter."""
    student = make_student("lora")
    adapter = megabytes([p for p in student.parameters() if p.requires_grad])
    base = megabytes([p for p in student.parameters() if not p.requires_grad])
    teacher = prepared(make(), student)
    tensors = [t for t in _reachable(teacher) if isinstance(t, torch.Tensor)]
    assert megabytes([*student.parameters(), *tensors]) <= base + 2 * adapter + 1e-3
    assert teacher.cost.megabytes <= adapter + 1e-3


def _reachable(teacher: Teacher) -> list[object]:
    weights = getattr(teacher, "_weights", None)
    module = teacher.model  # type: ignore[attr-defined]
    return [*(weights.values.values() if weights else []), *module.parameters(), *module.buffers()]


def test_a_fresh_adapter_is_switched_off_and_a_trained_one_is_copied() -> None:
    assert prepared(SameCheckpointTeacher(), make_student("lora")).cost.megabytes == 0
    assert prepared(SameCheckpointTeacher(), make_student("arriving adapter")).cost.megabytes > 0


# ---- EMA --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_average_follows_its_closed_form(kind: str, dtype: torch.dtype) -> None:
    """decayⁿ·θ₀ + (1-decay)·Σ decayⁿ⁻ⁱ·θᵢ in float64; a wrong sign or an average in bfloat16 fails."""
    student, decay, steps = make_student(kind).to(dtype), 0.999, 20
    teacher = prepared(EMATeacher(decay), student)
    history = [snapshot(student)]
    for step in range(1, steps + 1):
        move(student, by=0.02)
        teacher.after_step(step)
        history.append(snapshot(student))
    for name, value in teacher.weight_copy.values.items():
        thetas = [h[name].double() for h in history]
        expected = decay**steps * thetas[0]
        for i in range(1, steps + 1):
            expected = expected + (1 - decay) * decay ** (steps - i) * thetas[i]
        assert value.dtype == torch.float32
        assert (value.double() - expected).abs().max() <= 1e-6
        assert not torch.equal(value.double(), thetas[0])


def test_the_average_scores_with_its_own_weights() -> None:
    """decay 0 is the student itself after a step; decay near 1 the student it started as."""
    student = make_student("full").eval()
    follower, keeper = (prepared(EMATeacher(decay), student) for decay in (0.0, 0.999999))
    rollouts = keeper.prompts.render(follower.prompts.render(make_rollouts()))
    ids = rollouts.pad("cpu").scored_ids_N
    before = keeper.score(rollouts).logprobs(ids)
    move(student)
    for teacher in (follower, keeper):
        teacher.after_step(1)
    live = prepared(LiveTeacher(), student)
    live = live.score(live.prompts.render(rollouts))
    assert torch.allclose(follower.score(rollouts).logprobs(ids), live.logprobs(ids), atol=1e-6)
    assert torch.allclose(keeper.score(rollouts).logprobs(ids), before, atol=1e-4)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, float("nan"), "1e-1"])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ConfigError, match="at least 0 and below 1"):
        EMATeacher(decay)


# ---- tokenizers and heads ---------------------------------------------------------------------------------------


def test_heads_padded_to_other_sizes_are_compared_over_the_ids_both_have() -> None:
    """Qwen pads one tokenizer to 151,936 and 152,064 rows. The slow twin cuts both softmaxes by hand."""
    student, other = make_llama(0, 400).eval(), make_llama(1, 416)
    teacher = prepared(SiblingTeacher(other, tokenizer=make_tokenizer()), student)
    record = student_loss(student, teacher)
    rollouts = teacher.prompts.render(make_rollouts())
    batch = rollouts.pad("cpu")
    for model in (student, other):
        assert model.config.vocab_size in (400, 416)
    with torch.no_grad():
        s, t = (
            torch.log_softmax(m(batch.ids_BL).logits[batch.row_N, batch.position_N][:, :400].double(), -1)
            for m in (student, other.eval())
        )
    expected = (s.exp() * (s - t)).sum(-1)
    assert torch.allclose(record.divergence_N.double(), expected, atol=1e-5)


def test_a_foreign_tokenizer_is_refused_with_the_first_difference() -> None:
    other = make_tokenizer(390)
    with pytest.raises(TokenizerMismatchError, match=r"has id \d+ for the student and"):
        prepared(SiblingTeacher(make_llama(1), tokenizer=other), make_llama())


def test_another_end_of_turn_is_refused() -> None:
    other = make_tokenizer()
    other.eos_token = "<|im_start|>"
    with pytest.raises(TokenizerMismatchError, match="eos_token"):
        prepared(SiblingTeacher(make_llama(1), tokenizer=other), make_llama())


def test_another_chat_template_warns_and_is_used() -> None:
    other = make_tokenizer()
    other.chat_template = other.chat_template.replace("assistant\n", "assistant:\n")
    with pytest.warns(OPSDWarning, match="chat templates"):
        teacher = prepared(SiblingTeacher(make_llama(1), tokenizer=other), make_llama())
    rollouts = make_rollouts()
    shown = teacher.prompts.render(rollouts).teacher_prompt_ids[teacher.prompts]
    assert shown != list(rollouts.prompt_ids)
    assert other.decode(shown[0]).endswith("assistant:\n")


def test_a_folder_is_loaded_from_safetensors_only(tmp_path: Path) -> None:
    """A pickle can run code when it is opened."""
    make_llama().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(make_llama().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        prepared(SiblingTeacher(str(tmp_path)), make_llama())


def test_a_past_checkpoint_loads_a_folder_with_an_adapter(tmp_path: Path, llama_folder: str) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama_folder), LoraConfig(r=4, task_type="CAUSAL_LM"))
    move(model)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    teacher = prepared(PastCheckpointTeacher(str(tmp_path)), make_llama().eval())
    same = prepared(SiblingTeacher(model.eval(), tokenizer=make_tokenizer()), make_llama().eval())
    rollouts = same.prompts.render(teacher.prompts.render(make_rollouts()))
    ids = rollouts.pad("cpu").scored_ids_N
    assert torch.allclose(teacher.score(rollouts).logprobs(ids), same.score(rollouts).logprobs(ids), atol=1e-6)


def test_a_signal_is_what_a_loss_needs_and_nothing_more() -> None:
    _, teacher = make_pair("same_checkpoint", "full")
    signal = teacher.score(teacher.prompts.render(make_rollouts()))
    assert isinstance(signal, HiddenSignal)
    assert len(signal.hidden_ND) == make_rollouts().num_scorable
