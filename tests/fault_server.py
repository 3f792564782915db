"""A server that answers as vLLM does, from a small model in this process, and fails on command.

For injecting faults only: what a real server answers is tested against a real one (tests/served/).
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOP_K = 6  # that the tests of faults ask for
FAULTS: dict[str, Callable[[dict[str, Any]], Any]] = {}  # what is wrong with an answer -> how it is made wrong


def fault(make: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    FAULTS[make.__name__.replace("_", " ")] = make
    return make


def entries(answer: dict[str, Any]) -> list[dict[str, dict[str, Any]]]:
    """The listed tokens of the last sequence's places."""
    found: list[dict[str, dict[str, Any]]] = answer["choices"][-1]["prompt_logprobs"][1:]
    return found


@fault
def truncated(answer: dict[str, Any]) -> Any:
    return json.dumps(answer).encode()[:-40]


@fault
def wrong_ids(answer: dict[str, Any]) -> Any:
    choice = answer["choices"][-1]
    choice["prompt_logprobs"] = choice["prompt_logprobs"][:1] + choice["prompt_logprobs"][:0:-1]
    choice.pop("prompt_token_ids")
    return answer


@fault
def other_ids_echoed(answer: dict[str, Any]) -> Any:
    answer["choices"][-1]["prompt_token_ids"][-1] += 1
    return answer


@fault
def not_a_number(answer: dict[str, Any]) -> Any:
    next(iter(entries(answer)[-1].values()))["logprob"] = math.nan
    return answer


@fault
def null(answer: dict[str, Any]) -> Any:
    next(iter(entries(answer)[-1].values()))["logprob"] = None
    return answer


@fault
def no_scores(answer: dict[str, Any]) -> Any:
    answer["choices"][-1]["prompt_logprobs"] = None
    return answer


@fault
def reordered(answer: dict[str, Any]) -> Any:
    first, *rest = answer["choices"]
    for place, choice in enumerate([*rest, first]):
        choice["index"] = place
    return answer


@fault
def duplicated(answer: dict[str, Any]) -> Any:
    answer["choices"] = [answer["choices"][-1]] * 2
    return answer


@fault
def one_answer_missing(answer: dict[str, Any]) -> Any:
    answer["choices"].pop()
    return answer


@fault
def a_place_missing(answer: dict[str, Any]) -> Any:
    answer["choices"][-1]["prompt_logprobs"].pop()
    return answer


@fault
def short_lists(answer: dict[str, Any]) -> Any:
    last = entries(answer)[-1]
    for token in list(last)[2:]:
        del last[token]
    return answer


@fault
def probabilities(answer: dict[str, Any]) -> Any:
    for entry in entries(answer):
        for value in entry.values():
            value["logprob"] = math.exp(value["logprob"])
    return answer


@fault
def too_much_mass(answer: dict[str, Any]) -> Any:
    for entry in entries(answer):
        for value in entry.values():
            value["logprob"] = -0.01
    return answer


@fault
def unsorted(answer: dict[str, Any]) -> Any:
    last = entries(answer)[-1]
    by_rank = sorted(last.values(), key=lambda value: value["rank"])
    by_rank[0]["logprob"], by_rank[1]["logprob"] = by_rank[1]["logprob"] - 1.0, by_rank[0]["logprob"] - 1.0
    return answer


@fault
def no_rank(answer: dict[str, Any]) -> Any:
    del next(iter(entries(answer)[-1].values()))["rank"]
    return answer


@fault
def a_rank_of_null(answer: dict[str, Any]) -> Any:
    next(iter(entries(answer)[-1].values()))["rank"] = None
    return answer


@fault
def a_number_for_an_entry(answer: dict[str, Any]) -> Any:
    last = entries(answer)[-1]
    last[next(iter(last))] = -0.5  # type: ignore[assignment]
    return answer


@fault
def an_entry_of_null(answer: dict[str, Any]) -> Any:
    last = entries(answer)[-1]
    last[list(last)[-1]] = None  # type: ignore[assignment]
    return answer


@fault
def a_key_that_is_no_id(answer: dict[str, Any]) -> Any:
    last = entries(answer)[-1]
    last["token_id:7"] = last.pop(list(last)[-1])
    return answer


@fault
def an_id_that_is_too_large(answer: dict[str, Any]) -> Any:
    last = entries(answer)[-1]
    last["9" * 25] = last.pop(list(last)[-1])
    return answer


@fault
def a_negative_id(answer: dict[str, Any]) -> Any:
    last = entries(answer)[-1]
    last["-3"] = last.pop(list(last)[-1])
    return answer


@fault
def one_of_the_likeliest_missing(answer: dict[str, Any]) -> Any:
    """As many as were asked for, and one of them is not among the likeliest."""
    last = entries(answer)[-1]
    by_rank = sorted(last, key=lambda token: last[token]["rank"])
    for token in by_rank[1 : 1 + len(last) - TOP_K + 1]:
        del last[token]
    last["399"] = {"logprob": -30.0, "rank": 390, "decoded_token": ""}
    return answer


@fault
def not_json(answer: dict[str, Any]) -> Any:
    return b"<html>Bad gateway</html>"


@fault
def empty(answer: dict[str, Any]) -> Any:
    return b""


@fault
def a_list(answer: dict[str, Any]) -> Any:
    return [answer]


STATUSES = (408, 409, 429, 500, 502, 503, 504, 401, 404)
BROKEN = ("hung", "slow", "cut", "endless", "reset")  # of the connection
ALL = (*FAULTS, *map(str, STATUSES), *BROKEN)


class FaultServer:
    """Serves a model at an address of its own.

    >>> with FaultServer(model, tokenizer) as server:
    ...     server.faults.extend(["500", "reordered"])  # of the next two requests
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "teacher",
        max_logprobs: int = 400,
        max_model_len: int = 512,
        hangs: float = 30.0,
        port: int = 0,
    ):
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        self.max_logprobs, self.max_model_len, self.hangs = max_logprobs, max_model_len, hangs
        self.root = ""  # where its weights came from
        self.faults: deque[str] = deque()
        self.asked = Counter[str]()
        self.headers: list[dict[str, str]] = []
        self.depends_on_temperature = False
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()
        self._stops = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FaultServer:
        self._thread.start()
        return self

    start = __enter__  # for as long as this process lives

    def __exit__(self, *exception: object) -> None:
        self._stops.set()
        self._server.shutdown()
        self._server.server_close()

    def wrap(self, context: Any) -> None:
        """Speak TLS."""
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)

    # ---- what it answers -------------------------------------------------------------------------------------------

    def models(self) -> dict[str, Any]:
        card = {"id": self.name, "object": "model", "root": self.root, "max_model_len": self.max_model_len}
        return {"object": "list", "data": [card]}

    def tokenize(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"tokens": self.tokenizer(request["prompt"], add_special_tokens=False)["input_ids"]}

    def completions(self, request: dict[str, Any]) -> tuple[int, Any]:
        if request["model"] != self.name:
            return 404, error(f"The model `{request['model']}` does not exist.")
        prompts = request["prompt"] if isinstance(request["prompt"][0], list) else [request["prompt"]]
        if any(len(ids) >= self.max_model_len for ids in prompts):
            return 400, error("max_tokens must be at least 1, got 0")
        if "prompt_logprobs" not in request:
            return 200, {"model": self.name, "choices": [self.completion(request, ids) for ids in prompts]}
        count = request["prompt_logprobs"]
        if count > self.max_logprobs:
            return 400, error(
                f"Requested prompt logprobs of {count}, which is greater than max allowed: {self.max_logprobs}"
            )
        with self._lock:
            temperature = request["temperature"] if self.depends_on_temperature else 1.0
            choices = [self.scored(number, ids, count, temperature) for number, ids in enumerate(prompts)]
        return 200, {"model": self.name, "choices": choices}

    @torch.no_grad()
    def scored(self, index: int, ids: Sequence[int], count: int, temperature: float) -> dict[str, Any]:
        log_p = (self.model(torch.tensor([ids])).logits[0].float() / temperature).log_softmax(-1)
        places: list[Any] = [None]
        for place in range(1, len(ids)):
            row, own = log_p[place - 1], ids[place]
            rank = int((row >= row[own]).sum())
            places.append({str(own): {"logprob": float(row[own]), "rank": rank, "decoded_token": ""}})
            top = row.topk(count)
            for number, (value, token) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True), 1):
                places[-1][str(token)] = {"logprob": value, "rank": number, "decoded_token": ""}
        return {"index": index, "text": "", "prompt_logprobs": places, "prompt_token_ids": list(ids)}

    @torch.no_grad()
    def completion(self, request: dict[str, Any], ids: Sequence[int]) -> dict[str, Any]:
        given, found = list(ids), list[int]()
        generator = torch.Generator().manual_seed(request.get("seed") or 0)
        for _ in range(request["max_tokens"]):
            logits = self.model(torch.tensor([given + found])).logits[0, -1].float()
            if request["temperature"] == 0:
                found.append(int(logits.argmax()))
            else:
                p = (logits / request["temperature"]).softmax(-1)
                found.append(int(torch.multinomial(p, 1, generator=generator)))
            if found[-1] in request.get("stop_token_ids", ()):
                break
        return {"index": 0, "text": "", "token_ids": found}

    # ---- how it fails ----------------------------------------------------------------------------------------------

    def next_fault(self) -> str | None:
        with self._lock:
            return (self.faults.popleft() or None) if self.faults else None

    def _handler(server: FaultServer) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._send(200, server.models())

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.headers.append(dict(self.headers))
                server.asked[self.path] += 1
                if self.path == "/tokenize":
                    self._send(200, server.tokenize(request))
                    return
                server.at_once += 1
                server.most_at_once = max(server.at_once, server.most_at_once)
                try:
                    with suppress(ConnectionError):
                        self._answer(request, server.next_fault())
                finally:
                    server.at_once -= 1

            def _answer(self, request: dict[str, Any], name: str | None) -> None:
                if name in BROKEN:
                    self._break(name, request)
                elif name and name.isdecimal():
                    said = f"busy; you sent {self.headers.get('Authorization')}"
                    self._send(int(name), error(said), {"Retry-After": "0.1"} if name == "429" else {})
                else:
                    status, answer = server.completions(request)
                    self._send(status, FAULTS[name](answer) if name and status == 200 else answer)

            def _break(self, name: str, request: dict[str, Any]) -> None:
                self.close_connection = True
                if name == "slow":
                    time.sleep(0.3)
                    self._send(*server.completions(request))
                elif name == "hung":
                    server._stops.wait(server.hangs)
                elif name == "cut":
                    body = json.dumps(server.completions(request)[1]).encode()
                    self._head(200, len(body), {})
                    self.wfile.write(body[: len(body) // 2])
                elif name == "endless":
                    self._head(200, 10**12, {})
                    while not server._stops.is_set():
                        self.wfile.write(b" " * 2**20)
                # "reset": nothing at all

            def _send(self, status: int, answer: Any, headers: dict[str, str] | None = None) -> None:
                body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self._head(status, len(body), headers or {})
                self.wfile.write(body)

            def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(length)}.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


def error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "error", "param": None, "code": 0}}


def urls(servers: Iterable[FaultServer]) -> list[str]:
    return [server.url for server in servers]
