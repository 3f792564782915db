"""The student's completions of a step, sampled for several optimizer steps at once with `steps_per_generation`.

Those of later steps wait here, and in checkpoints. Knows rows, ids and the trainer that samples; nothing of teachers'
kinds or losses.

Shapes: N scored tokens of a micro-batch (packed).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object

from opsd.health.bound import STALENESS
from opsd.models.forward import check_lengths, context_length
from opsd.rollouts import Ids, Rollouts
from opsd.signals import HiddenSignal
from opsd.teachers import LiveTeacher, TeacherView
from opsd.teachers.prompting import Row
from opsd.training import metrics
from opsd.training.averages import Tally
from opsd.training.schedules import on_policy_rows
from opsd.training.vllm_logprobs import UNKNOWN


@dataclass(frozen=True)
class Samples:
    """Completions that the student sampled, one per prompt.

    >>> Samples([[5, 6]], [[5, 6]], [[8, 2]], [[1, 1]])

    Args:
        asked: prompts as the rows give them.
        prompt_ids: prompts as they were sampled from.
        completion_ids: sampled ids, and what tools put between them.
        loss_mask: 1 for sampled tokens, 0 for a tool's.
        logprobs: log p in nats of each token where it was sampled, NaN where unknown; None where nothing asks for it.
    """

    asked: Sequence[Ids] = ()
    prompt_ids: Sequence[Ids] = ()
    completion_ids: Sequence[Ids] = ()
    loss_mask: Sequence[Ids] = ()
    logprobs: Sequence[Sequence[float]] | None = None

    def part(self, start: int, end: int) -> Samples:
        """Return the samples of some of the rows."""
        values = {name: value and value[start:end] for name, value in vars(self).items()}
        return Samples(**values)

    def rollouts(self, rows: Sequence[Row], prompt_ids: Sequence[Ids], others: Sequence[Ids]) -> Rollouts:
        """Return rollouts: these samples for the first rows, and completions of others for the rest.

        Args:
            rows: all rows.
            prompt_ids: the student's prompts of the rows; those that were sampled from replace the first.
            others: completions of the rest.
        """
        count = len(self.completion_ids)
        logprobs = self.logprobs and [*self.logprobs, *([UNKNOWN] * len(ids) for ids in others)]
        return Rollouts(
            rows,
            [*self.prompt_ids, *prompt_ids[count:]],
            [*self.completion_ids, *others],
            [*self.loss_mask, *([1] * len(ids) for ids in others)],
            rollout_logprobs=logprobs,
            on_policy=[number < count for number in range(len(rows))],
        )


@dataclass
class SamplesAhead:
    """Samples completions for the steps of a generation batch, and holds them until their step.

    >>> ahead = SamplesAhead(trainer)
    >>> rows = ahead.begin(generation_batch)  # of this step
    >>> samples = ahead.take(rows, prompt_ids)

    Args:
        trainer: an OPSDTrainer whose student is ready, and not sharded yet.
    """

    trainer: Any
    sampled_at: int = 0  # the step, counted from 0, at which the samples that wait were drawn
    _waiting: dict[int, Samples] = field(default_factory=dict)  # by step
    _rows: dict[int, Sequence[Row]] = field(default_factory=dict)  # of the generation batch, from this step on
    _student: LiveTeacher | None = None  # gives the probabilities of sampling, where the loss corrects for them

    def __post_init__(self) -> None:
        args = self.trainer.args
        if args.importance_clip is not None and args.steps_per_rollouts > 1 and not args.use_vllm:
            self._student = LiveTeacher()
            self._student.prepare(self.trainer.student)  # now: it looks at the model, which may be sharded later

    def reset(self) -> None:
        """Forget an earlier `train` of this trainer, whose first weights an engine may still hold."""
        self.load(None)
        self.trainer._last_loaded_step = -1

    def begin(self, generation_batch: Sequence[Row]) -> Sequence[Row]:
        """Return this step's rows of a generation batch, and remember those of the steps that share it."""
        state, steps = self.trainer.state, self.trainer.args.steps_per_rollouts
        size, place = len(generation_batch) // steps, state.global_step % steps
        left = min(steps - place, max(state.max_steps - state.global_step, 1))  # no sample that nothing would train on
        parts = [generation_batch[at * size : (at + 1) * size] for at in range(place, place + left)]
        self._rows = {state.global_step + number: rows for number, rows in enumerate(parts)}
        return self._rows[state.global_step]

    def take(self, rows: Sequence[Row], prompt_ids: Sequence[Ids]) -> Samples:
        """Return the samples for a step's rows: those that wait for it, or new ones, for the steps to come as well.

        Args:
            rows: the on-policy rows of a step, or of an evaluation.
            prompt_ids: the student's prompts of these rows.
        """
        step = self.trainer.state.global_step
        if not rows:
            return Samples()
        if not self.trainer.model.training or self.trainer.args.steps_per_rollouts == 1:
            return self._sampled(rows, prompt_ids)
        # Rows that a resumed run may change, or a stream's, may be others than those sampled for: in one process only,
        # and sampling is for all.
        is_missing = step not in self._waiting or list(self._waiting[step].asked) != list(prompt_ids)
        if any(gather_object([is_missing])):
            self._sample_ahead()
        return self._waiting[step]

    def tallies(self) -> dict[str, Tally]:
        """Return `staleness`, the age of this step's samples; nothing where each step samples its own."""
        if not self.trainer.model.training or self.trainer.state.global_step not in self._waiting:
            return {}
        return {STALENESS: Tally(self.age, 1)}

    @property
    def age(self) -> int:
        """Optimizer steps since this step's samples were drawn."""
        step = self.trainer.state.global_step
        return step - self.sampled_at if step in self._waiting else 0

    @staticmethod
    @contextmanager
    def sizing(args: Any) -> Iterator[None]:
        """Let accumulation steps be those of a generation batch, while TRL and `epoch_sampler` read sizes from them."""
        of_step = args.gradient_accumulation_steps
        args.gradient_accumulation_steps = of_step * args.steps_per_rollouts
        try:
            yield
        finally:
            args.gradient_accumulation_steps = of_step

    # ---- checkpoints -------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> dict[str, Any] | None:
        """The samples of later steps, in plain values, for a checkpoint; None where each step has its own."""
        if self.trainer.args.steps_per_rollouts == 1:
            return None
        done = self.trainer.state.global_step
        steps = {str(step): asdict(samples) for step, samples in self._waiting.items() if step >= done}
        return {"sampled_at": self.sampled_at, "steps": steps}

    def load(self, waiting: Mapping[str, Any] | None) -> None:
        """Take the samples of a checkpoint, or none."""
        stored = waiting or {"sampled_at": 0, "steps": {}}
        self.sampled_at = stored["sampled_at"]
        self._waiting = {int(step): Samples(**samples) for step, samples in stored["steps"].items()}

    def forget_this_step(self) -> None:
        """Drop samples that the step under way has drawn: a resumed run draws them again, from the same state."""
        if self.sampled_at == self.trainer.state.global_step:
            self._waiting = {}

    # ---- sampling ----------------------------------------------------------------------------------------------

    def _sample_ahead(self) -> None:
        args, step = self.trainer.args, self.trainer.state.global_step
        own = {
            at: rows[: on_policy_rows(len(rows), args.on_policy_share.at(at), at)] for at, rows in self._rows.items()
        }
        rows = [row for of_step in own.values() for row in of_step]
        prompts = [self.trainer.student.renderer.ids(row["prompt"]) for row in rows]
        longest = self.trainer.generation_config.max_new_tokens
        check_lengths(context_length(self.trainer.student.model), prompts, [longest] * len(prompts), "student")
        samples = self._sampled(rows, prompts)
        logprobs = None if samples.logprobs is None else list(samples.logprobs)
        if self._student is not None:
            fresh = len(own[step])
            logprobs = [
                [UNKNOWN] * len(ids) for ids in samples.completion_ids[:fresh]
            ]  # the same weights: a ratio of 1
            logprobs += self._logprobs(rows[fresh:], samples.part(fresh, len(rows)))
        samples = Samples(**{**vars(samples), "logprobs": logprobs})
        self._waiting, self.sampled_at, start = {}, step, 0
        for at, of_step in own.items():
            if of_step:
                self._waiting[at] = samples.part(start, start + len(of_step))
            start += len(of_step)

    def _sampled(self, rows: Sequence[Row], prompt_ids: Sequence[Ids]) -> Samples:
        trainer = self.trainer
        prompts, completions, loss_mask, *_ = trainer._generate([row["prompt"] for row in rows])
        metrics.forget_completions(trainer._metrics[trainer._mode])  # TRL's, of which `log` would average batches
        loss_mask = loss_mask or [[1] * len(ids) for ids in completions]
        logprobs = None if trainer._engine is None else trainer._engine.take(completions)
        return Samples(list(prompt_ids), prompts, completions, loss_mask, logprobs)

    def _logprobs(self, rows: Sequence[Row], samples: Samples) -> list[list[float]]:
        """Return log p of sampled tokens under the student as it is now, in nats, at the temperature of sampling."""
        trainer, student, values = self.trainer, self._student, list[list[float]]()
        assert student is not None
        size = trainer.args.per_device_train_batch_size
        for start in range(0, len(rows), size):
            part = samples.part(start, start + size)
            rollouts = Rollouts(rows[start : start + size], part.prompt_ids, part.completion_ids, part.loss_mask)
            with trainer.accelerator.autocast():  # as the loss computes the new probabilities
                signal = TeacherView(student).score(student.prompts.render(rollouts))
                assert isinstance(signal, HiddenSignal)
                ids_N = torch.tensor(rollouts.scored_ids, dtype=torch.long, device=trainer.accelerator.device)
                logprobs_N = signal.logprobs(ids_N, trainer.args.temperature)
            values += [row.tolist() for row in logprobs_N.split([sum(mask) for mask in part.loss_mask])]
        return values
