"""The slow twin of a whole run: what its steps must log, computed again in float64 from their rollouts alone.

The twin is given the completions that were sampled and the student's weights before each step. Prompts, masks, groups,
the teacher's weights, the loss, its gradient and every logged mean are computed here from their definitions; of opsd
it uses the records that `losses_twin` reads, and nothing that a run goes through.

Shapes: N scored tokens of all rows · V vocabulary.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from conftest import make_tokenizer
from losses_twin import Problem, reference
from run_combinations import (
    CONTEXTS,
    EVAL_BATCHES,
    SELF_TEACHERS,
    STEPS,
    VOCABULARY,
    Batch,
    Combination,
    Recorder,
    Row,
    Weights,
    build,
    question,
    reward,
    sibling_model,
)
from torch import Tensor

from opsd.losses import Tokens
from opsd.models.head import Head
from opsd.signals import HiddenSignal, MixtureSignal

LENGTH = "completions/mean_length"
SCHEDULED = {"lmbda_schedule": "lmbda", "completion_length_schedule": "completions/limit"}
# The largest |logged - recomputed| / (1 + |recomputed|) of a mean over tokens, and of the gradient's norm. In bfloat16
# a token or entry at the border of a choice (top-k, keep_fraction, a gate, a clip) may fall on the other side.
BOUNDS = {"float32": (1e-4, 1e-4), "bfloat16": (3e-2, 5e-2), "bfloat16, tokens or entries chosen": (1e-1, 2e-1)}


@dataclass
class Expected:
    """What one step, or one batch of an evaluation, must add to the log.

    Args:
        tokens: scored tokens.
        sums: over these tokens, by name.
        largest: the largest divergence of a token.
        gradient_norm: of a step.
        of_rows: values of single rows by name, NaN where there is none.
    """

    tokens: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    largest: float = -math.inf
    gradient_norm: float = 0.0
    of_rows: dict[str, list[float]] = field(default_factory=dict)


def entry_of(records: Sequence[Expected]) -> dict[str, float]:
    """Return the log entry of several steps or batches: every mean over all tokens, or over all rows."""
    tokens = sum(record.tokens for record in records)
    names = {name for record in records for name in record.sums}
    entry = {name: sum(record.sums.get(name, 0.0) for record in records) / max(tokens, 1) for name in names}
    for name in {name for record in records for name in record.of_rows}:
        values = [value for record in records for value in record.of_rows.get(name, ()) if not math.isnan(value)]
        entry[name] = fmean(values) if values else 0.0
        if name == LENGTH:
            entry[LENGTH.replace("mean", "min")], entry[LENGTH.replace("mean", "max")] = min(values), max(values)
    return {**entry, "divergence/max": max(0.0 if tokens == 0 else record.largest for record in records)}


class Twin:
    """Recomputes a run's log in float64.

    Args:
        combination: what was run.
        trainer: the run, ended; its settings, tokenizer, first weights and records are read.
        model: a copy of its student from before training.
    """

    def __init__(self, combination: Combination, trainer: Recorder, model: torch.nn.Module):
        self.combination, self.trainer, self.args = combination, trainer, trainer.args
        self.model = model.double().eval()
        self.tokenizer = make_tokenizer(VOCABULARY)
        self.end = self.tokenizer.eos_token_id
        self.loaded: Weights | None = None
        self.past = {batch.step: batch.weights for batch in (*trainer.batches, *trainer.eval_batches)}
        self.other = sibling_model(combination.seed).double().eval()

    # -- prompts

    def prompt(self, turns: Sequence[tuple[str, str]]) -> list[int]:
        text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
        return self.tokenizer(text + "<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]

    def readings(self, row: Row, step: int, begun: int) -> list[tuple[float, Weights | None, str]]:
        """The weight, the teacher's weights (None for the sibling model) and the context of each part for a row."""
        c = self.combination
        of = [SELF_TEACHERS[part][1](step, begun, self.past) for part in c.parts]
        if c.teacher == "sibling model":
            return [(1.0, None, c.context)]
        if c.teacher == "two weights":
            return [(0.4, of[0], c.context), (0.6, of[1], "answer")]
        if c.teacher == "two contexts":
            return [(0.3, of[0], c.context), (0.7, of[0], "answer")]
        if c.teacher == "pushed away":
            return [(1.5, of[0], c.context), (-0.5, of[1], "none")]
        if c.teacher == "route":
            return [(1.0, of[0], c.context) if row["domain"] == "even" else (1.0, of[1], "answer")]
        return [(1.0, SELF_TEACHERS[c.teacher][1](step, begun, self.past), c.context)]

    # -- passes

    def hidden(self, weights: Weights | None, prompt: list[int], completion: list[int], places: list[int]) -> Tensor:
        """The last hidden states that predict the tokens at `places` of a completion, one row, without padding."""
        model = self.other if weights is None else self.model
        if weights is not None and weights is not self.loaded:
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if name in weights:
                        p.copy_(weights[name])
            self.loaded = weights
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        states = inner.base_model(input_ids=torch.tensor([prompt + completion]), use_cache=False).last_hidden_state
        return states[0, [len(prompt) - 1 + place for place in places]]

    def head(self, weights: Weights | None) -> Tensor:
        model = self.other if weights is None else self.model
        return model.get_output_embeddings().weight

    @torch.no_grad()
    def logits(self, weights: Weights | None, prompt: list[int], completion: list[int], places: list[int]) -> Tensor:
        return self.hidden(weights, prompt, completion, places) @ self.head(weights).T

    # -- rows

    def mask(self, row: Row, completion: list[int]) -> list[bool]:
        args, left_out = self.args, {self.tokenizer.convert_tokens_to_ids(t) for t in self.args.mask_tokens or []}
        return [
            place >= args.skip_first_tokens
            and (args.first_tokens_only is None or place < args.first_tokens_only)
            and not (args.mask_truncated_completions and completion[-1] != self.end)
            and token not in left_out
            and self.row_weight(row) > 0
            for place, token in enumerate(completion)
        ]

    def row_weight(self, row: Row) -> float:
        return 1.0 if self.args.pass_rate_column is None else 4 * row["rate"] * (1 - row["rate"])

    def groups(self, batch: Batch) -> dict[str, list[Any]]:
        """Per row: the fields for its context, whether it is distilled, its advantage; and the rewards."""
        count, size = len(batch.rows), self.args.num_generations
        if self.combination.groups == "single":
            return {"fields": [{}] * count, "distilled": [True] * count, "advantage": [0.0] * count, "reward": []}
        rewards = reward(batch.completions)
        texts = self.tokenizer.batch_decode(batch.completions, skip_special_tokens=True)
        result: dict[str, list[Any]] = {"fields": [], "distilled": [], "advantage": [], "reward": rewards}
        for n in range(count):
            group = [m for m in range(n - n % size, min(n - n % size + size, count))
                     if batch.rows[m]["prompt"] == batch.rows[n]["prompt"]]  # fmt: skip
            right = [m for m in group if rewards[m] >= 1 and m != n]
            fields = {"sibling": texts[right[0]].strip()} if right else {}
            chosen = {"all": True, "wrong": rewards[n] < 1, "right": rewards[n] >= 1}[self.args.distill_on]
            contexts = [CONTEXTS[name] for *_, name in self.readings(batch.rows[n], 0, 0)]
            chosen = chosen and all(context.turns(batch.rows[n], fields) is not None for context in contexts)
            values = [rewards[m] for m in group]
            reinforced = self.args.grpo_coef > 0 and not (self.args.grpo_on == "undistilled" and chosen)
            is_flat = len(set(values)) <= 1
            advantage = 0.0 if is_flat else (rewards[n] - fmean(values)) / (stdev(values) + 1e-4)
            result["fields"].append(fields)
            result["distilled"].append(chosen)
            result["advantage"].append(self.args.grpo_coef * advantage if reinforced else 0.0)
        return result

    # -- a step

    def expected(self, batch: Batch, *, trains: bool) -> Expected:
        """Return what a step, or a batch of an evaluation, must log."""
        graded = self.groups(batch)
        masks = [
            mask if graded["distilled"][n] or graded["advantage"][n] else [False] * len(mask)
            for n, mask in enumerate(map(self.mask, batch.rows, batch.completions))
        ]
        scored = [(n, [p for p, used in enumerate(mask) if used]) for n, mask in enumerate(masks) if any(mask)]
        total = sum(len(places) for _, places in scored)
        record = Expected(total, dict.fromkeys(("loss", "divergence", "entropy"), 0.0))
        for setting, name in SCHEDULED.items() if trains else ():
            if schedule := self.combination.settings.get(setting):
                record.of_rows[name] = [float([schedule[step] for step in sorted(schedule) if step <= batch.step][-1])]
        sampled = batch.completions[: batch.on_policy]
        if sampled:
            record.of_rows[LENGTH] = [float(len(ids)) for ids in sampled]
            record.of_rows["completions/clipped_ratio"] = [float(ids[-1] != self.end) for ids in sampled]
            ended = [float(len(ids)) for ids in sampled if ids[-1] == self.end]
            record.of_rows["completions/mean_terminated_length"] = ended
        if graded["reward"]:
            record.of_rows |= {"reward": graded["reward"], "group/distilled": graded["distilled"]}
            record.of_rows["group/right"] = [float(value >= 1) for value in graded["reward"]]
        if total:
            self._add_loss(record, batch, graded, scored, trains)
        return record

    def _add_loss(
        self, record: Expected, batch: Batch, graded: dict[str, list[Any]], scored: list[Any], trains: bool
    ) -> None:
        begun = batch.step if trains else max(batch.step - 1, 0)
        columns: dict[str, list[Any]] = {name: [] for name in ("ids", "row", "weight", "advantage", "distilled")}
        states, parts, start = list[Tensor](), list[list[Tensor]](), list[Tensor]()
        contrast: list[list[Tensor]] = []
        shares: list[float] = []
        for n, places in scored:
            row, ids = batch.rows[n], batch.completions[n]
            plain = self.prompt([("user", question(row))])
            readings = self.readings(row, batch.step, begun)
            shares = [share for share, *_ in readings]
            turns = [CONTEXTS[name].turns(row, graded["fields"][n]) for *_, name in readings]
            prompts = [plain if each is None else self.prompt(each) for each in turns]  # None is not distilled
            parts.append(
                [self.logits(w, prompt, ids, places) for (_, w, _), prompt in zip(readings, prompts, strict=True)]
            )
            start.append(self.logits(self.past[0], plain, ids, places))
            turns = CONTEXTS["shipped"].turns(row, {})
            contrast.append([self.logits(w, self.prompt(turns), ids, places) for _, w, _ in readings])
            columns["ids"] += [ids[p] for p in places]
            columns["row"] += [n] * len(places)
            columns["weight"] += [self.row_weight(row) / record.tokens] * len(places)
            columns["advantage"] += [graded["advantage"][n]] * len(places)
            columns["distilled"] += [float(graded["distilled"][n])] * len(places)
        with torch.enable_grad():
            for n, places in scored:
                plain = self.prompt([("user", question(batch.rows[n]))])
                states.append(self.hidden(batch.weights, plain, batch.completions[n], places))
            hidden_ND = torch.cat(states)
        kind = "geometric" if self.combination.teacher in ("two contexts", "pushed away") else "arithmetic"

        def signal(parts: list[list[Tensor]]) -> HiddenSignal | MixtureSignal:
            signals = [_of_logits(torch.cat(part)) for part in zip(*parts, strict=True)]
            return signals[0] if len(signals) == 1 else MixtureSignal(signals, shares, kind)

        weight_VD = self.head(batch.weights)
        problem = Problem(
            hidden_ND.detach(),
            Head(weight_VD.detach()),
            signal(parts),
            Tokens(
                torch.tensor(columns["weight"], dtype=torch.float64),
                torch.tensor(columns["ids"]),
                torch.tensor(columns["row"]),
                advantage_N=torch.tensor(columns["advantage"], dtype=torch.float64),
                distill_weight_N=torch.tensor(columns["distilled"], dtype=torch.float64),
            ),
            reference=_of_logits(torch.cat(start)),
            contrast_signal=signal(contrast) if self.args.contrast_context else None,
        )
        result = reference(self.args.objective, problem)
        record.sums |= {name: float(column.sum()) for name, column in result.values.items() if name != "loss"}
        record.sums["loss"] = float(result.values["loss"]) * record.tokens
        # contrast_context may leave no token any weight.
        record.largest = float(result.values["divergence"].max()) if "divergence" in result.values else 0.0
        if trains:
            record.gradient_norm = self._norm(hidden_ND, weight_VD, result.gradients)

    def _norm(self, hidden_ND: Tensor, weight_VD: Tensor, gradients: dict[str, Tensor]) -> float:
        ends, values = [hidden_ND], [gradients["states"]]
        if weight_VD.requires_grad and "weight" in gradients:  # not where no token has any weight
            ends, values = [*ends, weight_VD], [*values, gradients["weight"]]
        self.model.zero_grad()
        torch.autograd.backward(ends, values)
        squares = [p.grad.square().sum() for p in self.model.parameters() if p.grad is not None]
        return float(torch.stack(squares).sum().sqrt())


def _of_logits(logits_NV: Tensor) -> HiddenSignal:
    return HiddenSignal(logits_NV, Head(torch.eye(logits_NV.shape[1], dtype=torch.float64)))


@dataclass
class Gap:
    """A logged value and what the twin computed."""

    name: str
    logged: float
    expected: float

    @property
    def size(self) -> float:
        """The distance, relative to 1 + the expected value."""
        return abs(self.logged - self.expected) / (1.0 + abs(self.expected))

    def within(self, rounding: str) -> bool:
        """Tell whether rounding explains it; `rounding` is a key of BOUNDS."""
        return self.size <= BOUNDS[rounding][self.name == "grad_norm"]


def gaps(combination: Combination, folder: Path) -> list[Gap]:
    """Run a combination, and compare all that it logs with the twin.

    Raises:
        OPSDError: opsd refuses the combination.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = build(combination, folder)
        model = copy.deepcopy(trainer.student.model)
        trainer.train()
        evaluated = trainer.evaluate()
    twin = Twin(combination, trainer, model)
    log = trainer.state.log_history
    assert len(trainer.batches) == STEPS
    records = [twin.expected(batch, trains=True) for batch in trainer.batches]
    entries = [entry for entry in log if "divergence" in entry]
    size = STEPS // len(entries)
    result = list[Gap]()
    for number, entry in enumerate(entries):
        part = records[number * size : (number + 1) * size]
        expected = {**entry_of(part), "grad_norm": part[-1].gradient_norm}
        # transformers averages the losses of steps.
        expected["loss"] = fmean(record.sums["loss"] / max(record.tokens, 1) for record in part)
        expected["scored_tokens"] = fmean(record.tokens for record in part)
        result += compared(expected, entry)
    looks = [entry for entry in log if "eval_divergence" in entry]
    assert len(trainer.eval_batches) == EVAL_BATCHES * len(looks) and looks[-1]["eval_loss"] == evaluated["eval_loss"]
    for number, entry in enumerate(looks):
        batches = trainer.eval_batches[number * EVAL_BATCHES : (number + 1) * EVAL_BATCHES]
        expected = entry_of([twin.expected(batch, trains=False) for batch in batches])
        result += compared({f"eval_{name}": value for name, value in expected.items()}, entry)
    return result


def compared(expected: dict[str, float], entry: dict[str, float]) -> list[Gap]:
    """Compare a log entry with what it must hold; opsd logs all of it but two."""
    names = [name for name in expected if name.removeprefix("eval_") not in ("logprob", "teacher_logprob")]
    return [Gap(name, entry[name], expected[name]) for name in names]
