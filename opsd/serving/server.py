"""One server: asks it, tells what can be tried again from what cannot, and lets it rest after several failures."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2
import orjson

from opsd.errors import AnswerError, ServerError
from opsd.serving.answers import Asked, TokenScores
from opsd.serving.protocol import VLLMProtocol

FAILURES = 3  # in a row, after which a server rests
FIRST_REST, LONGEST_REST = 1.0, 30.0  # seconds; each rest is twice the one before
LARGEST_ANSWER = 2**20  # bytes of what is not a list of scores
OF_REQUEST = (400, 413, 422)  # statuses that say that this request is wrong; another try would be, too


class UnansweredError(ServerError):
    """No usable answer came, and one may come from another server or later.

    Args:
        reason: what happened.
        after: seconds after which the server wants to be asked again; 0 where it does not say.
    """

    def __init__(self, reason: str, after: float = 0.0):
        super().__init__(reason)
        self.after = after


class AllRestError(UnansweredError):
    """No server may be asked now."""


@dataclass
class CircuitBreaker:
    """Lets a server rest after several failures, then tries one request, and rests longer if that fails as well.

    >>> breaker = CircuitBreaker()
    >>> for _ in range(3):
    ...     breaker.failed(now=0.5, sent=0.0)
    >>> breaker.opens_at
    1.5
    """

    failures: int = 0
    opens_at: float = 0.0  # seconds of the clock; requests are let through from then on

    def failed(self, now: float, sent: float) -> None:
        """Count the failure of a request that was sent at a time; those sent before a rest are one failure together."""
        if sent < self.opens_at:
            return
        self.failures += 1
        if self.failures >= FAILURES:
            rests = min(self.failures - FAILURES, 10)  # doubled more often, it is longer than the longest
            self.opens_at = now + min(FIRST_REST * 2**rests, LONGEST_REST)

    def succeeded(self) -> None:
        """Forget failures."""
        self.failures, self.opens_at = 0, 0.0

    def lets_through(self, now: float, load: int) -> bool:
        """Tell whether a request may be sent; one at a time to a server that has rested and not answered yet."""
        return now >= self.opens_at and (self.failures < FAILURES or load == 0)


@dataclass
class Server:
    """A server at an address.

    Args:
        url: its address, without credentials.
        client: of httpx2, with headers and the time for a connection.
        timeout: seconds until the whole of an answer is there.
        protocol: how it is asked.
        concurrency: requests that it gets at a time.
        load: requests that are for it, sent or not.
        breaker: lets it rest.
        clock: seconds.

    Example:
        >>> await Server("http://localhost:8000", client).scores("teacher", [Asked((5, 9, 2), 1)], top_k=20)
    """

    url: str
    client: httpx2.AsyncClient
    timeout: float = 120.0
    protocol: VLLMProtocol = field(default_factory=VLLMProtocol)
    concurrency: int = 16
    load: int = 0
    breaker: CircuitBreaker = field(default_factory=CircuitBreaker)
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._slots = asyncio.Semaphore(self.concurrency)

    @property
    def is_open(self) -> bool:
        """Whether it may be asked now."""
        return self.breaker.lets_through(self.clock(), self.load)

    async def scores(self, model: str, asked: Sequence[Asked], top_k: int) -> list[TokenScores]:
        """Return the scores of sequences.

        Raises:
            UnansweredError: no answer, or one of a server that is busy or broken.
            AnswerError: an answer that cannot be true.
            ServerError: it refuses this request.
        """
        body, most = self.protocol.body(model, asked, top_k), self.protocol.largest_answer(asked, top_k)
        return await self.asked(lambda content: self.protocol.read(content, asked, top_k), body, most)

    async def asked(self, read: Callable[[bytes], Any], body: bytes, most: int = LARGEST_ANSWER) -> Any:
        """Send a request, and return what `read` makes of its answer of at most so many bytes; raises as `scores`."""
        async with self._slots:
            return await self._asked(read, body, most)

    async def _asked(self, read: Callable[[bytes], Any], body: bytes, most: int) -> Any:
        sent = self.clock()
        try:
            content = await self.post(self.protocol.path, body, most)
            try:
                answer = read(content)
            except AnswerError:
                raise
            except Exception as error:  # of a form that no server should send
                raise AnswerError(f"it cannot be read ({type(error).__name__}: {error})") from error
        except (UnansweredError, AnswerError):
            self.breaker.failed(self.clock(), sent)
            raise
        self.breaker.succeeded()
        return answer

    async def post(self, path: str, body: bytes, most: int = LARGEST_ANSWER) -> bytes:
        """Return the answer to a request; raises as `scores`."""
        headers = {"Content-Type": "application/json"}
        return await self._sent(self.client.build_request("POST", self.url + path, content=body, headers=headers), most)

    async def get(self, path: str) -> bytes:
        """Return what is at a path; raises as `scores`."""
        return await self._sent(self.client.build_request("GET", self.url + path))

    async def _sent(self, request: httpx2.Request, most: int = LARGEST_ANSWER) -> bytes:
        try:
            async with asyncio.timeout(self.timeout):  # of the whole answer: one that drips would never time out
                response = await self.client.send(request, stream=True)
                try:
                    content = await self._read(response, most)
                finally:
                    await response.aclose()
        except (TimeoutError, httpx2.TimeoutException) as error:
            raise UnansweredError(f"no answer in time ({type(error).__name__})") from error
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise UnansweredError(f"{type(error).__name__}: {error}") from error
        if response.is_success:
            return content
        if response.status_code in OF_REQUEST:
            raise ServerError(f"{self.url} refuses the request ({response.status_code}): {_said(content)}")
        after = _seconds(response.headers.get("retry-after"))
        raise UnansweredError(f"status {response.status_code}: {_said(content)}", after)

    async def _read(self, response: httpx2.Response, most: int) -> bytes:
        """Return the body; gives up on one that is larger than an answer can be, before it fills the memory."""
        content = bytearray()
        async for chunk in response.aiter_bytes():
            content += chunk
            if len(content) > most:
                raise UnansweredError(f"an answer of more than {most / 2**20:.0f} MiB, which no answer takes")
        return bytes(content)


def _said(content: bytes) -> str:
    """Return the message of an error."""
    try:
        error = orjson.loads(content)["error"]
        return str(error["message"] if isinstance(error, dict) else error)[:300]
    except (ValueError, KeyError, TypeError):
        return content[:200].decode(errors="replace")


def _seconds(value: str | None) -> float:
    try:
        return min(max(float(value or 0), 0.0), LONGEST_REST)
    except ValueError:  # a date
        return FIRST_REST
