"""Teachers that list their likeliest tokens: scores are found by the ids of prompt and completion.

Where they come from, a server or a file, is the strategy's. Knows rollouts and scores.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch

from opsd.models.forward import embedded_tokens
from opsd.rollouts import Ids, Rollouts
from opsd.serving.answers import Asked, TokenScores
from opsd.signals import TopKSignal
from opsd.teachers.base import Teacher


class ListingTeacher(Teacher):
    """The base of teachers whose signal is a list.

    Example:
        >>> class Table(ListingTeacher):
        ...     top_k = 20
        ...
        ...     def scores_of(self, asked):
        ...         return self.table[asked.ids]
    """

    top_k: int

    @abstractmethod
    def scores_of(self, asked: Asked) -> TokenScores:
        """Return the scores of a sequence, with `top_k` likeliest tokens.

        Raises:
            OPSDError: there are none.
        """

    @property
    def lists(self) -> int:
        """How many likeliest tokens it lists."""
        return self.top_k

    def score(self, rollouts: Rollouts) -> TopKSignal:
        """Return the likeliest tokens of every scored token; raises as `scores_of`."""
        asked = self.asked(rollouts)
        parts = [self._of_row(rollouts, row, asked.get(row)) for row in range(len(rollouts))]
        ids, logprobs, sampled = (np.concatenate(each) for each in zip(*parts, strict=True))
        # A head may be padded to more ids than the student embeds: these have no probability.
        unknown = ids >= embedded_tokens(self.student.model)
        ids, logprobs = np.where(unknown, 0, ids), np.where(unknown, -np.inf, logprobs)
        return TopKSignal(*(torch.from_numpy(each).to(self.student.device) for each in (ids, logprobs, sampled)))

    def asked(self, rollouts: Rollouts) -> dict[int, Asked]:
        """Return what is asked for each row that is distilled."""
        return {
            row: asked for row, asked in enumerate(sequences_of(rollouts, rollouts.prompts_of(self.prompts))) if asked
        }

    def _of_row(self, rollouts: Rollouts, row: int, asked: Asked | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return ids, log-probabilities and the tokens' own, of the scored tokens of a row."""
        mask = np.array((rollouts.loss_mask or ())[row], dtype=bool)
        if asked is None:  # not distilled: what stands there has no weight
            count = int(mask.sum())
            ids = np.tile(np.arange(self.top_k, dtype=np.int64), (count, 1))
            even = np.full((count, self.top_k), -np.log(self.top_k), dtype=np.float32)
            return ids, even, even[:, 0]
        scores = self.scores_of(asked)
        is_scored = mask[: len(scores.sampled_T)]
        return scores.ids_TK[is_scored], scores.logprobs_TK[is_scored], scores.sampled_T[is_scored]


def sequences_of(rollouts: Rollouts, prompts: Sequence[Ids]) -> list[Asked | None]:
    """Return what is asked for each row behind such prompts; None for a row that is not distilled."""
    rows = zip(prompts, rollouts.trimmed_completions, rollouts.is_distilled, strict=True)
    return [Asked((*prompt, *ids), len(prompt)) if is_distilled else None for prompt, ids, is_distilled in rows]
