"""Controls: the same run with one thing changed, so that a gain can be attributed to that thing.

A control keeps model, questions, seeds, steps and learning rate of a run, and changes its teacher, the teacher's
context or the loss. Most published gains of self-distillation shrink beside one of them (OP2SD, arXiv 2608.09228;
AMPLE-Math, arXiv 2609.20612; "Does on-policy distillation really distill?", arXiv 2608.31046). Knows settings, teachers
and contexts; nothing of training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from opsd.data.needs import Need
from opsd.data.prepare import DEMONSTRATIONS
from opsd.errors import ConfigError, not_one_of
from opsd.teachers import Teacher
from opsd.teachers.one_hot import ConstantAdvantageTeacher, DemonstrationTeacher

# The listed token and none of the method's other loss settings; sampling stays as in the run.
_ONE_TOKEN: dict[str, Any] = {
    "divergence": None,
    "beta": 0.0,
    "support": "teacher_top_k",
    "support_k": 1,
    "entry_clip": None,
    "token_clip": None,
    "entropy_gate": None,
    "keep_fraction": 1.0,
    "prefix_weight": 0.0,
    "reward_to_go": "none",
    "contrast_context": None,
}
_LIKELIHOOD = {**_ONE_TOKEN, "tail": "none", "temperature": 1.0, "ref_kl_coef": 0.0, "importance_clip": None}
# No reward for off-policy tokens; a group is as many completions of one prompt, so that the questions stay the same.
_NOT_SAMPLED: dict[str, Any] = {
    "lmbda": 0.0,
    "lmbda_schedule": None,
    "teacher_lead": None,
    "distill_on": "all",
    "grpo_coef": 0.0,
}
CONSTANT_ADVANTAGE = -1.0  # Adam normalises its size away; the sign is the paper's


@dataclass(frozen=True)
class Control:
    """One control.

    >>> control = CONTROLS["wrong-context"]
    >>> control.teacher(SameCheckpointTeacher(context="answer_only")).describe()

    Args:
        asks: the question that it answers.
        teacher: the run's teacher -> the control's.
        settings: of OPSDConfig, in place of the run's.
        imitates: whether it trains on the rows' own completions, so that each row needs one.
    """

    asks: str
    teacher: Callable[[Teacher], Teacher]
    settings: Mapping[str, Any] = field(default_factory=dict)
    imitates: bool = False

    @property
    def needs(self) -> list[Need]:
        """What a training row must have for it."""
        if not self.imitates:
            return []
        way_out = "leave this control out"
        return [Need(DEMONSTRATIONS, "a control that imitates rows", "It trains on them.", way_out, may_be_empty=True)]


def control_of(name: str | None) -> Control | None:
    """Return the control of that name; None of None.

    Raises:
        ConfigError: nothing has that name.
    """
    if name is None:
        return None
    if name not in CONTROLS:
        known = "".join(f"\n  {known:<20} {control.asks}" for known, control in CONTROLS.items())
        raise ConfigError(f"{not_one_of('control', name, CONTROLS)}{known}")
    return CONTROLS[name]


def _without_context(teacher: Teacher) -> Teacher:
    _check_has_context(teacher, "no-context removes the teacher's context")
    return teacher.copy_with(teacher.prompts.with_contexts(lambda context: None))


def _with_wrong_context(teacher: Teacher) -> Teacher:
    _check_has_context(teacher, "wrong-context fills the teacher's context from another row")
    return teacher.copy_with(teacher.prompts.with_contexts(lambda context: context and context.of_other_rows()))


def _check_has_context(teacher: Teacher, rule: str) -> None:
    if not teacher.prompts.contexts:
        raise ConfigError(
            f"{rule}, and this teacher has none: the control would be the run itself. Leave the control out, or give "
            "the run a context."
        )


def _imitating(teacher: Teacher) -> Teacher:
    return DemonstrationTeacher()


def _imitating_samples(teacher: Teacher) -> Teacher:
    return DemonstrationTeacher(teacher)


def _constant(teacher: Teacher) -> Teacher:
    return ConstantAdvantageTeacher(CONSTANT_ADVANTAGE)


def _unchanged(teacher: Teacher) -> Teacher:
    return teacher


CONTROLS: dict[str, Control] = {
    "no-context": Control("does the gain come from the context, or would any teacher do?", _without_context),
    "wrong-context": Control(
        "does the gain come from the information, or from the form of the context?", _with_wrong_context
    ),
    "off-policy": Control(
        "does it need the student's own tokens, or would the teacher's do?",
        _unchanged,
        {**_NOT_SAMPLED, "seq_kd": True},
    ),
    "seq-kd": Control(
        "does it need the teacher's distribution, or would its samples do (cross-entropy)?",
        _imitating_samples,
        {**_LIKELIHOOD, **_NOT_SAMPLED, "seq_kd": True},
    ),
    "sft": Control(
        "would plain fine-tuning on the same answers do?",
        _imitating,
        {**_LIKELIHOOD, **_NOT_SAMPLED, "seq_kd": False},
        imitates=True,
    ),
    "constant-advantage": Control(
        "does the teacher add anything to one fixed negative advantage?",
        _constant,
        # Renormalised, one listed token has probability 1 on both sides: the divergence is 0, the advantage trains.
        {
            **_ONE_TOKEN,
            "tail": "renormalise",
            "lmbda": 1.0,
            "lmbda_schedule": None,
            "teacher_lead": None,
            "seq_kd": False,
        },
    ),
}
