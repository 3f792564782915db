"""A teacher on a server, such as vLLM: it lists its likeliest tokens, and scores while the student trains.

Rollouts are sent when they exist, and their scores are collected when a micro-batch needs them. Knows rollouts and
servers; how a server is asked is serving/'s.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opsd.errors import CheckpointError, ConfigError, ServerError, not_one_of
from opsd.models.forward import embedded_tokens, last_hidden
from opsd.models.generation import stop_ids_of
from opsd.models.head import Head
from opsd.rollouts import Ids, Rollouts
from opsd.serving.answers import Asked, TokenScores
from opsd.serving.pool import Canary, Limits, ServerPool
from opsd.serving.probe import LEAST_TOLERANCE, ServerFacts, probe
from opsd.signals import TOP_K, TopKSignal
from opsd.teachers.checks import check_state_keys
from opsd.teachers.listing import ListingTeacher
from opsd.teachers.prompting import ContextLike, Row
from opsd.teachers.student import StudentHandle
from opsd.teachers.tokenizers import PROBES
from opsd.teachers.weight_copy import adapter_off

ON_FAILURE = ("stop", "wait", "drop")
API_KEY = "OPSD_API_KEY"
NEUTRAL = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}  # sampling from the whole distribution
REMINDS = 60.0  # seconds of waiting after which it is said again
MOST_LOST = 64  # rollouts in a row that `drop` leaves out
CANARY_TOKENS = 32


class ServedTeacher(ListingTeacher):
    """A model behind an OpenAI-compatible server of vLLM, which scores the student's tokens by their ids.

    The server lists the `top_k` likeliest tokens of every place, so that a divergence is computed over these
    (`support: teacher_top_k`), or at the sampled token alone.

    Args:
        url: of the server, or several that serve the same model: the least loaded is asked first.
        top_k: likeliest tokens that are asked for, as many as `support_k`. The server must be started with
            `--max-logprobs` of at least that.
        model: its name on the server; None where that serves one.
        on_failure: where a rollout cannot be scored: "stop" saves a checkpoint and ends the run, "wait" waits for as
            long as it takes, "drop" leaves the rollout out of the loss, which is counted.
        concurrency: requests to one server at a time.
        connect_timeout: seconds.
        read_timeout: seconds until the whole of an answer is there.
        patience: seconds of tries after which a rollout cannot be scored.
        api_key_env: name of the environment variable that holds the server's key, if it asks for one.
        context: what its prompt contains beside the student's.

    Raises:
        ConfigError: settings that cannot work.

    Example:
        >>> teacher = ServedTeacher("http://gpu-1:8000", context="worked_solution")
        >>> OPSDTrainer(model, teacher, args=OPSDConfig(support="teacher_top_k"), train_dataset=rows)
    """

    strategy = "served"

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        top_k: int = TOP_K,
        model: str | None = None,
        on_failure: str = "stop",
        concurrency: int = 16,
        connect_timeout: float = 5.0,
        read_timeout: float = 120.0,
        patience: float = 300.0,
        api_key_env: str = API_KEY,
        context: ContextLike = None,
    ):
        super().__init__(context=context)
        if on_failure not in ON_FAILURE:
            raise ConfigError(not_one_of("on_failure", on_failure, ON_FAILURE))
        numbers = {
            "top_k": top_k, "concurrency": concurrency, "connect_timeout": connect_timeout,
            "read_timeout": read_timeout, "patience": patience,
        }  # fmt: skip
        for name, value in numbers.items():
            whole = name in ("top_k", "concurrency")
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not value > 0:
                raise ConfigError(f"{name} is {value!r}, and must be {'a whole' if whole else 'a'} number above 0.")
        self.url = [url] if isinstance(url, str) else list(url)
        if not self.url:
            raise ConfigError("a served teacher has no server: `url` is empty. Give its address, http://host:8000.")
        self.top_k, self.model, self.on_failure = top_k, model, on_failure
        self._patience = float("inf") if on_failure == "wait" else patience
        limits = Limits(concurrency, connect_timeout, read_timeout, self._patience)
        self._pool = ServerPool(self.url, limits, api_key=os.environ.get(api_key_env))
        self.url = self._pool.urls
        self._facts: ServerFacts | None = None
        self._drift = np.zeros(1, np.float32)  # of the canary's scores from the same weights here, where these are here
        self._pending: dict[Asked, Future[TokenScores]] = {}
        self._settled: dict[Asked, TokenScores] = {}  # of the micro-batch that is scored next
        self._lost = set[Asked]()  # of this generation batch
        self._waited, self._reminded, self._lost_in_a_row = 0.0, 0.0, 0

    def prepare(self, student: StudentHandle) -> None:
        """Ask the servers about themselves.

        Raises:
            ServerError: one does not answer.
            ConfigError: they do not serve what is needed.
            TokenizerMismatchError: they split texts otherwise than the student.
        """
        super().prepare(student)
        tokenizer = student.tokenizer
        texts = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROBES}
        self.top_k = min(self.top_k, embedded_tokens(student.model))
        canary = Asked(tuple([token for ids in texts.values() for token in ids][:CANARY_TOKENS]), 1)
        self._facts = probe(self._pool, model=self.model, texts=texts, canary=canary, top_k=self.top_k)
        if self._facts.source and self._facts.source == getattr(student.model.config, "_name_or_path", None):
            self._drift = np.abs(self.canary.scores.sampled_T - _logprobs_here(student, canary))

    @property
    def facts(self) -> ServerFacts:
        """What the servers said of themselves; once prepared."""
        _ = self.student
        assert self._facts is not None
        return self._facts

    @property
    def canary(self) -> Canary:
        """The text that is sent with every request, and its scores; once prepared."""
        assert self._pool.canary is not None
        return self._pool.canary

    # ---- scoring ---------------------------------------------------------------------------------------------------

    def expect(self, rollouts: Rollouts) -> None:
        """Send a generation batch to the servers; `settle` and `score` collect what they say."""
        self._settled.clear()
        self._lost.clear()
        for asked, future in list(self._pending.items()):
            if future.done():  # of a batch that broke off
                del self._pending[asked]
        self._begin(self.asked(rollouts).values())

    def settle(self, rollouts: Rollouts, seconds: float) -> Rollouts | None:
        """Wait for the scores of a micro-batch, and leave out rollouts that have none, where that is allowed.

        Raises:
            ServerError: a rollout could not be scored, and `on_failure` is "stop"; or none of many could.
        """
        until, asked = time.monotonic() + seconds, self.asked(rollouts)
        self._begin(asked.values())
        is_lost = [False] * len(rollouts)
        for row, each in asked.items():
            try:
                if each not in self._lost and not self._collect(each, until - time.monotonic()):
                    return None
            except ServerError as error:
                self._lose(each, error)
            is_lost[row] = each in self._lost
        return rollouts.without_scores(is_lost)

    def score(self, rollouts: Rollouts) -> TopKSignal:
        """Return the likeliest tokens of every scored token.

        Raises:
            ServerError: a rollout could not be scored.
        """
        asked = set(self.asked(rollouts).values())
        self._begin(asked)
        signal = super().score(rollouts)
        for each in asked:
            self._settled.pop(each, None)
        return signal

    def scores_of(self, asked: Asked) -> TokenScores:
        """Return the scores of a sequence that was begun; raises as `score`."""
        while not self._collect(asked, REMINDS):
            continue
        return self._settled[asked]

    def _begin(self, sequences: Iterable[Asked]) -> None:
        for asked in sequences:
            if asked not in self._settled and asked not in self._pending and asked not in self._lost:
                self._pending[asked] = self._pool.submit(self.facts.model, asked, self.top_k)

    def _collect(self, asked: Asked, seconds: float) -> bool:
        """Wait for a sequence for so long; returns whether its scores are there."""
        if asked in self._settled:
            return True
        self._lost.discard(asked)  # whoever asks again asks anew
        self._begin([asked])
        start = time.monotonic()
        try:
            self._settled[asked] = self._pending[asked].result(max(seconds, 0.0))
        except FutureTimeoutError:
            if start - self._reminded >= REMINDS:
                self._reminded = start
                print(f"teacher     waiting for a server: {self._pool.trouble}", flush=True)
            return False
        except ServerError:
            del self._pending[asked]
            raise
        finally:
            self._waited += time.monotonic() - start
        del self._pending[asked]
        self._lost_in_a_row, self._reminded = 0, time.monotonic()
        return True

    def _lose(self, asked: Asked, error: ServerError) -> None:
        """Count a rollout that has no score; raises where that is not allowed."""
        if self.on_failure != "drop":
            raise error
        self._lost.add(asked)
        self._lost_in_a_row += 1
        if self._lost_in_a_row >= MOST_LOST:
            raise ServerError(
                f"{self._lost_in_a_row} rollouts in a row have no score of the teacher: its servers are gone. The last "
                f"one: {error}"
            ) from error
        print(f"teacher     a rollout is left out of the loss: {error}", flush=True)

    # ---- descriptions, and sampling --------------------------------------------------------------------------------

    @property
    def can_fail(self) -> bool:
        """A server can."""
        return True

    @property
    def noise(self) -> float:
        """By how much the servers' answers to one request differ."""
        return self.facts.noise

    @property
    def max_length(self) -> int | None:
        """Tokens that the servers take."""
        return self.facts.max_length

    @property
    def settings(self) -> dict[str, Any]:
        """What is asked for, and of which model; the servers' addresses may change."""
        return {"top_k": self.top_k, "model": self._facts.model if self._facts else self.model}

    @property
    def metrics(self) -> Mapping[str, float]:
        """Of this process, since the last step: seconds that it waited, and the share of scoring that was hidden."""
        counts = self._pool.take_counts()
        waited, self._waited = self._waited, 0.0
        values = {"served/waited": waited, "served/tries": counts.tries / max(counts.answers, 1)}
        if counts.busy:
            values["served/hidden"] = max(0.0, 1.0 - waited / counts.busy)
        return values

    def describe(self) -> str:
        """Return which servers are asked for what."""
        return f"served at {', '.join(self.url)}: {self._facts or 'not asked yet'}; {self.top_k} likeliest tokens"

    def state_dict(self) -> dict[str, Tensor]:
        """Return the scores of the canary, by which a resumed run knows the model again."""
        return {"canary": torch.from_numpy(self.canary.scores.sampled_T)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Compare the model that is served now with that of the checkpoint.

        Raises:
            CheckpointError: it is another one.
        """
        check_state_keys(state, ["canary"], self.strategy)
        distance = float((state["canary"] - torch.from_numpy(self.canary.scores.sampled_T)).abs().mean())
        if distance > self.canary.tolerance:
            raise CheckpointError(
                "the servers have another model than when the checkpoint was written: a text that was scored then "
                f"differs by {distance:.3g} nats per token. The run would go on with another teacher. Serve the first."
            )

    @property
    def cautions(self) -> list[str]:
        """Says so where a server's rounding hides other models, or is part of what is taught."""
        found = []
        if self._facts and self.canary.tolerance > LEAST_TOLERANCE:
            found.append(
                f"the servers' answers to one request differ by {self.noise:.2g} nats per token: another model in the "
                f"teacher's place is noticed only where it differs by {self.canary.tolerance:.2g}. float32 (--dtype) "
                "is exact."
            )
        if self._drift.mean() > LEAST_TOLERANCE:
            found.append(
                f"the servers' log-probabilities of a text differ from those of the same weights here by "
                f"{self._drift.mean():.2g} nats per token, {self._drift.max():.2g} at most, as bfloat16's do: the loss "
                "contains this difference. Serve the teacher in float32 (--dtype float32)."
            )
        return found

    def sample(
        self,
        rows: Sequence[Row],
        *,
        max_new_tokens: int,
        do_sample: bool = False,
        temperature: float = 1.0,
        seed: int | None = None,
        **settings: Any,
    ) -> list[Ids]:
        """Return the served model's own completions, one per row."""
        prompts = [self.prompts.ids(row) for row in rows]
        stops = stop_ids_of(self.student.model, self.student.tokenizer)
        # All said: a server's own defaults may be those that a model's authors recommend.
        asked = {name: settings.get(name) or neutral for name, neutral in NEUTRAL.items()}
        asked |= {"temperature": temperature if do_sample else 0.0, "stop_token_ids": sorted(stops)}
        seeds = [{} if seed is None else {"seed": seed + number} for number in range(len(prompts))]
        each = [{**asked, **own} for own in seeds]
        return self._pool.sample(self.facts.model, prompts, max_new_tokens, each)


@torch.no_grad()
def _logprobs_here(student: StudentHandle, asked: Asked) -> np.ndarray:
    """Return log p of a sequence's scored tokens under the weights that the student began with, in nats."""
    ids, model = torch.tensor([asked.ids], device=student.device), student.model
    at = torch.arange(asked.start - 1, len(asked.ids) - 1, device=student.device)
    with adapter_off(model) if hasattr(model, "disable_adapter") else nullcontext():
        hidden_TD = last_hidden(model, ids, torch.zeros_like(at), at)
        logprobs_TV = Head.from_model(model).logits(hidden_TD).float().log_softmax(-1)
    return logprobs_TV.gather(1, ids[0, at + 1, None])[:, 0].cpu().numpy()
