"""Scores rollouts without a trainer: any teachers and contexts over any rows, token by token.

Rows without a completion get one that the student samples. Everything that training computes is computed by the same
code: prompts, selection of tokens, signal, loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opsd.contexts.base import Context
from opsd.contexts.completions import completion_ids
from opsd.contexts.renderer import PromptRenderer
from opsd.data.rows import completion_of
from opsd.errors import DataError
from opsd.health.rollout import TracedRollout
from opsd.models.forward import check_model
from opsd.models.generation import generate
from opsd.models.loading import load_model, without_dropout
from opsd.rollouts import Ids, Rollouts
from opsd.serving.answers import Asked, TokenScores
from opsd.signals import as_list
from opsd.teachers import StudentHandle, Teacher, TeacherView
from opsd.training.config import OPSDConfig
from opsd.training.loss import Scorer
from opsd.training.sampling import prepare_sampling, rollout_settings
from opsd.training.traced import TracedRollouts

ROWS = 8  # of a forward pass


@dataclass(frozen=True)
class Score:
    """A rollout as one teacher with one context sees it.

    >>> score.row, score.teacher, max(score.rollout.divergence)
    (0, 'same_checkpoint · answer_only', 3.1)

    Args:
        row: number of the row.
        teacher: the teacher and its context, in words.
        rollout: with what both sides said of each token.
    """

    row: int
    teacher: str
    rollout: TracedRollout


class RolloutScorer:
    """A student that samples where rows have no completion, and teachers that score it.

    >>> scorer = RolloutScorer("HuggingFaceTB/SmolLM2-135M-Instruct", args)
    >>> scorer.scores({0: row}, {"itself": load_teacher(None)}, {"answer_only": parse_context("answer_only")})

    Args:
        model: the student: a folder or a hub id.
        args: settings of sampling, of the divergence and of the tokens that are scored; it trains nothing.
        revision: of the model.
    """

    def __init__(self, model: str, args: OPSDConfig, revision: str = "main"):
        self._args = args
        dtype = (args.model_init_kwargs or {}).get("dtype", "float32")
        loaded, tokenizer = load_model(
            model, trust_remote_code=args.trust_remote_code, revision=revision, dtype=dtype, use_safetensors=True
        )
        # Nothing trains: a teacher that is the student itself needs no copy.
        self._model: PreTrainedModel = without_dropout(loaded.to(args.device)).eval().requires_grad_(False)
        check_model(self._model, len(tokenizer))
        renderer = PromptRenderer(tokenizer, None, args.chat_template_kwargs or {})
        self._student = StudentHandle(self._model, renderer, args.trust_remote_code, None)
        self._end_ids, _ = prepare_sampling(args, self._model, tokenizer)

    def scores(
        self,
        rows: Mapping[int, Mapping[str, Any]],
        teachers: Mapping[str, Teacher],
        contexts: Mapping[str, Context | None] | None = None,
    ) -> list[Score]:
        """Return each row as each teacher with each context sees it.

        Args:
            rows: by their numbers.
            teachers: by what they are called; each is prepared once, whatever the number of contexts.
            contexts: by what they are called, None for no context; without any, each teacher's own.
        """
        found: list[Score] = []
        with torch.no_grad(), self._autocast():
            completions = self.completions(rows)
            for name, teacher in teachers.items():
                scorer = Scorer(self._args, teacher)
                scorer.prepare(self._student, self._end_ids)
                own = teacher.prompts
                if not contexts:
                    shown = ", ".join(context.name for context in own.contexts) or "none"
                    found += self._scores(scorer, rows, completions, f"{name} · context: {shown}")
                for text, context in (contexts or {}).items():
                    teacher.prompts = own.with_context(context)
                    found += self._scores(scorer, rows, completions, f"{name} · context: {text}")
                teacher.prompts = own
        return found

    def lists(
        self, rows: Sequence[Mapping[str, Any]], teacher: Teacher, count: int
    ) -> Iterator[tuple[Asked, TokenScores]]:
        """Yield the teacher's `count` likeliest tokens at every token of each row's completion.

        Args:
            rows: with completions; each is asked for by the ids of the student's prompt and of the completion.
            teacher: prepared (`prepare`).
            count: of likeliest tokens.
        """
        prompts = [self._student.renderer.ids(row["prompt"]) for row in rows]
        with torch.no_grad(), self._autocast():
            completions = self.completions(dict(enumerate(rows)))
            rollouts = teacher.prompts.render(Rollouts(rows, prompts, completions))
            view = TeacherView(teacher)
            view.expect(rollouts)
            for start in range(0, len(rows), ROWS):
                part = rollouts.select(range(start, min(start + ROWS, len(rows))))
                ids_N = torch.tensor(part.scored_ids, device=self._args.device)
                listed = as_list(view.score(part), ids_N, count)
                columns = [
                    each.cpu().numpy() for each in (listed.ids_NK, listed.logprobs_NK, listed.sampled_logprobs_N)
                ]
                ends = np.cumsum([len(ids) for ids in part.completion_ids])[:-1]
                of_rows = zip(*(np.split(column, ends) for column in columns), strict=True)
                for prompt, ids, scores in zip(part.prompt_ids, part.completion_ids, of_rows, strict=True):
                    yield Asked((*prompt, *ids), len(prompt)), TokenScores(*scores)

    def asked(self, rows: Sequence[Mapping[str, Any]]) -> list[Asked]:
        """Return the names under which the scores of rows with completions are kept."""
        prompts = [self._student.renderer.ids(row["prompt"]) for row in rows]
        completions = self.completions(dict(enumerate(rows)))
        return [Asked((*prompt, *ids), len(prompt)) for prompt, ids in zip(prompts, completions, strict=True)]

    def prepare(self, teacher: Teacher) -> None:
        """Get a teacher ready for `lists`."""
        teacher.prepare(self._student)

    @property
    def precision(self) -> str:
        """The dtype of the weights, and whether products are computed in 16 bits."""
        half = "bf16" if self._args.bf16 else "fp16" if self._args.fp16 else "no"
        return f"{self._model.dtype}, {half} autocast"

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's."""
        return self._student.tokenizer

    def _scores(
        self, scorer: Scorer, rows: Mapping[int, Mapping[str, Any]], completions: Sequence[Ids], name: str
    ) -> Iterator[Score]:
        makes = TracedRollouts(self._student.tokenizer, self._end_ids, scorer.teacher)
        numbers, given = list(rows), list(rows.values())
        prompts = [self._student.renderer.ids(row["prompt"]) for row in given]
        own = [completion_of(row) is None for row in given]
        traced = [True] * len(given)
        whole = scorer.prepare_rollouts(Rollouts(given, prompts, completions, on_policy=own, is_traced=traced))
        for start in range(0, len(whole), ROWS):
            part = whole.select(range(start, min(start + ROWS, len(whole))))
            record = scorer(self._model, scorer.score(part), self._args.device, 1)
            for number, rollout in zip(numbers[start:], makes(record, part, range(len(part)), 0), strict=False):
                yield Score(number, name, rollout)

    def completions(self, rows: Mapping[int, Mapping[str, Any]], seed: int | None = None) -> list[Ids]:
        """Return the completions of rows, sampled where they have none; `seed` instead of the settings'."""
        args, renderer = self._args, self._student.renderer
        given = [completion_of(row) for row in rows.values()]
        prompts = [renderer.ids(row["prompt"]) for row, text in zip(rows.values(), given, strict=True) if text is None]
        sampled = iter(
            generate(
                self._model, prompts, self._student.tokenizer, max_new_tokens=args.max_completion_length,
                batch_size=ROWS, do_sample=True, temperature=args.temperature, seed=args.seed if seed is None else seed,
                stop_ids=self._end_ids, **rollout_settings(args),
            )
            if prompts
            else ()
        )  # fmt: skip

        def ids_of(number: int, row: Mapping[str, Any], completion: Any) -> Ids:
            if completion is None:
                return next(sampled)
            try:
                return (
                    completion if isinstance(completion, list) else completion_ids(renderer, row["prompt"], completion)
                )
            except DataError as error:
                raise DataError(f"row {number}: {error}") from error

        return [ids_of(*each) for each in zip(rows, rows.values(), given, strict=True)]

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = torch.float16 if self._args.fp16 else torch.bfloat16
        return torch.autocast(self._args.device.type, dtype=dtype, enabled=bool(self._args.bf16 or self._args.fp16))
