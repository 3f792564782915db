"""The slow twin of a whole run: what its steps must log, computed again in float64 from their rollouts alone.

The twin is given the completions that were sampled and the student's weights before each step. Prompts, masks, groups,
the teacher's weights, the loss, its gradient and every logged mean are computed here from their definitions; of opsd
it uses the records that `losses_twin` reads, and nothing that a run goes through.

Shapes: N scored tokens of all rows · V vocabulary.
"""

from __future__ import annotations

import copy
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

# The largest |logged - recomputed| / (1 + |recomputed|) of a mean over tokens, and of the gradient's norm. In bfloat16
# a token or entry at the border of a choice (top-k, keep_fraction, a gate, a clip) may fall on the other side.
BOUNDS = {"float32": (1e-4, 1e-4), "bfloat16": (3e-2, 5e-2), "bfloat16, tokens or entries chosen": (1e-1, 2e-1)}


@dataclass
class Expected:
    """What a log entry must hold: sums over tokens by name, and how many tokens they are over."""

    tokens: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    largest: float = 0.0
    gradient_norm: float = 0.0
    others: dict[str, float] = field(default_factory=dict)

    @property
    def entry(self) -> dict[str, float]:
        """The logged values by name."""
        means = {name: total / max(self.tokens, 1) for name, total in self.sums.items()}
        return {**means, **self.others, "divergence/max": self.largest, "scored_tokens": self.tokens}


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
        self.past = [batch.weights for batch in (*trainer.batches, *trainer.eval_batches)]
        self.other = sibling_model(combination.seed).double().eval()

    # -- prompts

    def prompt(self, turns: Sequence[tuple[str, str]]) -> list[int]:
        text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
        return self.tokenizer(text + "<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]

    def readings(self, row: Row, step: int) -> list[tuple[float, Weights | None, str]]:
        """The weight, the teacher's weights (None for the sibling model) and the context of each part for a row."""
        c = self.combination
        of = [SELF_TEACHERS[part][1](step, self.past) for part in c.parts]
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
        return [(1.0, SELF_TEACHERS[c.teacher][1](step, self.past), c.context)]

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
            contexts = [CONTEXTS[name] for *_, name in self.readings(batch.rows[n], 0)]
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

    def expected(self, batch: Batch, *, gradient: bool) -> Expected:
        """Return what a step, or a batch of evaluation, must log."""
        graded = self.groups(batch)
        masks = [
            mask if graded["distilled"][n] or graded["advantage"][n] else [False] * len(mask)
            for n, mask in enumerate(map(self.mask, batch.rows, batch.completions))
        ]
        scored = [(n, [p for p, used in enumerate(mask) if used]) for n, mask in enumerate(masks) if any(mask)]
        total = sum(len(places) for _, places in scored)
        record = Expected(total, dict.fromkeys(("loss", "divergence", "entropy"), 0.0))
        if graded["reward"]:
            record.others = {"reward": fmean(graded["reward"]), "group/distilled": fmean(graded["distilled"])}
        if total:
            self._add_loss(record, batch, graded, scored, gradient)
        return record

    def _add_loss(
        self, record: Expected, batch: Batch, graded: dict[str, list[Any]], scored: list[Any], gradient: bool
    ) -> None:
        columns: dict[str, list[Any]] = {name: [] for name in ("ids", "row", "weight", "advantage", "distilled")}
        states, parts, start = list[Tensor](), list[list[Tensor]](), list[Tensor]()
        contrast: list[list[Tensor]] = []
        shares: list[float] = []
        for n, places in scored:
            row, ids = batch.rows[n], batch.completions[n]
            plain = self.prompt([("user", question(row))])
            readings = self.readings(row, batch.step)
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
        if "divergence" in result.values:  # contrast_context may leave no token any weight
            record.largest = float(result.values["divergence"].max())
        if gradient:
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


def pooled(records: Sequence[Expected]) -> Expected:
    """Return the records of several batches as one: every mean over all tokens of all batches."""
    names = {name for record in records for name in record.sums}
    return Expected(
        sum(record.tokens for record in records),
        {name: sum(record.sums.get(name, 0.0) for record in records) for name in names},
        max(record.largest for record in records),
    )


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
    twin, result = Twin(combination, trainer, model), list[Gap]()
    entries = [entry for entry in trainer.state.log_history if "divergence" in entry]
    assert len(entries) == len(trainer.batches) == STEPS
    for entry, batch in zip(entries, trainer.batches, strict=True):
        record = twin.expected(batch, gradient=True)
        expected = {**record.entry, "grad_norm": record.gradient_norm}
        result += [Gap(name, entry[name], value) for name, value in expected.items() if name in entry]
    logged = next(entry for entry in reversed(trainer.state.log_history) if "eval_divergence" in entry)
    assert logged["eval_loss"] == evaluated["eval_loss"]
    record = pooled([twin.expected(batch, gradient=False) for batch in trainer.eval_batches])
    expected = {f"eval_{name}": value for name, value in record.entry.items()}
    return result + [Gap(name, logged[name], value) for name, value in expected.items() if name in logged]
