"""Completions from a run's sampling engine (vLLM), for all who ask the student: evaluation, doctor and self-teachers.

Knows TRL's wrapper around vLLM and token ids; nothing of rows, teachers or losses.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object

from opsd.models.forward import context_length
from opsd.models.generation import check_request, cut_after_stop, forked_generators, stop_ids_of
from opsd.rollouts import Ids
from opsd.training.together import failing_together

# The engine's own settings, at which it samples from the whole distribution; others travel in `generation_kwargs`.
NEUTRAL: dict[str, Any] = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": None,
    "repetition_penalty": 1.0,
    "structured_outputs_regex": None,
}


class EngineSamples:
    """Completes prompts with the weights that the student's module holds now, as `opsd.models.generation.generate`.

    A collective: all processes call it, each with its own prompts. Samples are not repeatable: an engine would give
    equal prompts of one call equal samples for equal seeds.

    Args:
        trainer: a trainer with `use_vllm`; its engine gets the weights before each call, and again before the next
            rollouts.

    Example:
        >>> EngineSamples(trainer)([[1, 5, 9]], max_new_tokens=16)
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def __call__(
        self,
        prompts: Sequence[Ids],
        *,
        max_new_tokens: int,
        batch_size: int = 1,
        do_sample: bool = False,
        temperature: float = 1.0,
        seed: int | None = None,
        progress: Callable[[int], None] | None = None,
        stop_ids: Collection[int] = (),
        **changes: Any,
    ) -> list[Ids]:
        """Return one completion per prompt, cut after its first end, which is kept.

        Args:
            prompts: token ids.
            max_new_tokens: longest completion, in tokens.
            batch_size: has no effect: the engine batches by itself.
            do_sample: sample instead of taking the likeliest token.
            temperature: divides the logits when sampling.
            seed: has no effect.
            progress: called once, with the number of prompts.
            stop_ids: ids that end a completion beside the student's.
            changes: settings that reshape the distribution: top_p, …, or any of vLLM's SamplingParams.

        Raises:
            DataError: a prompt is empty or too long.
            ConfigError: a number that is out of range.
        """
        student, engine = self._trainer.student, self._trainer.vllm_generation
        limits = (context_length(student.model), getattr(engine, "max_model_length", None))
        limit = min((each for each in limits if each is not None), default=None)
        with failing_together():  # before anything is exchanged
            check_request(limit, prompts, max_new_tokens, batch_size, temperature)
        stops = stop_ids_of(student.model, student.tokenizer) | frozenset(stop_ids)
        count = len(prompts)
        # A server slices what it returns by equal shares of the processes.
        longest = max(gather_object([count]))
        filled = [*prompts, *[prompts[0] if prompts else sorted(stops)[:1]] * (longest - count)]
        settings = {**NEUTRAL, **{name: value for name, value in changes.items() if value is not None}}
        settings |= {"temperature": temperature if do_sample else 0.0, "max_completion_length": max_new_tokens}
        if longest == 0:
            return []
        device = student.device
        own, plain = _settings(engine, settings, sorted(stops)), torch.autocast(device.type, enabled=False)
        with own, plain, forked_generators(device):  # an engine in this process draws from torch's generators
            engine.sync_weights()
            self._trainer._last_loaded_step = -1  # the module may hold a teacher's weights now
            # The class's own: the instance's keeps log-probabilities, and those are of the last rollouts.
            _, completions, *_ = type(engine).generate(engine, prompts=filled, images=None, num_generations=1)
        if progress is not None:
            progress(count)
        return [cut_after_stop(list(ids), stops) for ids in completions[:count]]


@contextmanager
def _settings(engine: Any, settings: dict[str, Any], stops: list[int]) -> Iterator[None]:
    """Let an engine sample with other settings than the run's for the length of the block."""
    own = {name: value for name, value in settings.items() if hasattr(engine, name)}
    others = {name: value for name, value in settings.items() if name not in own}
    own["generation_kwargs"] = {**others, "stop_token_ids": stops}
    before = {name: getattr(engine, name) for name in own}
    try:
        for name, value in own.items():
            setattr(engine, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(engine, name, value)
