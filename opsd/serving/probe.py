"""Asks servers about themselves before training: which model, how long, how many tokens it lists, how exact it is.

Each mismatch is an error with the way out, mostly a flag of the server. Knows servers and ids; no tokenizer or model.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson

from opsd.errors import ConfigError, ServerError, TokenizerMismatchError
from opsd.serving.answers import Asked, TokenScores
from opsd.serving.pool import Canary, ServerPool
from opsd.serving.server import Server, UnansweredError

Answer = TypeVar("Answer")
REPEATS = 8  # identical requests at a time
NOISE_FACTOR = 5.0  # by which a text may differ from its first scores, over what identical requests differ by
LEAST_TOLERANCE = 5e-3  # nats per token


@dataclass(frozen=True)
class ServerFacts:
    """What servers say of themselves.

    Args:
        model: its name.
        source: the folder or hub id that it was loaded from, as far as it says; "" where it does not.
        max_length: tokens of a prompt that it takes; None where it does not say.
        noise: nats per token by which identical requests differ at most.
        compared_tokens: whether it said how it splits texts.

    Example:
        >>> str(probe(pool, texts={}, canary=Asked((5, 9, 2, 7), 1), top_k=20))
        "'teacher', prompts up to 4,095 tokens; identical requests differ by 0.00003 nats per token"
    """

    model: str
    source: str
    max_length: int | None
    noise: float
    compared_tokens: bool

    def __str__(self) -> str:
        length = "of unknown length" if self.max_length is None else f"up to {self.max_length:,} tokens"
        unsure = "" if self.compared_tokens else "; its tokenizer was not compared, it has no /tokenize"
        return f"{self.model!r}, prompts {length}; identical requests differ by {self.noise:.2g} nats per token{unsure}"


def probe(
    pool: ServerPool, *, model: str | None = None, texts: Mapping[str, Sequence[int]], canary: Asked, top_k: int
) -> ServerFacts:
    """Ask all servers of a pool, and set the pool's canary.

    Args:
        pool: the servers.
        model: its name there; None where they serve one.
        texts: texts and their ids in the student's tokenizer.
        canary: a text whose scores tell this model from others.
        top_k: likeliest tokens that will be asked for.

    Raises:
        ServerError: one does not answer.
        ConfigError: they do not serve what is needed.
        TokenizerMismatchError: they split texts otherwise.
    """
    return pool.run(_probe(pool, model, texts, canary, top_k))


async def _probe(
    pool: ServerPool, model: str | None, texts: Mapping[str, Sequence[int]], canary: Asked, top_k: int
) -> ServerFacts:
    listed = await _of_each(pool, lambda server: server.get(pool.protocol.models_path), "list its models")
    cards = [_models(content, url) for url, content in listed.items()]
    name = _agreed(model, cards, list(listed))
    of_name = [each[name] for each in cards]
    compared = await _compare_tokens(pool, name, texts)
    known, noise = await _self_test(pool, name, canary, top_k)
    tolerance = max(LEAST_TOLERANCE, NOISE_FACTOR * noise)
    await _check_temperature(pool, name, canary, known, top_k, tolerance)
    pool.canary = Canary(canary, known, tolerance)
    lengths = [card["max_model_len"] - 1 for card in of_name if isinstance(card.get("max_model_len"), int)]
    return ServerFacts(name, str(of_name[0].get("root") or ""), min(lengths, default=None), noise, compared)


async def _of_each(
    pool: ServerPool, ask: Callable[[Server], Coroutine[Any, Any, Answer]], what: str
) -> dict[str, Answer]:
    """Return what each server answers by its address.

    Raises:
        ServerError: names the first that does not.
    """
    answers: dict[str, Answer] = {}
    for url, answer in zip(pool.urls, await pool.each(ask), strict=True):
        if isinstance(answer, BaseException):
            said = f"{answer}" if isinstance(answer, ServerError) else f"{type(answer).__name__}: {answer}"
            raise ServerError(
                f"the server at {url} did not {what}: {said}. A run needs each of its servers at its start, to see "
                "that they serve the same model. Start it (`opsd serve` prints the command), or leave it out."
            ) from answer
        answers[url] = answer
    return answers


def _models(content: bytes, url: str) -> dict[str, Mapping[str, Any]]:
    try:
        return {str(card["id"]): card for card in orjson.loads(content)["data"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ServerError(
            f"the server at {url} lists no models at /v1/models. An OpenAI-compatible server does. Check the address."
        ) from error


def _agreed(model: str | None, cards: Sequence[Mapping[str, Any]], urls: Sequence[str]) -> str:
    """Return the name of the model that all servers serve."""
    for url, served in zip(urls, cards, strict=True):
        if model is not None and model not in served:
            raise ConfigError(
                f"the server at {url} serves {', '.join(served) or 'nothing'}, and not {model!r}. Name what it "
                "serves (`model`), or start it with --served-model-name."
            )
    names = set.intersection(*(set(served) for served in cards))
    if model is None and len(names) != 1:
        listed = "; ".join(f"{url}: {', '.join(served)}" for url, served in zip(urls, cards, strict=True))
        raise ConfigError(f"which model is the teacher? The servers have {listed}. Name one that all have (`model`).")
    return model or names.pop()


async def _compare_tokens(pool: ServerPool, model: str, texts: Mapping[str, Sequence[int]]) -> bool:
    """Compare how the servers split texts; return whether they say.

    Raises:
        TokenizerMismatchError: otherwise than the student's tokenizer.
    """
    for text, ids in texts.items():
        body = orjson.dumps({"model": model, "prompt": text, "add_special_tokens": False})

        async def split(server: Server, body: bytes = body) -> Any:
            return orjson.loads(await server.post(pool.protocol.tokenize_path, body))["tokens"]

        for url, answer in zip(pool.urls, await pool.each(split), strict=True):
            if isinstance(answer, UnansweredError) and "status 404" in str(answer):
                return False  # a server that does not say
            if isinstance(answer, BaseException):
                raise ServerError(
                    f"the server at {url} did not say how it splits a text: {answer}. Other ids would be compared with "
                    "the student's. Try again, or see the server's log."
                ) from answer
            if list(answer) != list(ids):
                raise TokenizerMismatchError(
                    f"student and teacher must share a tokenizer, and {text!r} becomes {list(ids)} for the student and "
                    f"{answer} for the server at {url}. The loss compares their distributions id by id. Serve a model "
                    "of the student's family."
                )
    return bool(texts)


async def _self_test(pool: ServerPool, model: str, canary: Asked, top_k: int) -> tuple[TokenScores, float]:
    """Return the scores of a text, and by how much they differ between requests at the same time, beside others."""
    others = [Asked(canary.ids * (1 + number), canary.start) for number in range(REPEATS)]

    async def repeated(server: Server) -> list[TokenScores]:
        first = await server.scores(model, [canary], top_k)  # alone, and without others waiting for a refusal
        asked = (server.scores(model, [canary, other], top_k) for other in others)
        return [*first, *(scores for scores, _ in await asyncio.gather(*asked))]

    by_server = await _of_each(pool, repeated, f"score a text with its {top_k} likeliest tokens{_flags(pool, top_k)}")
    scores = list(itertools.chain(*by_server.values()))
    noise = max(each.distance(scores[0]) for each in scores)
    if noise > 1.0:
        raise ConfigError(
            f"the servers' scores of one text differ by {noise:.2f} nats per token: they do not serve the same model, "
            "or compute with too little precision to teach anything. Serve one model, with --dtype float32 or bfloat16."
        )
    return scores[0], noise


def _flags(pool: ServerPool, top_k: int) -> str:
    return f" (a server that grants fewer is started with {pool.protocol.top_k_flag} {top_k})"


async def _check_temperature(
    pool: ServerPool, model: str, canary: Asked, known: TokenScores, top_k: int, tolerance: float
) -> None:
    body = pool.protocol.body(model, [canary], top_k, temperature=0.5)

    async def scaled(server: Server) -> TokenScores:
        return pool.protocol.read(await server.post(pool.protocol.path, body, 2**30), [canary], top_k)[0]

    for url, answer in (await _of_each(pool, scaled, "score a text at another temperature")).items():
        if answer.distance(known) > tolerance:
            raise ConfigError(
                f"the server at {url} gives log-probabilities that depend on the temperature of the request. A loss "
                "needs the model's own. Start it with --logprobs-mode raw_logprobs."
            )
