"""From settings to a step: every objective trains a real model, and is described in the log."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_rows
from datasets import Dataset
from helpers import changed, logged, make_args, make_rollouts, make_trainer, move, snapshot

from opsd import EMATeacher, OPSDConfig, SameCheckpointTeacher
from opsd.errors import ConfigError, DataError, OPSDWarning
from opsd.losses import Divergence, Objective
from opsd.training.vllm_logprobs import EngineLogprobs

# One line per objective of a published system: settings, and a part of the description in the log.
OBJECTIVES: dict[str, tuple[dict[str, Any], str]] = {
    "reverse KL": ({}, "reverse KL"),
    "OPSD": ({"beta": 0.0, "entry_clip": 0.05}, "each entry at most 0.05"),
    "SDPO": ({"beta": 0.5, "support": "student_top_k", "support_k": 7}, "the student's 7 likeliest tokens"),
    "SDFT": ({"beta": 0.0, "support": "teacher_top_k", "support_k": 5, "skip_first_tokens": 1}, "without the first 1"),
    "union": ({"support": "union", "support_k": 3, "tail": "renormalise"}, "renormalised"),
    "EOPD": ({"entropy_gate": 0.8}, "entropy is above 0.8"),
    "TIP": ({"keep_fraction": 0.5}, "50%"),
    "TIP, disagreement": ({"keep_fraction": 0.5, "keep_by": "disagreement"}, "highest disagreement"),
    "IW-OPD": ({"prefix_weight": 0.5}, "tokens weighed up by 0.5"),
    "Thinking Machines": ({"support": "sampled", "baseline": "none"}, "the sampled token"),
    "discounted": ({"support": "sampled", "reward_to_go": "discounted", "discount": 0.5}, "discounted by 0.5"),
    "MiniLLM": ({"reward_to_go": "mean"}, "the mean reward of later tokens"),
    "reference policy": ({"ref_kl_coef": 0.5}, "0.5·KL(student ‖ student at step 0)"),
    "RLCSD": ({"contrast_context": "worked_solution"}, "weighted against the context worked_solution"),
    "token clip": ({"token_clip": 0.5}, "each token at most 0.5"),
    "two passes": ({"recompute_loss": True, "loss_budget_mb": 0.01}, "reverse KL"),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_and_is_named_in_the_log(name: str, tmp_path: Path, capsys: Any) -> None:
    settings, words = OBJECTIVES[name]
    trainer = make_trainer(tmp_path, EMATeacher(0.9, context="answer_only"), **settings)
    before = snapshot(trainer.model)
    assert words in capsys.readouterr().out
    trainer.train()
    assert changed(trainer, before), "nothing moved"
    assert all(map(math.isfinite, logged(trainer, "divergence")))


@pytest.mark.parametrize("student", ["full", "lora", "arriving adapter"])
def test_the_reference_policy_is_the_student_at_step_0_with_the_plain_prompt(tmp_path: Path, student: str) -> None:
    trainer = make_trainer(
        tmp_path, SameCheckpointTeacher(context="answer_only"), student, ref_kl_coef=1.0, max_steps=3
    )
    trainer.train()
    drift = logged(trainer, "ref_kl")
    assert drift[0] == pytest.approx(0.0, abs=1e-6) and drift[-1] > 0.0
    assert logged(trainer, "divergence")[0] > 0.0, "the teacher has a context, the reference policy has none"


def test_the_reference_kl_pulls_the_student_back(tmp_path: Path) -> None:
    """Two students that moved alike: with the term the gradient points more towards step 0."""
    pulls = []
    for coef in (0.0, 1.0):
        teacher = SameCheckpointTeacher(context="answer_only")
        trainer = make_trainer(tmp_path / str(coef), teacher, ref_kl_coef=coef)
        before = snapshot(trainer.model)
        move(trainer.model)
        trainer.model.train()
        trainer.compute_loss(
            trainer.model, trainer._scored(trainer.scorer.prepare_rollouts(make_rollouts(4)))
        ).backward()
        away = {name: p.detach() - before[name] for name, p in trainer.model.named_parameters()}
        pulls.append(sum(float((p.grad * away[name]).sum()) for name, p in trainer.model.named_parameters()))
    assert pulls[1] > pulls[0] + 1e-4


def test_a_token_that_the_contrast_context_changes_as_much_has_no_weight(tmp_path: Path) -> None:
    """With the same template as context and contrast context no token differs between them."""
    trainer = make_trainer(
        tmp_path, SameCheckpointTeacher(context="answer_only"), contrast_context="answer_only", max_steps=1
    )
    before = snapshot(trainer.model)
    trainer.train()
    assert not changed(trainer, before)


def test_the_contrast_context_is_scored_with_the_teachers_current_weights(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, EMATeacher(0.5, context="answer_only"), contrast_context="worked_solution")
    trainer.train()
    loss = trainer.scorer
    assert loss.contrast is not None and loss.contrast.teacher is loss.teacher
    assert loss.contrast.prompts.context.name == "worked_solution" and loss.teacher.context.name == "answer_only"


def test_a_column_that_only_the_contrast_context_needs_is_checked_before_a_model_loads(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"prompt": row["prompt"], "answer": row["answer"]} for row in make_rows()])
    with pytest.raises(DataError, match="solution"):
        make_trainer(tmp_path, SameCheckpointTeacher(context="answer_only"), "no such model", rows,
                     contrast_context="worked_solution")  # fmt: skip


def test_the_settings_are_the_objective(tmp_path: Path) -> None:
    settings = {"beta": 0.0, "support": "teacher_top_k", "support_k": 9, "tail": "none", "entry_clip": 0.1,
                "temperature": 1.5, "keep_fraction": 0.25, "ref_kl_coef": 0.1, "loss_budget_mb": 3.0}  # fmt: skip
    objective = make_args(tmp_path, **settings).objective
    assert objective == Objective(
        Divergence(0.0, 1.5, "teacher_top_k", 9, "none", entry_clip=0.1),
        keep_fraction=0.25,
        ref_kl_coef=0.1,
        loss_budget_mb=3.0,
    )


# ---- importance -----------------------------------------------------------------------------------------------------


class Engine:
    """The interface of TRL's VLLMGeneration: settings, and `generate` with its four results."""

    def __init__(self, completions: list[list[int]], logprobs: list[Any]):
        self.logprobs = None
        self._answers = completions, logprobs

    def generate(self, prompts: list[list[int]], **kwargs: Any) -> tuple[Any, ...]:
        completions, logprobs = self._answers
        return prompts, completions, logprobs if self.logprobs == 0 else None, None


def test_the_engines_logprobs_of_its_samples_are_kept() -> None:
    engine = Engine([[5, 6], [7]], [[[-0.5], [None]], [[-2.0]]])
    listener = EngineLogprobs(engine)
    assert engine.generate(prompts=[[1], [2]])[1] == [[5, 6], [7]]
    (first, unknown), second = listener.take([[5, 6], [7]])
    assert first == -0.5 and math.isnan(unknown) and second == [-2.0]
    assert all(map(math.isnan, listener.take([[5]])[0])), "an answer is used once"


@pytest.mark.parametrize(
    ("shift", "ratio", "truncated"), [(0.0, 1.0, 0.0), (-3.0, 2.0, 1.0), (0.7, math.exp(-0.7), 0.0)]
)
def test_the_loss_is_weighted_by_the_truncated_ratio(
    tmp_path: Path, shift: float, ratio: float, truncated: float
) -> None:
    """The engine's log-probabilities are the student's, moved by `shift` nats."""
    with pytest.warns(OPSDWarning, match="importance_clip has no effect"):
        trainer = make_trainer(tmp_path, SameCheckpointTeacher(context="answer_only"), importance_clip=2.0)
    loss = trainer.scorer
    rollouts = loss.prepare_rollouts(make_rollouts(4))
    cpu = torch.device("cpu")
    plain = loss(trainer.model, loss.score(rollouts), cpu, 1)
    logprobs = iter(plain.metrics["logprob"].tolist())
    sampled = [[next(logprobs) + shift if kept else 0.0 for kept in mask] for mask in rollouts.loss_mask]
    object.__setattr__(rollouts, "rollout_logprobs", sampled)
    corrected = loss(trainer.model, loss.score(rollouts), cpu, 1)
    assert corrected.loss.item() == pytest.approx(ratio * plain.loss.item(), rel=1e-4)
    assert corrected.metrics["importance/ratio"].mean().item() == pytest.approx(ratio, rel=1e-4)
    assert corrected.metrics["importance/truncated"].mean().item() == truncated


# ---- refused, or without effect -------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"support": "sampled", "lmbda": 0.5}, "Set lmbda to 1"),
    ({"reward_to_go": "mean", "lmbda": 0.5}, "Set lmbda to 1"),
    ({"support": "teacher_top_k", "tail": "none"}, "mass outside the support"),
    ({"support": "teachers_top_k"}, "Did you mean 'teacher_top_k'"),
    ({"skip_first_tokens": -1}, "at least 0"),
    ({"first_tokens_only": 0}, "at least 1"),
    ({"ref_kl_coef": -0.1}, "must not be negative"),
    ({"keep_fraction": 0.0}, "above 0 and up to 1"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_what_cannot_work_is_refused_before_a_model_loads(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_args("unused", **settings)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("support_k", {"support_k": 5}),
        ("tail", {"tail": "renormalise"}),
        ("force_tail", {"force_tail": True}),
        ("baseline", {"baseline": "none"}),
        ("keep_by", {"keep_by": "disagreement"}),
        ("importance_clip", {"importance_clip": 2.0}),
    ],
)
def test_a_setting_without_effect_warns(name: str, settings: dict[str, Any]) -> None:
    with pytest.warns(OPSDWarning, match=f"{name} has no effect"):
        make_args("unused", **settings)


def test_importance_correction_across_tool_calls_is_refused(tmp_path: Path) -> None:
    from opsd import OPSDTrainer

    args = OPSDConfig(str(tmp_path), importance_clip=2.0, use_vllm=True, use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(ConfigError, match="calls tools"):
        OPSDTrainer("no such model", args=args, train_dataset=Dataset.from_list(make_rows()), tools=[len])


def test_scored_crosses_wrappers_as_one_opaque_object() -> None:
    """FSDP2 with bf16 casts float tensors in containers that it knows how to walk."""
    from torch.utils import _pytree

    from opsd.training.loss import Scored

    leaves = _pytree.tree_leaves({"scored": Scored(make_rollouts(2), SimpleNamespace())})  # type: ignore[arg-type]
    assert len(leaves) == 1
