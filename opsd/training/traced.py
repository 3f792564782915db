"""Makes traced rollouts, in plain values, of a loss record and the rollouts that it was computed from.

Costs one copy of a few numbers per token to the host. Knows loss records, rollouts and a tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from opsd.health.rollout import Alternatives, TracedRollout
from opsd.losses import LossOutput
from opsd.losses.likeliest import WIDTH, taken_apart, teacher_entropy
from opsd.rollouts import Rollouts
from opsd.teachers import Teacher

COLUMNS = ("logprob", "teacher_logprob")  # of a record's metrics, beside divergence and entropy
LONGEST_PROMPT = 8000  # characters of a prompt that are kept


class TracedRollouts:
    """Makes traced rollouts; decodes each token once.

    >>> makes = TracedRollouts(tokenizer, end_ids, teacher)
    >>> list(makes(record, rollouts, rows=[0, 3], step=12))

    Args:
        tokenizer: of the student.
        end_ids: ids that end a rollout.
        teacher: whose prompts are shown.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: Collection[int], teacher: Teacher):
        self._tokenizer, self._end_ids, self._teacher = tokenizer, frozenset(end_ids), teacher
        self._texts: dict[int, str] = {}  # of ids

    def __call__(
        self, record: LossOutput, rollouts: Rollouts, rows: Sequence[int], step: int
    ) -> Iterator[TracedRollout]:
        """Yield the rollouts of some rows.

        Args:
            record: the loss of a micro-batch.
            rollouts: the micro-batch.
            rows: which of its rows.
            step: the step that trained on it.
        """
        count = len(record.divergence_N)
        unknown = torch.full_like(record.divergence_N, math.nan)
        no_alternatives = record.divergence_N.new_zeros((count, WIDTH))
        others = no_alternatives if record.alternatives_NA is None else record.alternatives_NA
        columns = [record.divergence_N, record.entropy_N, *(record.metrics.get(name, unknown) for name in COLUMNS)]
        values = torch.stack([*columns, teacher_entropy(others)]).float().cpu()
        others = others.cpu()
        ends = torch.tensor([sum(mask) for mask in rollouts.loss_mask or ()]).cumsum(0).tolist()
        for row in rows:
            mask = (rollouts.loss_mask or ())[row]
            ids = rollouts.completion_ids[row]
            scored = slice(ends[row] - sum(mask), ends[row])
            columns_T = torch.full((len(values), len(ids)), math.nan)
            columns_T[:, torch.tensor(mask, dtype=torch.bool)] = values[:, scored]
            if not rollouts.distill_weight[row] or not rollouts.row_weights[row]:
                columns_T[[0, 3]] = math.nan  # no teacher saw it
            divergence, entropy, logprob, teacher_logprob, of_teacher = columns_T.tolist()
            found = iter(others[scored].tolist())
            alternatives = [self._alternatives(next(found)) if is_scored else None for is_scored in mask]
            yield TracedRollout(
                step, self._prompt(rollouts.prompt_ids[row]), self._prompt(self._seen(rollouts, row)), ids,
                [self._text_of(token) for token in ids], self._decode(ids), divergence, entropy, logprob,
                teacher_logprob, reward=rollouts.rewards[row], ended=bool(ids) and ids[-1] in self._end_ids,
                on_policy=rollouts.on_policy[row], teacher_entropy=of_teacher,
                alternatives=alternatives if any(alternatives) else (),
            )  # fmt: skip

    def _seen(self, rollouts: Rollouts, row: int) -> Sequence[int]:
        """Return what the teacher was shown; of a mixture, its first part."""
        leaves = self._teacher.prompts.leaves_of(rollouts.rows[row])
        seen = [rollouts.teacher_prompt_ids[leaf][row] for leaf in leaves if leaf in rollouts.teacher_prompt_ids]
        return seen[0] if seen else []

    def _alternatives(self, columns: list[float]) -> Alternatives | None:
        found = taken_apart(columns)
        if found is None:
            return None
        student, teacher = ([self._text_of(token) for token in ids] for ids in (found.student_ids, found.teacher_ids))
        # A hundredth of a nat is a hundredth of a probability, and takes half the room of a float.
        sides = (found.student_logprobs, found.teacher_logprobs)
        of_student, of_teacher = ([round(value, 2) for value in side] for side in sides)
        return Alternatives(student, of_student, teacher, of_teacher, found.student_rank, found.teacher_rank)

    def _text_of(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._tokenizer.decode([token])
        return self._texts[token]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids)) if ids else ""

    def _prompt(self, ids: Sequence[int]) -> str:
        return self._decode(ids)[-LONGEST_PROMPT:]
