"""Keeps a sample of each step's rollouts with what every token was given: for health, reports and `traces/`.

Costs one copy of four numbers per token to the host, once a step. Knows loss records and rollouts; judges nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from opsd.health.rollout import TracedRollout
from opsd.health.traces import FOLDER, TraceFiles
from opsd.health.watch import is_training
from opsd.losses import LossOutput
from opsd.rollouts import Rollouts
from opsd.training.parts import RunParts

COLUMNS = ("logprob", "teacher_logprob")  # of a record's metrics, beside divergence and entropy
ROLLOUTS_PER_FILE = 64  # a process that is killed loses less than that
LONGEST_PROMPT = 8000  # characters of a prompt that are kept


class Tracer(TrainerCallback):
    """Takes rollouts at the end of a step, holds those since the last log entry, and writes them.

    >>> tracer.take(kept, step)  # the loss records of a step, with their rollouts
    >>> tracer.recent  # since the last log entry

    Args:
        parts: what the run is made of; `trace_rollouts` of its settings is the number of rollouts of a step, over 0.
        end_ids: ids that end a rollout.
        say: prints a line.
    """

    def __init__(self, parts: RunParts, end_ids: Collection[int], say: Callable[[str], None]):
        self._end_ids = frozenset(end_ids)
        self._args, self._teacher, self._student = parts.args, parts.scorer.teacher, parts.student
        self._files = TraceFiles(Path(self._args.output_dir), self._args.trace_mb)
        self._say, self._is_full = say, False
        self._texts: dict[int, str] = {}  # of ids
        self.recent: list[TracedRollout] = []  # since the last log entry
        self._unwritten: list[TracedRollout] = []

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remove traces of steps that come again."""
        self.recent, self._unwritten = [], []
        if args.should_save:
            try:
                self._files.begin(state.global_step)
            except OSError as error:
                self._give_up(error)

    def take(self, kept: Sequence[tuple[LossOutput, Rollouts]], step: int) -> None:
        """Keep a sample of the rollouts of a step of this process, the same one in a resumed run."""
        if not self._args.should_save:
            return
        places = [(part, row) for part, (_, rollouts) in enumerate(kept) for row in range(len(rollouts))]
        places = [(part, row) for part, row in places if any((kept[part][1].loss_mask or ())[row])]
        chosen = random.Random(f"{self._args.seed} {step}").sample(places, min(len(places), self._args.trace_rollouts))
        taken = [each for part, rows in _by_part(chosen).items() for each in self._taken(*kept[part], rows, step)]
        self.recent += taken
        self._unwritten += taken
        if len(self._unwritten) >= ROLLOUTS_PER_FILE:
            self._write()

    def _taken(self, record: LossOutput, rollouts: Rollouts, rows: Sequence[int], step: int) -> Iterator[TracedRollout]:
        unknown = torch.full_like(record.divergence_N, math.nan)
        columns = [record.divergence_N, record.entropy_N, *(record.metrics.get(name, unknown) for name in COLUMNS)]
        values = torch.stack(columns).float().cpu()
        ends = torch.tensor([sum(mask) for mask in rollouts.loss_mask or ()]).cumsum(0).tolist()
        for row in rows:
            mask = (rollouts.loss_mask or ())[row]
            ids = rollouts.completion_ids[row]
            columns_T = torch.full((len(columns), len(ids)), math.nan)
            columns_T[:, torch.tensor(mask, dtype=torch.bool)] = values[:, ends[row] - sum(mask) : ends[row]]
            divergence, entropy, logprob, teacher_logprob = columns_T.tolist()
            leaves = self._teacher.prompts.leaves_of(rollouts.rows[row])
            seen = [rollouts.teacher_prompt_ids[leaf][row] for leaf in leaves if leaf in rollouts.teacher_prompt_ids]
            context = seen[0] if seen else []  # of a mixture the first part's
            yield (
                TracedRollout(
                    step, self._decode(rollouts.prompt_ids[row]), self._decode(context), ids,
                    [self._text_of(token) for token in ids], self._decode(ids), divergence, entropy, logprob,
                    teacher_logprob, reward=rollouts.rewards[row],
                    ended=rollouts.completion_ids[row][-1] in self._end_ids, on_policy=rollouts.on_policy[row],
                )
            )  # fmt: skip

    def _text_of(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._student.tokenizer.decode([token])
        return self._texts[token]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._student.tokenizer.decode(list(ids))[-LONGEST_PROMPT:] if ids else ""

    def _write(self) -> None:
        unwritten, self._unwritten = self._unwritten, []
        if self._is_full:
            return
        try:
            self._files.write(unwritten)
        except OSError as error:  # a full disk ends no run
            self._give_up(error)
            return
        if self._files.is_full:
            self._is_full = True
            self._say(
                f"traces      {FOLDER}/ has {self._files.megabytes:.2g} MB: later steps are not kept. Raise trace_mb, "
                "or lower trace_rollouts."
            )

    def _give_up(self, error: OSError) -> None:
        self._is_full = True
        self._say(f"traces      not written, nor those of later steps: {error}")

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: Mapping[str, Any], **kwargs: Any
    ) -> None:
        """Forget what has been looked at; it comes after whoever looks."""
        if is_training(logs):
            self.recent = []

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write: a run that is resumed here finds the traces of its steps."""
        self._write()

    def close(self) -> None:
        """Write the rest, also of a run that broke off."""
        self._write()


def _by_part(places: Sequence[tuple[int, int]]) -> dict[int, list[int]]:
    rows: dict[int, list[int]] = {}
    for part, row in sorted(places):
        rows.setdefault(part, []).append(row)
    return rows
