"""Does the client keep a server busy? Tokens per second through ServedTeacher's pool over those of a bare client.

Run:     opsd serve M --top_k 64 --dtype float32 --cpu --exec      # in another terminal, where vLLM is installed
         python benchmarks/served.py --url http://127.0.0.1:8000 [--top_k 64] [--sequences 48] [--tokens 256]
Writes:  benchmarks/results/served.json
Takes:   five minutes on two cores

The bare client posts the very same requests, as many at a time, and throws the answers away: no parsing, no checks.
Rounds of both in turn; the ratio is that of their medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import httpx2  # noqa: E402

from opsd.serving.answers import Asked  # noqa: E402
from opsd.serving.pool import Limits, ServerPool  # noqa: E402
from opsd.serving.probe import probe  # noqa: E402
from opsd.serving.protocol import VLLMProtocol  # noqa: E402
from opsd.training.machine import hardware  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "served.json"
CANARY = Asked(tuple(range(100, 112)), 1)
ROUNDS = 3
VOCABULARY = 40_000


def sequences(count: int, tokens: int, seed: int) -> list[Asked]:
    """Return sequences of random ids, the last half of which is scored."""
    draw = random.Random(seed)
    return [Asked(tuple(draw.randrange(100, VOCABULARY) for _ in range(tokens)), tokens // 2) for _ in range(count)]


def through_pool(pool: ServerPool, model: str, asked: list[Asked], top_k: int) -> float:
    """Return the seconds that the pool takes."""
    start = time.perf_counter()
    for future in [pool.submit(model, each, top_k) for each in asked]:
        future.result()
    return time.perf_counter() - start


async def bare(url: str, model: str, asked: list[Asked], top_k: int, concurrency: int) -> float:
    """Return the seconds that posting takes."""
    protocol, slots = VLLMProtocol(), asyncio.Semaphore(concurrency)
    bodies = [protocol.body(model, [CANARY, each], top_k) for each in asked]
    limits = httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with httpx2.AsyncClient(timeout=600, limits=limits) as client:

        async def post(body: bytes) -> None:
            async with slots:
                headers = {"Content-Type": "application/json"}
                (await client.post(url + protocol.path, content=body, headers=headers)).raise_for_status()

        start = time.perf_counter()
        await asyncio.gather(*map(post, bodies))
        return time.perf_counter() - start


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--top_k", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    limits = Limits()
    with ServerPool([options.url], limits) as pool:
        facts = probe(pool, texts={}, canary=CANARY, top_k=options.top_k)
        seconds: dict[str, list[float]] = {"pool": [], "bare": []}
        through_pool(pool, facts.model, sequences(8, options.tokens, 99), options.top_k)  # warms up
        for number in range(ROUNDS):
            asked = sequences(options.sequences, options.tokens, number)
            seconds["pool"].append(through_pool(pool, facts.model, asked, options.top_k))
            posting = bare(pool.urls[0], facts.model, asked, options.top_k, limits.concurrency)
            seconds["bare"].append(asyncio.run(posting))
    tokens = options.sequences * options.tokens
    rates = {name: tokens / statistics.median(values) for name, values in seconds.items()}
    ratio = rates["pool"] / rates["bare"]
    print(f"pool {rates['pool']:,.0f} tokens/s, bare client {rates['bare']:,.0f}: {ratio:.1%} (rounds: {seconds})")
    record = {
        "hardware": hardware(), "server": str(facts), "top_k": options.top_k, "sequences": options.sequences,
        "tokens": options.tokens, "concurrency": limits.concurrency, "seconds": seconds, "ratio": ratio,
    }  # fmt: skip
    RESULT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
