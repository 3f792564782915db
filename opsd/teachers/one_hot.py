"""Teachers without a model, for controls: their distribution for a token depends on that token alone.

All mass on the scored token turns the forward KL into the negative log-likelihood, so that supervised fine-tuning runs
through the same trainer, loss and log as distillation.

Shapes: N scored tokens of a micro-batch (packed) · one listed id each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from opsd.rollouts import Ids, Rollouts
from opsd.signals import TopKSignal
from opsd.teachers.base import Teacher
from opsd.teachers.composite import CompositeTeacher
from opsd.teachers.prompting import CompositePrompts, Row, TeacherPrompts


class _SamplingPrompts(CompositePrompts):
    """The prompts of a demonstrator, which are read when it samples and never when its samples are scored."""

    def render(self, rollouts: Rollouts) -> Rollouts:
        """Return the rollouts as they are."""
        return rollouts


class DemonstrationTeacher(CompositeTeacher):
    """All mass on the scored token: KL(teacher ‖ student) is then -log s(token).

    Needs the forward KL over listed tokens: beta=0, support="teacher_top_k", tail="none".

    Args:
        demonstrator: another teacher, whose samples are the completions (sequence-level distillation: Kim and Rush,
            arXiv 1606.07947), with seq_kd. It scores nothing.

    Example:
        >>> OPSDTrainer(model, "ema", args=OPSDConfig("runs/sft", control="sft"), train_dataset=rows)
    """

    strategy = "demonstration"
    starts_as_student = False
    collective = False
    lists, can_fail, needs_given_rollouts, noise = None, False, False, 0.0  # its demonstrator scores nothing

    def __init__(self, demonstrator: Teacher | None = None):
        parts = {} if demonstrator is None else {"demonstrator": demonstrator}
        prompts = {name: part.prompts for name, part in parts.items()}
        super().__init__(parts, prompts=_SamplingPrompts(self, prompts) if parts else TeacherPrompts(self))

    def score(self, rollouts: Rollouts) -> TopKSignal:
        """Return a probability of 1 for each scored token."""
        device = self.student.device
        ids_N1 = torch.tensor(rollouts.scored_ids, dtype=torch.int64, device=device)[:, None]
        certain_N1 = torch.zeros(ids_N1.shape, device=device)
        return TopKSignal(ids_N1, certain_N1, certain_N1[:, 0])

    def describe(self) -> str:
        """Return whose completions are imitated."""
        source = "".join(f", sampled by {part.describe()}" for part in self.parts.values())
        return f"the completion itself, with certainty{source}"

    @property
    def can_sample(self) -> bool:
        """Whether there is a demonstrator that can."""
        return bool(self.parts) and all(part.can_sample for part in self.parts.values())

    def sample(self, rows: Sequence[Row], *, max_new_tokens: int, **sampling: Any) -> list[Ids]:
        """Return the demonstrator's completions."""
        sampler = self.view("demonstrator").sample if self.parts else super().sample
        return sampler(rows, max_new_tokens=max_new_tokens, **sampling)


class ConstantAdvantageTeacher(DemonstrationTeacher):
    """The same advantage for every token: a policy gradient that no teacher informs.

    "Does on-policy distillation really distill?" (arXiv 2608.31046) found one fixed negative advantage to do as well
    as a teacher's. The advantage is added to the rows' own; the divergence, renormalised over one listed token, is 0.

    Args:
        advantage: of every token; -1 pushes down whatever was sampled.

    Example:
        >>> OPSDTrainer(model, "ema", args=OPSDConfig("runs/control", control="constant-advantage"), train_dataset=rows)
    """

    strategy = "constant_advantage"

    def __init__(self, advantage: float):
        super().__init__()
        self.advantage = advantage

    def adjust_rollouts(self, rollouts: Rollouts) -> Rollouts:
        """Add the advantage to every row that would be distilled."""
        pairs = zip(rollouts.advantages, rollouts.distill_weight, strict=True)
        return replace(rollouts, advantages=[reward + self.advantage * weight for reward, weight in pairs])

    def describe(self) -> str:
        """Return the advantage in words."""
        return f"an advantage of {self.advantage:g} for every token, whatever it is"

    @property
    def settings(self) -> dict[str, Any]:
        """The advantage."""
        return {"advantage": self.advantage}
