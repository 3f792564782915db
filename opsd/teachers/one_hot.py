"""Teachers that score without a model: what they say of a token depends on the token alone. Controls are made of them.

All mass on the token that stands there turns the forward KL into the negative log-likelihood, so that supervised
fine-tuning runs through the same trainer, loss and log as distillation.

Shapes: N scored tokens of a micro-batch (packed) · one listed id each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from opsd.rollouts import Ids, Rollouts
from opsd.signals import TopKSignal
from opsd.teachers.base import Row, Teacher
from opsd.teachers.composite import CompositeTeacher


class DemonstrationTeacher(CompositeTeacher):
    """All mass on the token that stands there: KL(teacher ‖ student) is then -log s(token).

    Needs the forward KL over listed tokens: beta=0, support="teacher_top_k", tail="none".

    Args:
        demonstrator: another teacher, whose samples are the completions (sequence-level distillation: Kim and Rush,
            arXiv 1606.07947), with seq_kd. It scores nothing.
    """

    strategy = "demonstration"
    starts_as_student = False
    collective = False

    def __init__(self, demonstrator: Teacher | None = None):
        super().__init__({} if demonstrator is None else {"demonstrator": demonstrator})

    def score(self, rollouts: Rollouts) -> TopKSignal:
        """Return a probability of 1 for each scored token."""
        device = next(self._student.model.parameters()).device
        ids_N1 = torch.tensor(rollouts.scored_ids, dtype=torch.int64, device=device)[:, None]
        certain_N1 = torch.zeros(ids_N1.shape, device=device)
        return TopKSignal(ids_N1, certain_N1, certain_N1[:, 0])

    def describe(self) -> str:
        """Who demonstrates."""
        source = "".join(f", sampled by {part.describe()}" for part in self.parts.values())
        return f"the completion itself, with certainty{source}"

    @property
    def views(self) -> list[Teacher]:
        """Whoever demonstrates, and is shown something; itself if nobody does."""
        return super().views or [self]

    @property
    def can_sample(self) -> bool:
        """Whether somebody demonstrates who can."""
        return bool(self.parts) and all(part.can_sample for part in self.parts.values())

    def sample(self, rows: Sequence[Row], *, max_new_tokens: int, **sampling: Any) -> list[Ids]:
        """Return the demonstrator's completions."""
        sampler = self.parts["demonstrator"].sample if self.parts else super().sample
        return sampler(rows, max_new_tokens=max_new_tokens, **sampling)


class ConstantAdvantageTeacher(DemonstrationTeacher):
    """The same advantage for every token, whatever it is: a policy gradient that no teacher informs.

    "Does on-policy distillation really distill?" (arXiv 2608.31046) found one fixed negative advantage to do as well
    as a teacher's. It comes to what a reward is worth; renormalised over its one listed token the divergence is 0.

    Args:
        advantage: in place of what the teacher would say of a token; -1 pushes down whatever was sampled.
    """

    strategy = "constant_advantage"

    def __init__(self, advantage: float):
        super().__init__()
        self.advantage = advantage

    def render_prompts(self, rollouts: Rollouts) -> Rollouts:
        """Give every row that would be distilled the advantage instead."""
        pairs = zip(rollouts.advantages, rollouts.distill_weight, strict=True)
        advantages = [own + self.advantage * share for own, share in pairs]
        return replace(super().render_prompts(rollouts), advantages=advantages)

    def describe(self) -> str:
        """What every token is told."""
        return f"an advantage of {self.advantage:g} for every token, whatever it is"

    @property
    def settings(self) -> dict[str, Any]:
        """The advantage."""
        return {"advantage": self.advantage}
