"""Whether a loss can raise what the student never writes: the doctor says so before step 1."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from gallery_parts import Setup, context, taught

from opsd.doctor import examine
from opsd.doctor.reach import RARE, WEAK, pull
from opsd.findings import Finding
from opsd.losses import Divergence

DIVERGENCES = {
    "forward KL": (Divergence(beta=0.0), True),
    "reverse KL": (Divergence(beta=1.0), False),
    "JSD": (Divergence(beta=0.5), False),
    "sampled token": (Divergence(support="sampled"), False),
    "top-k forward KL": (Divergence(beta=0.0, support="teacher_top_k", support_k=20), True),
    "forward KL with a clip of entries": (Divergence(beta=0.0, entry_clip=0.05), False),
    "EOPD below its gate": (Divergence(beta=1.0, entropy_gate=2.0), False),
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_pull_is_the_gradient_on_the_logit_of_a_rare_token(name: str) -> None:
    """A twin by autograd for the KLs, and which losses raise such a token at all for the others."""
    divergence, raises = DIVERGENCES[name]
    assert (pull(divergence) >= WEAK) == raises
    if name in ("forward KL", "reverse KL"):
        logits = torch.tensor([math.log(RARE), math.log1p(-RARE)], dtype=torch.float64, requires_grad=True)
        log_s, log_t = logits.log_softmax(-1), torch.tensor([math.log1p(-RARE), math.log(RARE)], dtype=torch.float64)
        value = (log_t.exp() * (log_t - log_s)).sum() if raises else (log_s.exp() * (log_s - log_t)).sum()
        assert pull(divergence) == pytest.approx(-torch.autograd.grad(value, logits)[0][0].item(), rel=1e-4)


def certain() -> Any:
    """The gallery's model that thinks where it is asked to, and is surer of it."""
    model = taught()
    with torch.no_grad():
        model.model.norm.weight.mul_(3)
    return model


def finding(folder: Path, teacher: Any, **settings: Any) -> Finding:
    setup = Setup(teacher, model=certain, settings={"max_completion_length": 9, **settings})
    (found,) = examine(setup.trainer(folder), only=["reach"]).findings
    return found


@pytest.mark.parametrize(("beta", "status"), [(1.0, "warn"), (0.5, "warn"), (0.0, "pass")])
def test_a_teacher_out_of_reach_is_named_where_the_loss_weighs_by_the_student(
    tmp_path: Path, beta: float, status: str
) -> None:
    """A teacher that thinks, of a student that answers at once."""
    found = finding(tmp_path, context(chat_template_kwargs={"enable_thinking": True}), beta=beta)
    assert found.figures["first_token"] < RARE, "the set-up is one in which the student never begins as the teacher"
    assert found.status == status
    if status == "warn":
        assert "raises no token that the student does not write" in found.saw and "beta to 0" in found.do


def test_a_teacher_within_reach_passes(tmp_path: Path) -> None:
    found = finding(tmp_path, context())
    assert found.status == "pass" and found.figures["first_token"] > 0.5
