"""What is sent to a kind of server, and how its answer is read. Another kind of server is another class here.

vLLM's OpenAI-compatible server, version 0.32: `/v1/completions` takes token ids, and `prompt_logprobs` has, for every
token of the prompt but the first, the token itself and the k likeliest, each with its rank. It ignores `temperature`
there, and what it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from opsd.errors import AnswerError
from opsd.serving.answers import Asked, TokenScores, checked, stacked

MOST_OF_ENTRY = 1024  # bytes of one listed token: about 70, and more where its text is long
MOST_OF_REST = 2**20


class VLLMProtocol:
    """Asks vLLM.

    >>> protocol = VLLMProtocol()
    >>> body = protocol.body("teacher", [Asked((5, 9, 2), 1)], top_k=20)
    >>> protocol.read(answer, [Asked((5, 9, 2), 1)], top_k=20)  # a list of one TokenScores
    """

    path = "/v1/completions"
    models_path = "/v1/models"
    tokenize_path = "/tokenize"
    top_k_flag = "--max-logprobs"

    def body(self, model: str, asked: Sequence[Asked], top_k: int, temperature: float = 1.0) -> bytes:
        """Return the request for the scores of some sequences."""
        return orjson.dumps(
            {
                "model": model, "prompt": [each.ids for each in asked], "max_tokens": 1, "temperature": temperature,
                "prompt_logprobs": top_k, "return_token_ids": True,
            }
        )  # fmt: skip

    def largest_answer(self, asked: Sequence[Asked], top_k: int) -> int:
        """Return the bytes that no answer exceeds."""
        return MOST_OF_REST + sum(len(each.ids) for each in asked) * (top_k + 1) * MOST_OF_ENTRY

    def read(self, content: bytes, asked: Sequence[Asked], top_k: int) -> list[TokenScores]:
        """Return the scores of the sequences, in the order in which they were asked.

        Raises:
            AnswerError: the answer is no JSON, is of other sequences, or cannot be true.
        """
        choices = _get(_parsed(content), "choices", list)
        if len(choices) != len(asked):
            raise AnswerError(f"it has {len(choices)} choices for {len(asked)} sequences")
        by_index = {_get(choice, "index", int): choice for choice in choices}
        if sorted(by_index) != list(range(len(asked))):
            raise AnswerError(f"its choices are numbered {sorted(by_index)}")
        return [checked(self._scores(by_index[n], each, top_k), top_k) for n, each in enumerate(asked)]

    def _scores(self, choice: Any, asked: Asked, top_k: int) -> TokenScores:
        echoed = choice.get("prompt_token_ids")
        if echoed is not None and echoed != list(asked.ids):
            raise AnswerError("it is of other token ids than were asked for")
        places = _get(choice, "prompt_logprobs", list)
        if len(places) != len(asked.ids):
            raise AnswerError(f"it has {len(places)} places for {len(asked.ids)} tokens")
        rows = []
        for place, (token, entry) in enumerate(zip(asked.ids, places, strict=True)):
            if place == 0:
                continue
            own = entry.get(str(token)) if isinstance(entry, Mapping) else None
            if own is None:
                raise AnswerError(f"it has no log-probability of token {token} at place {place}: it is of other tokens")
            if place >= asked.start:
                rows.append((_number(own["logprob"]), *_likeliest(entry, str(token), top_k)))
        return stacked(rows, top_k)

    def sampling_body(self, model: str, prompt: Sequence[int], longest: int, settings: Mapping[str, Any]) -> bytes:
        """Return the request for a completion."""
        return orjson.dumps(
            {"model": model, "prompt": prompt, "max_tokens": longest, "return_token_ids": True, **settings}
        )

    def largest_sample(self, tokens: int) -> int:
        """Return the bytes that no answer with a completion exceeds."""
        return MOST_OF_REST + tokens * MOST_OF_ENTRY

    def read_sample(self, content: bytes) -> list[int]:
        """Return the ids of the completion.

        Raises:
            AnswerError: the answer is no JSON, or has no ids.
        """
        choices = _get(_parsed(content), "choices", list)
        if len(choices) != 1:
            raise AnswerError(f"it has {len(choices)} completions of one prompt")
        ids: list[int] = _get(choices[0], "token_ids", list)
        return ids


def _likeliest(entry: Mapping[str, Any], own: str, top_k: int) -> tuple[list[int], list[float]]:
    """Return the likeliest ids of a place and their log-probabilities; the token itself is listed beside them."""
    if len(entry) not in (top_k, top_k + 1):
        raise AnswerError(f"a place lists {len(entry)} tokens, and {top_k} likeliest were asked for")
    listed = [item for item in entry.items() if len(entry) == top_k or item[0] != own]
    ranked = sorted((int(value["rank"]), int(token), _number(value["logprob"])) for token, value in listed)
    if [rank for rank, _, _ in ranked] != list(range(1, top_k + 1)):
        raise AnswerError(f"a place lists tokens of other ranks than 1 to {top_k}")
    return [token for _, token, _ in ranked], [logprob for _, _, logprob in ranked]


def _parsed(content: bytes) -> Any:
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise AnswerError(f"it is no JSON ({error})") from error


def _get(answer: Any, name: str, kind: type) -> Any:
    value = answer.get(name) if isinstance(answer, Mapping) else None
    if not isinstance(value, kind):
        raise AnswerError(f"its {name!r} is {value!r:.60}")
    return value


def _number(value: Any) -> float:
    if not isinstance(value, int | float):
        raise AnswerError(f"a log-probability is {value!r:.40}")
    return float(value)
