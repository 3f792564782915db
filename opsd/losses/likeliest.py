"""What both sides would have sampled at a token: their likeliest tokens, and the rank of the one that was sampled.

And the entropy of the teacher; that of the student is computed with the loss.

For traces and for looking, never for a loss. Shapes: R tokens · V vocabulary · K = COUNT of the likeliest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from opsd.losses.pointwise import FLOOR
from opsd.signals import TopKSignal

COUNT = 5
WIDTH = 4 * COUNT + 3  # columns: ids and log-probabilities of both sides, the teacher's entropy, and both ranks
ALTERNATIVES = "alternatives"  # the name of these columns in the kernel


class Likeliest(NamedTuple):
    """The columns of one token, taken apart.

    Args:
        student_ids: the student's likeliest tokens; none at a token that was not traced.
        student_logprobs: nats.
        teacher_ids, teacher_logprobs: the teacher's; fewer where its list is shorter.
        student_rank: of the sampled token, from 1.
        teacher_rank: likewise; 0 where a top-k list does not have it.
    """

    student_ids: list[int]
    student_logprobs: list[float]
    teacher_ids: list[int]
    teacher_logprobs: list[float]
    student_rank: int
    teacher_rank: int


def likeliest(log_s_RV: Tensor, teacher: Tensor | TopKSignal, token_ids_R: Tensor) -> Tensor:
    """Return the likeliest tokens of both sides, float32 of shape (R, WIDTH); ids are exact below 2²⁴.

    Args:
        log_s_RV: the student's log-probabilities.
        teacher: the teacher's over the vocabulary, or its top-k list.
        token_ids_R: the sampled tokens.
    """
    student = log_s_RV.topk(COUNT, dim=-1)
    student_rank_R = _rank(log_s_RV, log_s_RV.gather(-1, token_ids_R[:, None]))
    if isinstance(teacher, TopKSignal):
        count = min(COUNT, teacher.ids_NK.shape[-1])
        top = teacher.logprobs_NK.topk(count, dim=-1)
        padding = COUNT - count
        values = torch.nn.functional.pad(top.values, (0, padding), value=-torch.inf)
        ids = torch.nn.functional.pad(teacher.ids_NK.gather(-1, top.indices), (0, padding))
        is_listed_R = ((teacher.ids_NK == token_ids_R[:, None]) & teacher.logprobs_NK.isfinite()).any(-1)
        teacher_rank_R = _rank(teacher.logprobs_NK, teacher.sampled_logprobs_N[:, None]) * is_listed_R
        entropy_R = torch.full_like(student_rank_R, torch.nan, dtype=torch.float32)
    else:
        values, ids = teacher.topk(COUNT, dim=-1)
        teacher_rank_R = _rank(teacher, teacher.gather(-1, token_ids_R[:, None]))
        entropy_R = -torch.linalg.vecdot(teacher.exp(), teacher.clamp(min=FLOOR))
    numbers_R3 = torch.stack([entropy_R, student_rank_R, teacher_rank_R], dim=-1)
    columns = [student.indices, student.values, ids, values, numbers_R3]
    return torch.cat([column.float() for column in columns], dim=-1)


def _rank(logprobs_RV: Tensor, sampled_R1: Tensor) -> Tensor:
    return (logprobs_RV > sampled_R1).sum(-1) + 1


def teacher_entropy(alternatives_NA: Tensor) -> Tensor:
    """Return the teacher's entropy at each token, nats, float32 (N,).

    NaN at a token that was not traced, and where the teacher lists its likeliest tokens only.
    """
    return alternatives_NA[:, -3].where(alternatives_NA[:, -2] > 0, torch.nan)


def taken_apart(row: list[float]) -> Likeliest | None:
    """Return the columns of a token; None of one that was not traced."""
    ids, logprobs, teacher_ids, teacher_logprobs = (row[start : start + COUNT] for start in range(0, 4 * COUNT, COUNT))
    student_rank, teacher_rank = int(row[-2]), int(row[-1])
    if not student_rank:
        return None
    known = [number for number, value in enumerate(teacher_logprobs) if value > -torch.inf]
    return Likeliest(
        [int(token) for token in ids], logprobs, [int(teacher_ids[n]) for n in known],
        [teacher_logprobs[n] for n in known], student_rank, teacher_rank,
    )  # fmt: skip
