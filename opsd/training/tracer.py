"""Keeps a sample of each step's rollouts with what every token was given: for health, reports and `traces/`.

Knows loss records and rollouts; judges nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from opsd.health.rollout import TracedRollout
from opsd.health.traces import FOLDER, TraceFiles
from opsd.health.watch import is_training
from opsd.losses import LossOutput
from opsd.rollouts import Rollouts
from opsd.training.parts import RunParts
from opsd.training.traced import TracedRollouts

ROLLOUTS_PER_FILE = 64  # a process that is killed loses less than that


class Tracer(TrainerCallback):
    """Takes rollouts at the end of a step, holds those since the last log entry, and writes them.

    >>> rollouts = tracer.mark(rollouts, step)  # before the loss
    >>> tracer.take(kept, step)  # the loss records of a step, with their rollouts
    >>> tracer.recent  # since the last log entry

    Args:
        parts: what the run is made of; `trace_rollouts` of its settings is the number of rollouts of a step, over 0.
        end_ids: ids that end a rollout.
        say: prints a line.
    """

    def __init__(self, parts: RunParts, end_ids: Collection[int], say: Callable[[str], None]):
        self._args = parts.args
        self._made = TracedRollouts(parts.student.tokenizer, end_ids, parts.scorer.teacher)
        self._files = TraceFiles(Path(self._args.output_dir), self._args.trace_mb)
        self._say, self._has_failed = say, False
        self._says_thinned = False
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

    def mark(self, rollouts: Rollouts, step: int) -> Rollouts:
        """Choose a sample of a step's rollouts of this process, the same one in a resumed run; before the loss."""
        count = self._args.trace_rollouts if self._args.should_save else 0
        draws = random.Random(f"{self._args.seed} {step}")
        siblings = dict[tuple[int, ...], list[int]]()
        for row, mask in enumerate(rollouts.loss_mask or ()):
            if any(mask):
                siblings.setdefault(tuple(rollouts.prompt_ids[row]), []).append(row)
        # Two of a prompt, so that siblings can be compared; then the rest.
        drawn = [draws.sample(rows, len(rows)) for rows in draws.sample(list(siblings.values()), len(siblings))]
        ordered = [*(row for rows in drawn for row in rows[:2]), *(row for rows in drawn for row in rows[2:])]
        chosen = set(ordered[:count])
        return replace(rollouts, is_traced=[row in chosen for row in range(len(rollouts))])

    def take(self, kept: Sequence[tuple[LossOutput, Rollouts]], step: int) -> None:
        """Keep the rollouts of a step that were marked, with what their losses were made of."""
        for record, rollouts in kept:
            rows = [row for row, is_traced in enumerate(rollouts.is_traced) if is_traced]
            taken = list(self._made(record, rollouts, rows, step)) if rows else []
            self.recent += [replace(rollout, alternatives=()) for rollout in taken]  # which no monitor reads
            self._unwritten += taken
        if len(self._unwritten) >= ROLLOUTS_PER_FILE:
            self._write()

    def _write(self) -> None:
        unwritten, self._unwritten = self._unwritten, []
        if self._has_failed:
            return
        try:
            has_thinned = self._files.write(unwritten)
        except OSError as error:  # a full disk ends no run
            self._give_up(error)
            return
        if has_thinned and not self._says_thinned:
            self._says_thinned = True
            self._say(
                f"traces      {FOLDER}/ was larger than trace_mb ({self._args.trace_mb:g} MB): every second file is "
                "removed, then and later. Raise trace_mb, or lower trace_rollouts."
            )

    def _give_up(self, error: OSError) -> None:
        self._has_failed = True
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
