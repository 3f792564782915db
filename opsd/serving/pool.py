"""Several servers of one teacher: the least loaded is asked first, another one where it fails, and again for a while.

Requests run in a thread of their own, so that a trainer goes on while it waits. Every request carries a short text
whose scores are known, so that an answer of another model, put in the first one's place, is never used.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import httpx2
import tenacity

from opsd.errors import AnswerError, ConfigError, ServerError
from opsd.serving.answers import Asked, TokenScores
from opsd.serving.protocol import VLLMProtocol
from opsd.serving.server import AllRestError, Server, UnansweredError

Answer = TypeVar("Answer")
LONGEST_PAUSE = 10.0  # seconds between two tries


@dataclass(frozen=True)
class Limits:
    """How long and how often servers are asked.

    >>> Limits(patience=float("inf"))  # waits for as long as it takes

    Args:
        concurrency: requests to one server at a time, of this process.
        connect_timeout: seconds.
        read_timeout: seconds until the whole of an answer is there.
        patience: seconds from its first failed try, after which a sequence is given up.
    """

    concurrency: int = 16
    connect_timeout: float = 5.0
    read_timeout: float = 120.0
    patience: float = 300.0


@dataclass(frozen=True)
class Canary:
    """A text whose scores are known, sent with every request.

    Args:
        asked: the text.
        scores: what the server said of it before training.
        tolerance: nats per token that it may differ by: what the server's own rounding does.
    """

    asked: Asked
    scores: TokenScores
    tolerance: float

    def check(self, scores: TokenScores) -> None:
        """Refuse the scores of another model.

        Raises:
            AnswerError: they differ by more than rounding.
        """
        if (distance := scores.distance(self.scores)) > self.tolerance:
            raise AnswerError(
                f"it is of another model: a text that was scored before training differs by {distance:.3g} nats per "
                f"token, and {self.tolerance:.2g} is what rounding explains"
            )


@dataclass
class Counts:
    """What happened since the last look.

    Args:
        answers: requests that were answered.
        tries: how often they were sent.
        busy: seconds during which one or more of them waited for an answer.
        problems: tries without a usable answer, by kind.
    """

    answers: int = 0
    tries: int = 0
    busy: float = 0.0
    problems: Counter[str] = field(default_factory=Counter)


class ServerPool:
    """Asks servers.

    >>> with ServerPool(["http://gpu-1:8000", "http://gpu-2:8000"]) as pool:
    ...     future = pool.submit("teacher", Asked((5, 9, 2), 1), top_k=20)
    ...     future.result()  # a TokenScores

    Args:
        urls: their addresses; all serve the same model.
        limits: how long and how often they are asked.
        api_key: sent as a bearer token; never in an error.
        protocol: how they are asked.
    """

    def __init__(
        self,
        urls: Sequence[str],
        limits: Limits | None = None,
        *,
        api_key: str | None = None,
        protocol: VLLMProtocol | None = None,
    ):
        self.urls = [plain_url(url) for url in urls]
        self.limits = limits or Limits()
        self.protocol = protocol or VLLMProtocol()
        self.canary: Canary | None = None
        self.trouble = "no answer yet"  # the last one, in words
        self._counts = Counts()
        self._waiting, self._since = 0, 0.0  # requests without an answer, and since when there are some
        self._key = _checked_key(api_key)
        self._servers: list[Server] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> ServerPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def take_counts(self) -> Counts:
        """Return what happened since the last call."""
        return self.run(self._take_counts())

    async def _take_counts(self) -> Counts:  # in the pool's thread, which counts
        now = time.monotonic()
        taken, self._counts = self._counts, Counts()
        if self._waiting:
            taken.busy += now - self._since
            self._since = now
        return taken

    def submit(self, model: str, asked: Asked, top_k: int) -> Future[TokenScores]:
        """Begin to score a sequence; the future raises ServerError where no server did."""
        return self.begin(self._scores(model, asked, top_k))

    def run(self, asks: Coroutine[Any, Any, Answer]) -> Answer:
        """Return what a coroutine of the pool's thread returns."""
        return self.begin(asks).result()

    def begin(self, asks: Coroutine[Any, Any, Answer]) -> Future[Answer]:
        """Begin a coroutine in the pool's thread."""
        try:
            return asyncio.run_coroutine_threadsafe(asks, self._running())
        except ConfigError:
            asks.close()
            raise

    async def each(self, ask: Callable[[Server], Coroutine[Any, Any, Answer]]) -> list[Answer | Exception]:
        """Return what each server answers, or how it failed."""
        return await asyncio.gather(*map(ask, self._servers), return_exceptions=True)  # type: ignore[return-value]

    def sample(
        self, model: str, prompts: Sequence[Sequence[int]], longest: int, settings: Sequence[Mapping[str, Any]]
    ) -> list[list[int]]:
        """Return the model's own completions of prompts, one request each, with settings of its own.

        Raises:
            ServerError: a prompt has no completion before patience ended, or is refused.
        """

        def asked(prompt: Sequence[int], own: Mapping[str, Any]) -> Coroutine[Any, Any, list[int]]:
            body = self.protocol.sampling_body(model, prompt, longest, own)
            return self.answer(body, self.protocol.read_sample, self.protocol.largest_sample(len(prompt) + longest))

        futures = [self.begin(asked(*each)) for each in zip(prompts, settings, strict=True)]
        return [future.result() for future in futures]

    async def answer(self, body: bytes, read: Callable[[bytes], Answer], most: int) -> Answer:
        """Return what `read` makes of the answer to a request, of at most so many bytes, whichever server gives it.

        Raises:
            ServerError: none did before patience ended, or the request is refused.
        """
        if not self._waiting:
            self._since = time.monotonic()
        self._waiting += 1
        try:
            answer = await self._tried(body, read, most)
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._counts.busy += time.monotonic() - self._since
        self._counts.answers += 1
        return answer

    async def _tried(self, body: bytes, read: Callable[[bytes], Answer], most: int) -> Answer:
        failed, reasons, first = Counter[str](), Counter[str](), list[float]()  # when the first try failed

        def is_over(state: tenacity.RetryCallState) -> bool:
            return bool(first) and time.monotonic() - first[0] >= self.limits.patience

        tries = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type((UnansweredError, AnswerError)),
            stop=is_over, wait=_pause, reraise=True,
        )  # fmt: skip
        try:
            async for attempt in tries:
                with attempt:
                    try:
                        server = self._least_loaded(failed)
                        server.load += 1
                        try:
                            answer = await server.asked(read, body, most)
                        finally:
                            server.load -= 1
                            self._counts.tries += 1
                        return answer
                    except AllRestError:
                        first.append(time.monotonic())
                        raise
                    except (UnansweredError, AnswerError) as error:
                        first.append(time.monotonic())
                        failed[server.url] += 1
                        self.trouble = self._without_key(f"{server.url}: {error}")
                        reasons[self.trouble] += 1
                        self._counts.problems[type(error).__name__] += 1
                        raise
        except (UnansweredError, AnswerError):
            seconds = time.monotonic() - first[0]
            listed = "; ".join(f"{reason} ({count} times)" for reason, count in reasons.most_common(3)) or self.trouble
            raise ServerError(
                f"no server gave an answer that can be used within {seconds:.0f} s: {listed}. A token without a "
                "teacher's score cannot be trained on. See that the servers run, or raise `patience`."
            ) from None  # what it was raised from may hold the key
        except ServerError as error:
            raise ServerError(self._without_key(str(error))) from None
        raise AssertionError("tenacity ends with an answer or an error")

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "(the key)") if self._key else text

    async def _scores(self, model: str, asked: Asked, top_k: int) -> TokenScores:
        canary = self.canary
        together = [asked] if canary is None else [canary.asked, asked]

        def read(content: bytes) -> TokenScores:
            *known, scores = self.protocol.read(content, together, top_k)
            if canary is not None:
                canary.check(known[0])
            return scores

        most = self.protocol.largest_answer(together, top_k)
        return await self.answer(self.protocol.body(model, together, top_k), read, most)

    def _least_loaded(self, failed: Mapping[str, int]) -> Server:
        """Return the server to ask: one that failed this request less often, then one with fewer requests.

        Raises:
            AllRestError: all rest.
        """
        ready = [server for server in self._servers if server.is_open]
        if not ready:
            opens = min(server.breaker.opens_at - server.clock() for server in self._servers)
            raise AllRestError("every server failed several times in a row, and is not asked for a while", opens)
        return min(ready, key=lambda server: (failed.get(server.url, 0), server.load))

    # ---- the thread ------------------------------------------------------------------------------------------------

    def _running(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            client, limits = self._client(), self.limits
            self._servers = [
                Server(url, client, limits.read_timeout, self.protocol, limits.concurrency) for url in self.urls
            ]
            loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._serve, args=(loop, client), name="opsd servers", daemon=True)
            self._thread.start()
            self._loop = loop
        return self._loop

    def _client(self) -> httpx2.AsyncClient:
        timeout = httpx2.Timeout(None, connect=self.limits.connect_timeout)  # the rest is timed as a whole
        most = self.limits.concurrency * len(self.urls)
        connections = httpx2.Limits(max_connections=most, max_keepalive_connections=most)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            return httpx2.AsyncClient(timeout=timeout, limits=connections, headers=headers)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"no connection to servers can be made: {self._without_key(str(error))} Proxies come from the "
                "environment (HTTP_PROXY, ALL_PROXY): unset what is not needed."
            ) from error

    def _serve(self, loop: asyncio.AbstractEventLoop, client: httpx2.AsyncClient) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
        finally:
            loop.run_until_complete(client.aclose())
            loop.close()

    def close(self) -> None:
        """End the thread; what was not answered is cancelled."""
        if self._loop is None or self._thread is None:
            return
        asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop = self._thread = None


async def _cancel_all() -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _checked_key(key: str | None) -> str:
    """Return a key that can be sent.

    Raises:
        ConfigError: it cannot; the key is not shown.
    """
    key = (key or "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            "the server's key has characters that no header can hold (spaces, line breaks, or others than ASCII). See "
            "that the environment variable holds the key alone."
        )
    return key


def _pause(state: tenacity.RetryCallState) -> float:
    """Return the seconds before the next try: growing, with jitter, and at least what a server asks for."""
    error = state.outcome.exception() if state.outcome else None
    grows = tenacity.wait_random_exponential(multiplier=0.2, max=LONGEST_PAUSE)(state)
    return max(grows, error.after if isinstance(error, UnansweredError) else 0.0)


def plain_url(url: str) -> str:
    """Return a server's address without a path.

    Raises:
        ConfigError: it is no http address, or has a password in it.
    """
    shown = "(left out, as it may hold a password)" if "@" in url else url
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port
    except ValueError:
        is_address = False
    if not is_address:
        raise ConfigError(
            f"a server's address is {shown!r}, which is no http address. Write it with its scheme and port, such as "
            "http://gpu-1:8000."
        )
    if parts.username or parts.password:
        raise ConfigError(
            "a server's address has a user name or a password in it, which would stand in logs and run cards. Set the "
            "key as an environment variable (`api_key_env`)."
        )
    path = parts.path.rstrip("/").removesuffix("/v1")
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))
