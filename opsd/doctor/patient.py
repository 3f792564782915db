"""The run under examination: a trainer ready for step 1, some of its rows, their prompts, rollouts and scores.

Checks change nothing: no weight, no counter, no random state.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from opsd.contexts.messages import Prompt
from opsd.contexts.privileged import PrivilegedContext
from opsd.contexts.renderer import PromptRenderer
from opsd.data.values import is_empty
from opsd.errors import ConfigError
from opsd.evaluation.graders import NUMBER, grade_rows, load_grader
from opsd.evaluation.likelihood import logprobs
from opsd.losses import Divergence, LossOutput, Objective, Tokens
from opsd.models.forward import context_length, keeping_modes
from opsd.models.head import Head
from opsd.rollouts import Ids, Rollouts
from opsd.signals import TeacherSignal, TopKSignal
from opsd.teachers import LiveTeacher, StudentHandle, Teacher, TeacherPrompts, TeacherView
from opsd.training.groups import placeholders
from opsd.training.off_policy import off_policy_completions
from opsd.training.sampling import rollout_settings
from opsd.training.sampling_check import Agreement, sampling_gap
from opsd.training.trainer import OPSDTrainer

Row = Mapping[str, Any]
BATCH = 16  # rows of a forward pass at most
WORDS = 8  # of a short answer, which the grader `contains` looks for; a longer one is a solution
LONGEST = 512  # tokens of a rollout sampled here by default: minutes even for a model that thinks


@dataclass(frozen=True)
class RenderedPrompt:
    """One prompt, as messages and as ids, of the student or of a teacher.

    >>> patient.teacher_prompts[0].name, patient.teacher_prompts[0].text

    Args:
        name: "student", or "teacher" with its context.
        row: number of the row among `Patient.rows`.
        renderer: turned the messages into ids.
        messages: messages or text.
        prefill: start of the assistant's turn.
        ids: of the prompt.
        context: of the teacher; None for the student.
    """

    name: str
    row: int
    renderer: PromptRenderer
    messages: Prompt
    prefill: str
    ids: Ids
    context: PrivilegedContext | None = None

    @property
    def text(self) -> str:
        """The decoded ids, special tokens included."""
        return self.renderer.tokenizer.decode(self.ids, skip_special_tokens=False)


class Patient:
    """A trainer and some of its rows, with everything that several checks need, computed once.

    >>> list(check_lift(Patient(trainer, rows=16)))

    Args:
        trainer: ready for step 1.
        rows: rows to examine; drawn by the run's seed.
        grader: tells right answers from wrong ones; None takes the reward functions, else a grader that fits `answer`.
        max_new_tokens: longest rollout sampled here; None takes the run's, LONGEST at most.
    """

    def __init__(
        self, trainer: OPSDTrainer, *, rows: int = 16, grader: str | None = None, max_new_tokens: int | None = None
    ):
        self.trainer = trainer
        self.args = trainer.args
        self.teacher: Teacher = trainer.teacher
        self.student: StudentHandle = trainer.student
        self.tokenizer = trainer.student.tokenizer
        dataset = trainer.train_dataset
        if isinstance(dataset, Dataset):
            drawn = random.Random(self.args.seed).sample(range(len(dataset)), min(rows, len(dataset)))
            self.numbers = sorted(drawn)
            self.rows: list[Row] = [dataset[number] for number in self.numbers]
        else:
            self.rows = list(islice(iter(dataset), rows))
            self.numbers = list(range(len(self.rows)))
        self._grader = grader
        self.max_new_tokens = max_new_tokens or min(self.args.max_completion_length, LONGEST)

    # ---- prompts ----------------------------------------------------------------------------------------------

    def rollout_fields(self, row: Row) -> dict[str, Any]:
        """Return placeholders for the fields that rollouts provide."""
        return placeholders(self.trainer.groups.rollout_fields, row)

    @cached_property
    def student_prompts(self) -> list[RenderedPrompt]:
        """The student's prompts."""
        renderer = self.student.renderer
        return [
            RenderedPrompt("student", number, renderer, row["prompt"], "", renderer.ids(row["prompt"]))
            for number, row in enumerate(self.rows)
        ]

    @cached_property
    def teacher_prompts(self) -> list[RenderedPrompt]:
        """The prompts of every teacher that scores a row."""
        return [
            self._teacher_prompt(leaf, number, row)
            for number, row in enumerate(self.rows)
            for leaf in self.teacher.prompts.leaves_of(row)
        ]

    @property
    def prompts(self) -> list[RenderedPrompt]:
        """The prompts of both."""
        return [*self.student_prompts, *self.teacher_prompts]

    def _teacher_prompt(self, prompts: TeacherPrompts, number: int, row: Row) -> RenderedPrompt:
        context, renderer = prompts.context, prompts.renderer
        if context is not None:
            context = context.pick(row, self.rollout_fields(row))
        if context is None:
            name = "teacher (without context)"
            return RenderedPrompt(name, number, renderer, row["prompt"], "", renderer.ids(row["prompt"]))
        assert isinstance(context, PrivilegedContext)
        renderer = context.with_kwargs(renderer)
        messages, prefill = context.messages(row, self.rollout_fields(row), renderer=renderer)
        ids = context.render(row, self.rollout_fields(row), renderer=renderer)
        return RenderedPrompt(f"teacher (context: {context.name})", number, renderer, messages, prefill, ids, context)

    # ---- rollouts and scores ----------------------------------------------------------------------------------

    @property
    def are_given(self) -> bool:
        """Whether rollouts are the rows' own completions."""
        return self.teacher.needs_given_rollouts

    @cached_property
    def sampled(self) -> tuple[list[Ids], float]:
        """The student's rollouts, with the run's engine and settings, and the seconds they took.

        Where the teacher scores given rollouts only, the rows' own completions.
        """
        if self.are_given:
            limit = self.trainer.generation_config.max_new_tokens
            given = (self.rows, self.args, limit, self.teacher, self.student, self.trainer.eos_token_ids)
            return off_policy_completions(*given)[0], 0.0
        start, run = time.perf_counter(), {"temperature": self.args.temperature, **rollout_settings(self.args)}
        completions = self._generate(do_sample=True, seed=self.args.seed, **run)
        return completions, time.perf_counter() - start

    @cached_property
    def greedy(self) -> list[Ids]:
        """The student's greedy answers."""
        return self._generate()

    def _generate(self, **sampling: Any) -> list[Ids]:
        prompts = [prompt.ids for prompt in self.student_prompts]
        with self.trainer.accelerator.autocast():
            return self.student.complete(prompts, max_new_tokens=self.room(prompts), batch_size=BATCH, **sampling)

    def room(self, prompts: Sequence[Ids]) -> int:
        """Return the tokens that completions of these prompts may get."""
        limit = context_length(self.student.model)
        longest = max(map(len, prompts))
        return max(1, min(self.max_new_tokens, (limit or longest + self.max_new_tokens) - longest))

    def texts(self, completions: Sequence[Ids]) -> list[str]:
        """Return the texts of completions."""
        return self.tokenizer.batch_decode(completions, skip_special_tokens=True)

    @cached_property
    def rollouts(self) -> Rollouts:
        """The student's rollouts with every teacher's prompts."""
        prompts, fields = [prompt.ids for prompt in self.student_prompts], [self.rollout_fields(r) for r in self.rows]
        rollouts = Rollouts(self.rows, prompts, self.sampled[0], rollout_fields=fields)
        for view in self.trainer.scorer.views:
            rollouts = view.prompts.render(rollouts)
        return rollouts

    def signal(self, view: TeacherView) -> list[TeacherSignal]:
        """Return a teacher's signal of the rollouts, batch by batch."""
        with self.trainer.accelerator.autocast():
            return [view.score(batch) for batch in self._batches(view.prompts.render(self.rollouts))]

    def _batches(self, rollouts: Rollouts) -> list[Rollouts]:
        size = min(BATCH, self.args.per_device_train_batch_size)  # what the run has room for
        return [rollouts.select(range(at, min(at + size, len(rollouts)))) for at in range(0, len(rollouts), size)]

    def divergence(self, view: TeacherView) -> list[Tensor]:
        """Return KL(student ‖ teacher) in nats at every token, a (C,) tensor per rollout; the student as it trains."""
        return self._per_rollout([record.divergence_N for record in self._records(view)])

    def _records(self, view: TeacherView) -> list[LossOutput]:
        """Return the reverse KL from a teacher and what comes with it, at the run's temperature, batch by batch."""
        records: list[LossOutput] = []
        run = self.args.objective  # the run's memory budget and compilation, and a plain reverse KL
        with self._training():  # whose passes a teacher with the student's own prompts makes
            signals = self.signal(view)
        for batch, signal in zip(self._batches(self.rollouts), signals, strict=True):
            reverse_kl = _reverse_kl_from(signal)
            plain = Objective(reverse_kl, loss_budget_mb=run.loss_budget_mb, compile_loss=run.compile_loss)
            padded = batch.pad("cpu")
            with torch.no_grad(), self._training(), self.trainer.accelerator.autocast():
                hidden_ND = self.trainer.scorer.hidden(self.student.model, batch, padded)
                padded, ones_N = padded.to(hidden_ND.device), torch.ones(len(hidden_ND), device=hidden_ND.device)
                tokens = Tokens(weight_N=ones_N, ids_N=padded.scored_ids_N, row_N=padded.row_N)
                head = Head.from_model(self.student.model)
                records.append(plain(hidden_ND, head, signal, tokens))
        return records

    def _per_rollout(self, values: Sequence[Tensor]) -> list[Tensor]:
        return list(torch.cat(list(values)).cpu().split([len(ids) for ids in self.sampled[0]]))

    @cached_property
    def _own_records(self) -> list[LossOutput]:
        return self._records(TeacherView(self.teacher))

    @cached_property
    def disagreement(self) -> list[Tensor]:
        """The divergence from the run's own teacher."""
        return self._per_rollout([record.divergence_N for record in self._own_records])

    @cached_property
    def agreement(self) -> Agreement:
        """The log-probabilities of the rollouts' tokens against the student's entropy."""
        agreement = Agreement()
        for record in self._own_records:
            agreement = agreement.plus(Agreement.of(sampling_gap(record), record.entropy_N))
        return agreement

    def _training(self) -> AbstractContextManager[None]:
        return as_it_trains(self.student.model, self.args)

    def logprobs(self, view: TeacherView) -> list[Tensor]:
        """Return log p in nats of every token under a teacher, a (C,) tensor per rollout."""
        values = []
        for batch, signal in zip(self._batches(self.rollouts), self.signal(view), strict=True):
            device = next(self.student.model.parameters()).device
            logprobs_N = signal.logprobs(torch.tensor(batch.scored_ids, device=device)).cpu()
            values += list(logprobs_N.split([len(ids) for ids in batch.completion_ids]))
        return values

    # ---- answers ----------------------------------------------------------------------------------------------

    @property
    def why_no_answers(self) -> str:
        """Why the teacher can answer no row here; empty if it can."""
        provided = set(self.trainer.groups.rollout_fields) - set(self.rows[0])
        needs = {name for context in self.teacher.prompts.contexts for name in context.columns} & provided
        if not self.teacher.can_sample:
            return f"teacher {self.teacher.strategy!r} is no single model that could answer."
        return f"the context needs {', '.join(sorted(needs))}, which rollouts provide during training." if needs else ""

    @cached_property
    def teacher_answers(self) -> list[Ids]:
        """The teacher's greedy answers, with its context."""
        return self.answers_of(TeacherView(self.teacher))

    def answers_of(self, teacher: TeacherView) -> list[Ids]:
        """Return a teacher's greedy answers."""
        longest = max((prompt.ids for prompt in self.prompts), key=len)
        with self.trainer.accelerator.autocast():
            return teacher.sample(self.rows, max_new_tokens=self.room([longest]), batch_size=BATCH)

    def student_logprobs(self, completions: Sequence[Ids]) -> list[list[float]]:
        """Return the student's log p in nats of every token of completions of the rows."""
        student = LiveTeacher()
        student.prepare(self.student)
        with self.trainer.accelerator.autocast():
            return logprobs(student, self.rows, completions, BATCH)

    @cached_property
    def grader_name(self) -> str | None:
        """The grader's name, or None where nothing can grade."""
        rewards = self.trainer.groups.rewards
        if self._grader is not None:
            return self._grader
        if rewards.functions:
            return f"{rewards.describe()}, from {self.trainer.groups.success_reward:g}"
        answers = [str(row["answer"]).strip() for row in self.rows if not is_empty(row.get("answer"))]
        if len(answers) < len(self.rows):
            return None
        # Answers of GSM8K end in "#### 72": the last number is the answer.
        if all(NUMBER.fullmatch(answer.rpartition("####")[2].strip()) for answer in answers):
            return "last_number"
        return "contains" if all(len(answer.split()) <= WORDS for answer in answers) else None

    def grade(self, completions: Sequence[Ids], rows: Sequence[Row] | None = None) -> list[bool]:
        """Tell which completions are right answers to the rows examined, or to others."""
        rows = self.rows if rows is None else rows
        texts, groups = self.texts(completions), self.trainer.groups
        if self._grader is None and groups.rewards.functions:
            verdicts = groups.verdicts(rows, texts, list(completions), self.trainer.state)
            return [reward >= groups.success_reward for reward in verdicts.rewards]
        if self.grader_name is None:
            raise ConfigError(
                "no grader for these rows: there is no reward function and no column 'answer'. Name one: --grader."
            )
        return grade_rows(load_grader(self.grader_name), texts, rows)[0]


def _reverse_kl_from(signal: TeacherSignal) -> Divergence:
    """Return the reverse KL from a signal: over what a top-k teacher lists, and one bucket for the rest."""
    sizes = [part.ids_NK.shape[1] for _, part in signal.groups() if isinstance(part, TopKSignal)]
    return Divergence(beta=1.0, support="teacher_top_k", support_k=min(sizes)) if sizes else Divergence(beta=1.0)


@contextmanager
def as_it_trains(model: nn.Module, args: Any) -> Iterator[None]:
    """Run a block in training mode, with the run's dropout and checkpointing, and restore the modes afterwards."""
    checkpoints = args.gradient_checkpointing and not getattr(model, "is_gradient_checkpointing", True)
    with keeping_modes(model):
        model.train()
        if checkpoints:
            model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs or {"use_reentrant": False})  # type: ignore[operator]
        try:
            yield
        finally:
            if checkpoints:
                model.gradient_checkpointing_disable()  # type: ignore[operator]


def boundary(prompt: RenderedPrompt, completion: Ids, before: int = 8, after: int = 4) -> str:
    """Return the tokens around the start of a completion, each between marks."""
    decode = prompt.renderer.tokenizer.decode
    pieces = [[decode([token]) for token in ids] for ids in (prompt.ids[-before:], completion[:after])]
    return " ▏▏ ".join("".join(f"⟨{piece}⟩" for piece in part).replace("\n", "⏎") for part in pieces)
