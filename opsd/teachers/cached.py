"""A teacher whose scores were computed before: `opsd score ROLLOUTS --teacher … -o scores/`.

Trains without the teacher's weights, on the rollouts that were scored and on no others.
"""

from __future__ import annotations

import json
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from opsd.errors import ConfigError, DataError, TokenizerMismatchError
from opsd.models.digests import digest_of, tokenizer_digest
from opsd.rollouts import Rollouts
from opsd.serving.answers import Asked, TokenScores
from opsd.serving.store import ScoreStore
from opsd.teachers.listing import ListingTeacher, sequences_of
from opsd.teachers.prompting import ContextLike, TeacherPrompts
from opsd.teachers.student import StudentHandle


class CachedTeacher(ListingTeacher):
    """Scores in a folder, of rollouts with the context that they were scored with; trained on with `lmbda` 0.

    Args:
        path: the folder that `opsd score … -o` wrote.
        context: nothing, or the context of the scores.

    Raises:
        CheckpointError: the folder has no scores.

    Example:
        >>> args = OPSDConfig(lmbda=0.0, support="teacher_top_k")
        >>> OPSDTrainer(model, CachedTeacher("scores"), args=args, train_dataset=rollouts)
    """

    strategy = "cached"

    def __init__(self, path: str | PathLike[str], *, context: ContextLike = None):
        super().__init__(context=context)
        self.path = fspath(path)
        self._store = ScoreStore.open(Path(path).expanduser())
        self.top_k = self._store.top_k
        self._compared = set[int]()  # prompts whose context is that of the scores

    def prepare(self, student: StudentHandle) -> None:
        """Compare tokenizers.

        Raises:
            TokenizerMismatchError: the scores are of ids of another one.
            ConfigError: the run names another context.
        """
        super().prepare(student)
        self._compare_context(self.prompts)
        if self._store.manifest["tokenizer"] != tokenizer_digest(student.tokenizer):
            raise TokenizerMismatchError(
                f"the scores in {self.path} are of ids of another tokenizer than the student's. The loss would compare "
                "different tokens. Score again, with this student as --model_name_or_path."
            )

    def scores_of(self, asked: Asked) -> TokenScores:
        """Return the scores of a sequence.

        Raises:
            DataError: they are not in the folder.
        """
        scores = self._store.find(asked)
        if scores is None:
            raise DataError(
                f"{self.path} has no scores of a rollout that is to be trained on: none for these ids of prompt and "
                "completion. Train on the file of rollouts that was scored, with the same system prompt and chat "
                "template, or score this one: opsd score ROLLOUTS --teacher … -o."
            )
        return scores

    def asked(self, rollouts: Rollouts) -> dict[int, Asked]:
        """Return what is looked up: the student's prompt and the completion; what the teacher was shown is not here.

        Raises:
            ConfigError: the run names another context than that of the scores.
        """
        self._compare_context(self.prompts)
        completions = rollouts.completion_ids  # whole, also where the loss leaves out their end
        asked = sequences_of(replace(rollouts, loss_mask=None), rollouts.prompt_ids)
        wanted = rollouts.is_distilled
        return {row: each for row, each in enumerate(asked) if each and wanted[row] and completions[row]}

    def _compare_context(self, prompts: TeacherPrompts) -> None:
        if prompts.context is None or id(prompts) in self._compared:
            return
        scored = self._store.manifest
        if digest_of([json.dumps(prompts.description, sort_keys=True, default=str)]) != scored["template"]:
            raise ConfigError(
                f"the scores in {self.path} were computed with the context {scored['context']!r} as it was then, and "
                f"the run names {prompts.describe()!r}. Leave the context out, or score again with this one."
            )
        self._compared.add(id(prompts))

    @property
    def needs_given_rollouts(self) -> bool:
        """It knows no others."""
        return True

    @property
    def settings(self) -> dict[str, Any]:
        """Whose scores they are; the folder may move."""
        return {"scores": {name: value for name, value in self._store.manifest.items() if name != "shown"}}

    def describe(self) -> str:
        """Return whose scores they are, under which context, and how many."""
        scored = self._store.manifest
        shown = f"{scored['shown']}; its context: {scored['context']}"
        return f"scores of {len(self._store):,} rollouts in {self.path}, by {shown}"
