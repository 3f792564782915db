"""A server of each number format: does the client keep it busy, and how far are its scores from the model's own?

Run:     opsd serve M --top_k 64 --dtype float32 --cpu --exec      # in another terminal, where vLLM is installed
         python benchmarks/served.py M --dtype float32 [--url http://127.0.0.1:8000] [--top_k 64]
Writes:  its format's part of benchmarks/results/served.json
Takes:   five minutes on two cores

Speed is tokens per second through ServedTeacher's pool over those of a bare client, which posts the very same
requests, as many at a time, and throws the answers away: no parsing, no checks. Rounds of both in turn; the ratio is
that of their medians. The distance is that of log-probabilities of rollouts' tokens from the same model in float32 in
this process.
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
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import httpx2  # noqa: E402
import torch  # noqa: E402

from opsd.commands.demo_tasks import arithmetic  # noqa: E402
from opsd.contexts.renderer import PromptRenderer  # noqa: E402
from opsd.models.loading import load_model  # noqa: E402
from opsd.rollouts import Rollouts  # noqa: E402
from opsd.serving.answers import Asked  # noqa: E402
from opsd.serving.pool import Limits, ServerPool  # noqa: E402
from opsd.serving.probe import probe  # noqa: E402
from opsd.serving.protocol import VLLMProtocol  # noqa: E402
from opsd.teachers import SameCheckpointTeacher, ServedTeacher, StudentHandle, Teacher  # noqa: E402
from opsd.training.machine import hardware  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "served.json"
CANARY = Asked(tuple(range(100, 112)), 1)
ROUNDS = 3
SEQUENCES, TOKENS, VOCABULARY = 48, 256, 40_000
ROWS, LONGEST = 32, 48  # rollouts whose scores are compared


# ---- speed ----------------------------------------------------------------------------------------------------------


def sequences(count: int, seed: int) -> list[Asked]:
    """Return sequences of random ids, the last half of which is scored."""
    draw = random.Random(seed)
    return [Asked(tuple(draw.randrange(100, VOCABULARY) for _ in range(TOKENS)), TOKENS // 2) for _ in range(count)]


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


def speed(url: str, top_k: int) -> dict[str, Any]:
    """Time both clients, round by round."""
    limits = Limits()
    with ServerPool([url], limits) as pool:
        model = probe(pool, texts={}, canary=CANARY, top_k=top_k).model
        seconds: dict[str, list[float]] = {"pool": [], "bare": []}
        through_pool(pool, model, sequences(8, 99), top_k)  # warms up
        for number in range(ROUNDS):
            asked = sequences(SEQUENCES, number)
            seconds["pool"].append(through_pool(pool, model, asked, top_k))
            seconds["bare"].append(asyncio.run(bare(pool.urls[0], model, asked, top_k, limits.concurrency)))
    rates = {name: SEQUENCES * TOKENS / statistics.median(values) for name, values in seconds.items()}
    return {"seconds": seconds, "tokens_per_second": rates, "ratio": rates["pool"] / rates["bare"]}


# ---- distance -------------------------------------------------------------------------------------------------------


def distance(model: str, url: str, top_k: int) -> dict[str, Any]:
    """Score rollouts here and there; returns the distances in nats per token, and how far identical requests differ."""
    weights, tokenizer = load_model(model, dtype="float32")
    student = StudentHandle(weights.eval(), PromptRenderer(tokenizer))
    rows = arithmetic(ROWS, 7)
    prompts = [student.renderer.ids(row["prompt"]) for row in rows]
    sampled = student.complete(prompts, max_new_tokens=LONGEST, batch_size=ROWS, do_sample=True, seed=1)
    rollouts, ids = Rollouts(rows, prompts, sampled), torch.tensor([token for each in sampled for token in each])
    there = ServedTeacher(url, top_k=top_k, context="answer_only")

    def logprobs(teacher: Teacher) -> torch.Tensor:
        teacher.prepare(student)
        rendered = teacher.prompts.render(rollouts)
        teacher.expect(rendered)
        with torch.no_grad():
            return teacher.score(rendered).logprobs(ids)

    gap = (logprobs(SameCheckpointTeacher(context="answer_only")) - logprobs(there)).abs()
    noise = there.facts.noise
    return {"tokens": len(gap), "mean": float(gap.mean()), "most": float(gap.max()), "identical_requests": noise}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what is served")
    parser.add_argument("--dtype", required=True, help="of the server")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--top_k", type=int, default=64)
    options = parser.parse_args()
    record = {
        "hardware": hardware(), "model": Path(options.model).name, "top_k": options.top_k,
        "sequences": SEQUENCES, "tokens": TOKENS, "concurrency": Limits().concurrency,
        "distance": distance(options.model, options.url, options.top_k), "speed": speed(options.url, options.top_k),
    }  # fmt: skip
    print(json.dumps(record, indent=1))
    records = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    RESULT.write_text(json.dumps(records | {options.dtype: record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
