"""Asking servers: answers that cannot be true are never used, and every kind of failure is survived or named."""

from __future__ import annotations

import random
import ssl
import subprocess
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_llama, make_tokenizer
from fault_server import ALL, BROKEN, TOP_K, FaultServer

from opsd.errors import AnswerError, ConfigError, ServerError, TokenizerMismatchError
from opsd.serving.answers import Asked, TokenScores, checked
from opsd.serving.pool import Limits, ServerPool, plain_url
from opsd.serving.probe import probe
from opsd.serving.server import FAILURES, LONGEST_REST, CircuitBreaker

CANARY = Asked(tuple(range(40, 56)), 1)
QUICK = Limits(concurrency=4, connect_timeout=2.0, read_timeout=3.0, patience=40.0)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer(make_llama(3), make_tokenizer()) as server:
        yield server


def pool_of(*servers: FaultServer, limits: Limits = QUICK, **settings: Any) -> ServerPool:
    pool = ServerPool([server.url for server in servers], limits, **settings)
    probe(pool, texts={}, canary=CANARY, top_k=TOP_K)
    return pool


def sequences(count: int, seed: int = 0) -> list[Asked]:
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        ids = tuple(draw.randrange(3, 400) for _ in range(draw.randrange(3, 30)))
        found.append(Asked(ids, draw.randrange(1, len(ids))))
    return found


def truth(asked: Asked, seed: int = 3) -> TokenScores:
    with torch.no_grad():
        log_p = make_llama(seed).eval()(torch.tensor([asked.ids])).logits[0].float().log_softmax(-1)
    log_p = log_p[asked.start - 1 : -1]
    own = log_p.gather(-1, torch.tensor(asked.ids[asked.start :])[:, None])[:, 0]
    top = log_p.topk(TOP_K)
    return TokenScores(top.indices.numpy(), top.values.numpy(), own.numpy())


def same(scores: TokenScores, asked: Asked) -> bool:
    expected = truth(asked)
    return (
        np.allclose(scores.sampled_T, expected.sampled_T, atol=1e-5)
        and np.allclose(scores.logprobs_TK, expected.logprobs_TK, atol=1e-5)
        and bool((scores.ids_TK == expected.ids_TK).mean() > 0.95)
    )


def test_scores_are_those_of_the_model(server: FaultServer) -> None:
    with pool_of(server) as pool:
        asked = sequences(12)
        futures = [pool.submit("teacher", each, TOP_K) for each in asked]
        assert all(same(future.result(), each) for future, each in zip(futures, asked, strict=True))
        counts = pool.take_counts()
        assert counts.answers == counts.tries == 12 and counts.busy > 0 and not counts.problems


@pytest.mark.parametrize("name", ALL)
def test_a_fault_is_survived_and_no_wrong_number_is_used(server: FaultServer, name: str) -> None:
    with pool_of(server) as pool:
        asked = sequences(1 if name in ("hung", "endless") else 3)
        for each in asked:
            server.faults.append(name)
            start = time.monotonic()
            assert same(pool.submit("teacher", each, TOP_K).result(), each)
            assert time.monotonic() - start < 15
        counts = pool.take_counts()
        assert counts.answers == len(asked) and (counts.tries > len(asked)) == (name != "slow")


def test_a_bad_day_of_three_servers_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 500 faults of all kinds, in any order, while 200 sequences wait."""
    monkeypatch.setattr("opsd.serving.server.LONGEST_REST", 0.2)
    monkeypatch.setattr("opsd.serving.pool.LONGEST_PAUSE", 0.2)
    draw, injected = random.Random(1), 0
    with (
        FaultServer(make_llama(3), make_tokenizer(), hangs=0.4) as a,
        FaultServer(make_llama(3), make_tokenizer(), hangs=0.4) as b,
        FaultServer(make_llama(3), make_tokenizer(), hangs=0.4) as c,
    ):
        limits = replace(QUICK, patience=float("inf"), read_timeout=3.0, concurrency=8)
        with pool_of(a, b, c, limits=limits) as pool:
            for server in (a, b, c):
                faults = [*ALL, *draw.choices([name for name in ALL if name not in BROKEN], k=140)]
                injected += len(faults)
                faults += [""] * len(faults)  # every second answer is right
                draw.shuffle(faults)
                server.faults.extend(faults)
            asked = sequences(200)
            futures: list[Future[TokenScores]] = []
            while a.faults or b.faults or c.faults or not futures:
                futures += [pool.submit("teacher", each, TOP_K) for each in asked]
                assert all(same(f.result(120), each) for f, each in zip(futures[-200:], asked, strict=True))
            counts = pool.take_counts()
    assert injected >= 500 and counts.answers == len(futures)
    assert sum(counts.problems.values()) >= 500


def test_another_model_in_its_place_is_never_used(server: FaultServer) -> None:
    with pool_of(server, limits=replace(QUICK, patience=1.0)) as pool:
        server.model = make_llama(4).eval()
        (asked,) = sequences(1)
        with pytest.raises(ServerError, match="it is of another model"):
            pool.submit("teacher", asked, TOP_K).result()
        server.model = make_llama(3).eval()
        time.sleep(1.1)  # it rests
        assert same(pool.submit("teacher", asked, TOP_K).result(), asked)


def test_a_dead_server_of_three_costs_nothing_but_tries() -> None:
    with FaultServer(make_llama(3), make_tokenizer()) as a, FaultServer(make_llama(3), make_tokenizer()) as b:
        with FaultServer(make_llama(3), make_tokenizer()) as dead:
            pool = pool_of(dead, a, b)
        with pool:
            asked = sequences(30)
            futures = [pool.submit("teacher", each, TOP_K) for each in asked]
            assert all(same(future.result(), each) for future, each in zip(futures, asked, strict=True))
            assert pool.take_counts().problems["UnansweredError"] < 20  # it is let rest
            assert min(a.asked["/v1/completions"], b.asked["/v1/completions"]) > 8


def test_what_no_server_answers_is_an_error_that_says_why(server: FaultServer) -> None:
    with pool_of(server, limits=replace(QUICK, patience=0.5)) as pool:
        server.faults.extend(["503"] * 50)
        with pytest.raises(ServerError, match=r"within \d s: .*status 503: busy.*raise `patience`"):
            pool.submit("teacher", CANARY, TOP_K).result()


def test_a_request_that_is_refused_is_not_repeated(server: FaultServer) -> None:
    with pool_of(server) as pool:
        with pytest.raises(ServerError, match="refuses the request"):
            pool.submit("teacher", Asked(tuple(range(600)), 1), TOP_K).result()
        assert pool.take_counts().tries == 1


def test_the_key_is_sent_and_never_told(server: FaultServer) -> None:
    with pool_of(server, limits=replace(QUICK, patience=0.3), api_key="sk-secret") as pool:
        assert all(headers["Authorization"] == "Bearer sk-secret" for headers in server.headers)
        server.faults.extend(["401"] * 50)
        with pytest.raises(ServerError) as caught:
            pool.submit("teacher", CANARY, TOP_K).result()
        assert "you sent Bearer (the key)" in pool.trouble  # a gateway that repeats it
        server.faults.clear()
        server.faults.append("413")
        with pytest.raises(ServerError, match="you sent Bearer \\(the key\\)"):
            pool.submit("teacher", CANARY, TOP_K).result()
    assert "secret" not in "".join(traceback.format_exception(caught.value)) and "status 401" in str(caught.value)


@pytest.mark.parametrize("key", ["sk secret", "sk-sécret", "sk-\x00secret"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ServerPool(["http://a:1"], api_key=key)
    assert "secret" not in str(caught.value) and "cret" not in str(caught.value)


def test_a_line_break_behind_a_key_is_left_out(server: FaultServer) -> None:
    with pool_of(server, api_key="sk-secret\n"):
        assert server.headers[-1]["Authorization"] == "Bearer sk-secret"


def test_a_proxy_that_cannot_be_used_is_an_error_and_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "nonsense://nowhere")
    with ServerPool(["http://a:1"], QUICK) as pool, pytest.raises(ConfigError, match="Proxies come from"):
        pool.submit("teacher", CANARY, TOP_K)


def test_patience_begins_with_the_first_failure(server: FaultServer) -> None:
    """What waits behind others for its turn has not been tried."""
    with pool_of(server, limits=replace(QUICK, concurrency=1, patience=0.8)) as pool:
        server.faults.extend(["slow"] * 5 + ["503"])
        futures = [pool.submit("teacher", each, TOP_K) for each in sequences(8)]
        assert all(future.result(30) for future in futures)


def test_a_server_gets_no_more_requests_than_it_may() -> None:
    with FaultServer(make_llama(3), make_tokenizer()) as a:
        with FaultServer(make_llama(3), make_tokenizer()) as dead:
            pool = pool_of(a, dead)
        with pool:
            futures = [pool.submit("teacher", each, TOP_K) for each in sequences(40)]
            assert all(future.result(60) for future in futures)
        assert a.most_at_once <= 8  # of the probe; four of the pool


CERTIFICATES = {  # days that it is valid, whether its issuer is trusted, and what is wrong
    "valid": (1, True, None),
    "of an issuer that is not trusted": (1, False, "self-signed certificate"),
    "expired": (-1, True, "certificate has expired"),
}


@pytest.mark.parametrize("certificate", CERTIFICATES)
def test_a_certificate_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, certificate: str) -> None:
    days, is_trusted, wrong = CERTIFICATES[certificate]
    key, asked, path = (tmp_path / f"{name}.pem" for name in ("key", "request", "certificate"))
    subject = "-subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    for command in (
        f"req -newkey rsa:2048 -nodes {subject} -keyout {key} -out {asked}",
        f"x509 -req -copy_extensions copy -in {asked} -signkey {key} -out {path} -days {days}",
    ):
        subprocess.run(["openssl", *command.split()], check=True, capture_output=True)
    if is_trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(path))
    server = FaultServer(make_llama(3), make_tokenizer())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path, key)
    server.wrap(context)
    url = server.url.replace("http", "https")
    fails = pytest.raises(ServerError, match=f"certificate verify failed: {wrong}") if wrong else nullcontext()
    with server, ServerPool([url], QUICK) as pool, fails:
        assert probe(pool, texts={}, canary=CANARY, top_k=TOP_K).model == "teacher"


def test_memory_stays_bounded(server: FaultServer) -> None:
    """What waits is ids; what has come is numbers."""
    with pool_of(server) as pool:
        futures = [pool.submit("teacher", each, TOP_K) for each in sequences(300)]
        assert all(future.result(60) for future in futures)
        assert max(server.most_at_once, 1) <= QUICK.concurrency


# ---- the probe -------------------------------------------------------------------------------------------------------


def test_the_probe_says_what_is_served(server: FaultServer) -> None:
    tokenizer = make_tokenizer()
    texts = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a hint", " 12 + 7")}
    with ServerPool([server.url], QUICK) as pool:
        facts = probe(pool, texts=texts, canary=CANARY, top_k=TOP_K)
    assert facts.model == "teacher" and facts.max_length == 511 and facts.compared_tokens and facts.noise < 1e-4
    assert str(facts).startswith("'teacher', prompts up to 511 tokens; identical requests differ by ")


def test_each_mismatch_names_the_way_out(server: FaultServer) -> None:
    def tried(**changes: Any) -> None:
        with ServerPool([server.url], QUICK) as pool:
            probe(pool, **{"texts": {}, "canary": CANARY, "top_k": TOP_K, **changes})

    with pytest.raises(ConfigError, match=r"serves teacher, and not 'other'.*--served-model-name"):
        tried(model="other")
    server.max_logprobs = 5
    with pytest.raises(ServerError, match=r"--max-logprobs 6.*greater than max allowed: 5"):
        tried()
    server.max_logprobs = 400
    with pytest.raises(TokenizerMismatchError, match="becomes"):
        tried(texts={"a hint": [1, 2, 3]})
    server.depends_on_temperature = True
    with pytest.raises(ConfigError, match="--logprobs-mode raw_logprobs"):
        tried()


def test_servers_of_different_models_are_refused(server: FaultServer) -> None:
    with FaultServer(make_llama(4), make_tokenizer()) as other, pytest.raises(ConfigError, match="the same model"):
        pool_of(server, other)


def test_a_server_that_is_not_there_is_named() -> None:
    with ServerPool(["http://127.0.0.1:9"], QUICK) as pool, pytest.raises(ServerError, match=r"127\.0\.0\.1:9 did not"):
        probe(pool, texts={}, canary=CANARY, top_k=TOP_K)


# ---- small parts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ("http://a:8000", "http://a:8000"), ("http://a:8000/", "http://a:8000"), ("https://a/v1/", "https://a"),
        ("http://a/behind/a/proxy/v1", "http://a/behind/a/proxy"),
    ],
)  # fmt: skip
def test_an_address_is_read_without_its_path(given: str, plain: str) -> None:
    assert plain_url(given) == plain


@pytest.mark.parametrize(
    "url",
    ["a:8000", "ftp://a", "http://", "http://a:port", "http://user:word@a", "http://u:word@a:80b", "", "http://[a"],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plain_url(url)
    assert "word" not in str(caught.value).replace("password", "")


def test_a_server_rests_longer_with_every_failure_and_is_then_tried_once() -> None:
    breaker = CircuitBreaker()
    for _ in range(FAILURES):
        assert breaker.lets_through(0.0, load=5)
        breaker.failed(0.0, sent=0.0)
    for _ in range(20):
        breaker.failed(0.1, sent=0.0)  # sent before it rested, and one failure with the others
    assert not breaker.lets_through(0.9, 0) and breaker.lets_through(1.0, 0) and not breaker.lets_through(1.0, 1)
    breaker.failed(1.0, sent=1.0)
    assert breaker.opens_at == 3.0
    for number in range(2000):  # a night
        breaker.failed(100.0 * number, sent=100.0 * number)
    assert breaker.opens_at - 100.0 * 1999 == LONGEST_REST
    breaker.succeeded()
    assert breaker.lets_through(0.0, 5)


@pytest.mark.parametrize(
    ("ids", "logprobs", "own", "match"),
    [
        ([[1, 2]], [[-0.5, -1.5]], [-0.5], None),
        ([[1, 2]], [[-1.5, -0.5]], [-0.5], "not sorted"),
        ([[1, 1]], [[-0.5, -1.5]], [-0.5], "twice"),
        ([[1, 2]], [[-0.5, -1.5]], [np.nan], "not finite"),
        ([[1, 2]], [[-0.5, -np.inf]], [-0.5], "not finite"),
        ([[1, 2]], [[0.5, -1.5]], [-0.5], "none is above 0"),
        ([[1, 2]], [[-0.1, -0.2]], [-0.5], "of the probability together"),
        ([[1]], [[-0.1]], [-0.5], "and 2 were asked for"),
    ],
)
def test_scores_that_cannot_be_true_are_refused(ids: Any, logprobs: Any, own: Any, match: str | None) -> None:
    scores = TokenScores(np.array(ids), np.array(logprobs, dtype=np.float32), np.array(own, dtype=np.float32))
    if match is None:
        assert checked(scores, 2) is scores
        return
    with pytest.raises(AnswerError, match=match):
        checked(scores, 2)
