"""What a sampling engine says of its own samples, kept for importance correction.

Knows TRL's wrapper around vLLM and nothing else of it: TRL's distillation trainer asks for no log-probabilities and
drops those it gets.
"""

from __future__ import annotations

from typing import Any

from opsd.rollouts import Ids

UNKNOWN = float("nan")


class EngineLogprobs:
    """Listens to an engine and keeps the log-probabilities of the last completions that it sampled.

    Args:
        engine: TRL's `VLLMGeneration`. Its log-probabilities are those after temperature and top-p, as it samples.
    """

    def __init__(self, engine: Any):
        engine.logprobs = 0  # the sampled token's, and no others
        self._generate = engine.generate
        self._last: list[list[float]] = []
        engine.generate = self._listen

    def _listen(self, *args: Any, **kwargs: Any) -> Any:
        answer = self._generate(*args, **kwargs)
        logprobs = answer[2] or [[] for _ in answer[1]]
        self._last = [[UNKNOWN if t[0] is None else float(t[0]) for t in tokens] for tokens in logprobs]
        return answer

    def take(self, completion_ids: list[Ids]) -> list[list[float]]:
        """Return what belongs to these completions, NaN for tokens that the engine did not answer for."""
        last, self._last = self._last, []
        found = last if len(last) == len(completion_ids) else [[] for _ in completion_ids]
        return [(own + [UNKNOWN] * len(ids))[: len(ids)] for own, ids in zip(found, completion_ids, strict=True)]
