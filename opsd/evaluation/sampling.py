"""Answers of a model to rows, greedy and sampled, each with its grade: an `EvaluationResult`.

Knows how to ask for completions (`Generate`) and how to grade them; makes no prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opsd.errors import ConfigError, DataError
from opsd.evaluation.graders import Grader, Row, grade
from opsd.evaluation.questions import question_of
from opsd.evaluation.result import Answer, EvaluationResult
from opsd.models.generation import generate


class Generate(Protocol):
    """Completes rows, as ids: a model on the plain prompts, or a teacher with its context (`Teacher.sample`)."""

    def __call__(
        self, rows: Sequence[Row], *, max_new_tokens: int, batch_size: int, **sampling: Any
    ) -> list[list[int]]:
        """Return one completion per row; `sampling` is passed to `opsd.models.generation.generate`."""
        ...


def generate_with(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, prompt_ids: Callable[[Row], list[int]]
) -> Generate:
    """Return a function that completes rows with a model.

    Args:
        model: the model; its mode and settings are restored afterwards.
        tokenizer: the model's.
        prompt_ids: returns the prompt of a row, as ids.
    """

    def complete(rows: Sequence[Row], **sampling: Any) -> list[list[int]]:
        return generate(model, [prompt_ids(row) for row in rows], tokenizer, **sampling)

    return complete


def evaluate(
    complete: Generate,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    grader: Grader | Callable[[str, Row], bool] | str,
    max_new_tokens: int,
    batch_size: int,
    stop_ids: Collection[int] = (),
    samples: int = 0,
    temperature: float = 1.0,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    model: str = "",
    context: str = "none",
) -> EvaluationResult:
    """Answer every row greedily, and `samples` more times by sampling, and grade the answers.

    Args:
        complete: completes rows, see `generate_with`.
        rows: prepared rows, a list or a `datasets.Dataset`.
        tokenizer: decodes the completions.
        grader: tells right texts from wrong ones, see `load_grader`.
        max_new_tokens: longest completion, in tokens.
        batch_size: rows per forward pass.
        stop_ids: ids that end a completion, beside the tokenizer's end of sequence.
        samples: sampled answers per row.
        temperature: of the sampled answers.
        seed: of the sampled answers; the same rows, batch size and seed give the same samples.
        progress: called with the number of finished answers after each batch.
        model: name of the model, for the result.
        context: name of the context in the prompts, for the result.

    Raises:
        DataError: there are no rows, or a prompt is empty or too long for the model's context.
        ConfigError: `samples` is negative, or `max_new_tokens` or `batch_size` is below 1.
    """
    if len(rows) == 0:
        raise DataError("the split has no rows to evaluate.\nAn accuracy over no rows is undefined. Check the split.")
    if samples < 0:
        raise ConfigError(
            f"samples is the number of sampled answers per question, and is {samples}. Use 0 for greedy answers only."
        )
    rows, parsed = list(rows), Grader.parse(grader)
    budget: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    done = (lambda offset: lambda n: progress(offset + n)) if progress else (lambda offset: None)
    repeated = [row for row in rows for _ in range(samples)]
    completions = complete(rows, **budget, progress=done(0))
    if samples:
        sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature, "seed": seed}
        completions += complete(repeated, **budget, **sampling, progress=done(len(rows)))
    stops = {*stop_ids, tokenizer.eos_token_id} - {None}
    answers = _graded(completions, rows + repeated, tokenizer, parsed, stops)
    greedy, rest = answers[: len(rows)], answers[len(rows) :]
    return EvaluationResult(
        questions=[question_of(row) for row in rows],
        grader=parsed.name,
        greedy=greedy,
        sampled=[rest[i : i + samples] for i in range(0, len(rest), samples)] if samples else [],
        temperature=temperature,
        has_form=parsed.read is not None,
        max_new_tokens=max_new_tokens,
        model=model,
        context=context,
    )


def _graded(
    completions: Sequence[list[int]],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    grader: Grader,
    stops: Collection[int],
) -> list[Answer]:
    ended = [bool(ids) and ids[-1] in stops for ids in completions]
    # The end token is removed by its id: a tokenizer need not mark each of the model's end tokens as special.
    texts = [
        tokenizer.decode(ids[:-1] if end else ids, skip_special_tokens=True)
        for ids, end in zip(completions, ended, strict=True)
    ]
    return [
        Answer(text, correct, len(ids), end, grader.answer(text))
        for text, correct, ids, end in zip(texts, grade(grader, texts, rows), completions, ended, strict=True)
    ]
