"""Keeps the log-probabilities that a sampling engine (vLLM) gives its samples, for importance correction.

Knows TRL's wrapper around vLLM and nothing else of it: TRL's distillation trainer asks for no log-probabilities and
drops those it gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opsd.rollouts import Ids

UNKNOWN = float("nan")


class EngineLogprobs:
    """Wraps an engine's `generate` and keeps the log-probabilities of the last completions.

    >>> engine = EngineLogprobs(trainer.vllm_generation)
    >>> trainer._generate(prompts)
    >>> logprobs = engine.take(completion_ids)

    Args:
        engine: TRL's `VLLMGeneration`. Its log-probabilities are those after temperature and top-p, as it samples.
    """

    def __init__(self, engine: Any):
        engine.logprobs = 0  # the sampled token's, and no others
        self._generate = engine.generate
        self._last: list[list[float]] = []
        engine.generate = self._generate_and_keep

    def _generate_and_keep(self, *args: Any, **kwargs: Any) -> Any:
        result = self._generate(*args, **kwargs)
        logprobs = result[2] or [[] for _ in result[1]]
        self._last = [[UNKNOWN if t[0] is None else float(t[0]) for t in tokens] for tokens in logprobs]
        return result

    def take(self, sampled: Sequence[Ids]) -> list[list[float]]:
        """Return the log-probabilities of the last call's completions, in nats; NaN for tokens it gave none for."""
        last, self._last = self._last, []
        known = last if len(last) == len(sampled) else [[] for _ in sampled]
        return [(logps + [UNKNOWN] * len(ids))[: len(ids)] for logps, ids in zip(known, sampled, strict=True)]
