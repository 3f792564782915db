"""The interface of all teachers, and the view through which everyone asks one.

A strategy writes `prepare` and `score`, and whichever other hooks it needs; docs/your_own_teacher.md shows how. It says
whose weights score a rollout; `teacher.prompts` (prompting.py) says what those weights read. Knows rollouts, prompts
and signals; nothing of losses or training.

Shapes: N scored tokens of a micro-batch (packed).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor, nn

from opsd.contexts.base import Context
from opsd.contexts.renderer import PromptRenderer
from opsd.errors import ConfigError, TeacherError
from opsd.rollouts import Ids, Rollouts
from opsd.signals import TeacherSignal
from opsd.teachers.checks import check_completions, check_settings, check_signal, check_state_keys
from opsd.teachers.cost import Cost
from opsd.teachers.parameters import constructor_parameters
from opsd.teachers.prompting import ContextLike, Row, TeacherPrompts
from opsd.teachers.student import StudentHandle
from opsd.teachers.weight_copy import megabytes

History: TypeAlias = Sequence[Mapping[str, Any]]  # what a run has logged: entries with their `step`
PLAIN = (bool, int, float, str, list, tuple, dict, type(None))  # settings that a checkpoint's JSON can hold


class Teacher(ABC):
    """Scores rollouts; `opsd.teachers` has the table of strategies.

    A strategy extends `prepare`, writes `score`, and overrides other hooks where their defaults do not fit.

    Args:
        context: what the teacher's prompt contains beside the student's: a PrivilegedContext, a shipped template's
            name, a path to a template, or None for the student's own prompt.

    Example:
        >>> class FrozenStudent(Teacher):
        ...     def prepare(self, student):
        ...         super().prepare(student)
        ...         self.model = copy.deepcopy(student.model).requires_grad_(False)
        ...
        ...     def score(self, rollouts):
        ...         batch = rollouts.pad(self.student.device, self.prompts)
        ...         with evaluating(self.model):
        ...             states = last_hidden(self.model, batch.ids_BL, batch.row_N, batch.position_N)
        ...         return HiddenSignal(states, Head.from_model(self.model).detach())
    """

    strategy: str  # its name in the table; "module:Class" where a class does not set one

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "strategy" not in vars(cls):
            cls.strategy = f"{cls.__module__}:{cls.__qualname__}"

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Refuse a class that lacks a required method."""
        if missing := sorted(cls.__abstractmethods__):
            methods = " and ".join(f"{name}()" for name in missing)
            raise TeacherError(
                f"{cls.__name__} is no teacher yet: it lacks {methods}. A teacher returns a distribution for each "
                f"scored token. Write {methods}; docs/your_own_teacher.md has an example of 30 lines."
            )
        return super().__new__(cls)

    def __init__(self, *, context: ContextLike = None):
        self.prompts = TeacherPrompts(self, context)

    @property
    def prompts(self) -> TeacherPrompts:
        """The prompts it reads: rendering, contexts, checks of rows."""
        if "_prompts" not in vars(self):
            name = type(self).__name__
            raise TeacherError(
                f"{name}.__init__ does not call super().__init__(context=context), which gives a teacher its prompts. "
                "Without them it has no prompt to score. Begin __init__ with that call."
            )
        return self._prompts

    @prompts.setter
    def prompts(self, prompts: TeacherPrompts) -> None:
        self._prompts = prompts

    @property
    def student(self) -> StudentHandle:
        """The student, once `prepare` has been called."""
        if "_student" not in vars(self):
            raise TeacherError(
                f"teacher {self.strategy!r} was not prepared, so it has no student, tokenizer or device yet. Call "
                "teacher.prepare(student) first. A class that writes prepare begins it with super().prepare(student)."
            )
        return self._student

    # ---- hooks: what a strategy writes ------------------------------------------------------------------------

    def prepare(self, student: StudentHandle) -> None:
        """Get ready, once, after the student is in place: load or copy weights, compare tokenizers.

        A strategy begins with `super().prepare(student)`.
        """
        self._student = student

    @abstractmethod
    def score(self, rollouts: Rollouts) -> TeacherSignal:
        """Return the teacher's distribution for every scored token, without gradient, packed like the rollouts.

        Args:
            rollouts: a micro-batch with this teacher's prompts: `rollouts.pad(device, self.prompts)`.

        Returns:
            A signal of N tokens on the student's device.
        """

    def describe(self) -> str:
        """Return whose weights these are and how they change, in one sentence; printed before the first step."""
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        return f"{type(self).__name__}({settings})"

    @property
    def settings(self) -> dict[str, Any]:
        """The numbers that define it, in plain values; a resumed run must have the same.

        By default the constructor's arguments that the object keeps under their names.
        """
        kept = {name: vars(self)[name] for name in constructor_parameters(type(self)) if name in vars(self)}
        return {name: value for name, value in kept.items() if isinstance(value, PLAIN)}

    @property
    def renderer(self) -> PromptRenderer:
        """How its prompts become ids; the student's renderer unless a teacher has its own chat template."""
        return self.student.renderer

    @property
    def max_length(self) -> int | None:
        """Tokens of prompt and completion that it can score; None for any number."""
        return None

    @property
    def starts_as_student(self) -> bool:
        """Whether its distributions without a context are the student's at step 0."""
        return False

    @property
    def cautions(self) -> list[str]:
        """What a user should know of its settings before training, in sentences."""
        return []

    @property
    def lists(self) -> int | None:
        """How many likeliest tokens its signal lists; None where it gives whole distributions."""
        return None

    @property
    def needs_given_rollouts(self) -> bool:
        """Whether it can score only rollouts that exist before the run."""
        return False

    @property
    def can_fail(self) -> bool:
        """Whether a rollout may be left without a score, so that processes must agree on it."""
        return False

    @property
    def noise(self) -> float:
        """By how much its log-probabilities of the same tokens differ from one time to the next, nats per token."""
        return 0.0

    @property
    def collective(self) -> bool:
        """Whether `score` must be called in every process at the same time, with rows or without."""
        return False

    @property
    def tensors(self) -> list[Tensor]:
        """The weights that it holds beside the student's; its cost is counted from them.

        By default the tensors and modules among its attributes, without the student's parameters.
        """
        held = [value for value in vars(self).values() if isinstance(value, Tensor | nn.Module)]
        tensors = [t for h in held for t in ([h] if isinstance(h, Tensor) else [*h.parameters(), *h.buffers()])]
        of_student = {id(t) for t in (*self.student.model.parameters(), *self.student.model.buffers())}
        return [t for t in tensors if id(t) not in of_student]

    @property
    def metrics(self) -> Mapping[str, float]:
        """Values to log after each step, the same in every process."""
        return {}

    @property
    def watches(self) -> Mapping[str, int]:
        """Logged metrics that `before_step` reads, each with the number of steps in which it needs an entry."""
        return {}

    def shard(self) -> None:  # noqa: B027 - most teachers have nothing that could be sharded
        """Follow the student into its sharded form; called once, after the student was prepared for training."""

    def expect(self, rollouts: Rollouts) -> None:  # noqa: B027 - most teachers score when they are asked
        """Begin to score a generation batch, with this teacher's prompts; `score` gets it in micro-batches."""

    def settle(self, rollouts: Rollouts, seconds: float) -> Rollouts | None:
        """Return a micro-batch without the rollouts that have no score, before `score` is asked for it.

        None where that takes more than so many seconds: it is asked again.

        Raises:
            ServerError: a rollout has none, and the run is to end there.
        """
        return rollouts

    def adjust_rollouts(self, rollouts: Rollouts) -> Rollouts:
        """Return the rollouts of a step with other advantages or weights, before any sort or split.

        Asked of the run's teacher only, never of a composite's parts.
        """
        return rollouts

    def before_step(self, done: int, history: History) -> str | None:
        """Follow the student before the next step, when all of the steps done was logged and evaluated.

        Args:
            done: optimizer steps done.
            history: the entries logged so far.

        Returns:
            A line to print, or None.
        """
        return None

    def after_step(self, step: int) -> str | None:
        """Follow the student after optimizer step number `step` (1, 2, …), before that is logged and saved.

        Returns:
            A line to print, or None.
        """
        return None

    def left_undone(self, done: int, steps: int) -> str | None:
        """Return what of its schedule a run of `steps` steps, `done` of them done, never comes to; None for nothing."""
        return None

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that a resumed run needs and cannot make again; sharded ones as they are."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            CheckpointError: the state of another teacher.
        """
        check_state_keys(state, (), self.strategy)

    def sample(self, rows: Sequence[Row], *, max_new_tokens: int, **sampling: Any) -> list[Ids]:
        """Return this teacher's own completions, one per row, of the prompts `self.prompts.ids(row)`.

        Args:
            rows: dataset rows.
            max_new_tokens: longest completion, in tokens.
            sampling: `do_sample`, `temperature`, `batch_size`, … of `opsd.models.generation.generate`.

        Raises:
            ConfigError: this strategy scores and cannot sample.
        """
        raise ConfigError(
            f"teacher {self.strategy!r} scores tokens and cannot sample its own: that takes one model at hand. Use "
            "another teacher, or set seq_kd to false."
        )

    @property
    def can_sample(self) -> bool:
        """Whether `sample` works; by default where a strategy writes it."""
        return type(self).sample is not Teacher.sample

    @property
    def members(self) -> list[Teacher]:
        """The teachers that hold weights: itself, or those that a composite is made of, each once."""
        return [self]

    # ---- what every teacher can do ----------------------------------------------------------------------------

    @property
    def context(self) -> Context | None:
        """The context of its prompts; None for the student's own prompt, and for a composite."""
        return self.prompts.context

    @property
    def cost(self) -> Cost:
        """Memory of the weights it holds."""
        in_cpu = [t for t in self.tensors if t.device.type == "cpu"] if torch.cuda.is_available() else []
        return Cost(megabytes(self.tensors), megabytes(in_cpu))

    @property
    def description(self) -> dict[str, Any]:
        """Strategy, settings and contexts: what a resumed run compares.

        Raises:
            TeacherError: settings that cannot be written into a checkpoint.
        """
        settings = self.settings
        check_settings(settings, self.strategy)
        return {"strategy": self.strategy, **settings, "context": self.prompts.description}

    def logprobs(self, rows: Sequence[Row], completions: Sequence[Ids]) -> list[list[float]]:
        """Return log p in nats of every completion token; needs no trainer, only `prepare`.

        Args:
            rows: dataset rows.
            completions: their completions as token ids, in the same order.
        """
        return TeacherView(self).logprobs(rows, completions)

    def copy_with(self, prompts: TeacherPrompts) -> Self:
        """Return a copy of an unprepared teacher that reads other prompts, made from this one's.

        A prepared teacher keeps its weights in one place: ask it through `TeacherView(teacher, prompts)` instead.
        """
        other = copy.copy(self)
        other.prompts = prompts.map(lambda leaf: leaf.read_by(other) if leaf.teacher is self else leaf)
        return other


class TeacherView:
    """A teacher and the prompts it reads; trainer, doctor and evaluation ask through one.

    One set of weights scores any number of contexts: each view swaps its prompts in for the call. What comes back is
    checked.

    Args:
        teacher: whose weights answer.
        prompts: what they read, made from the teacher's; None for the teacher's own.

    Example:
        >>> without_context = TeacherView(teacher, teacher.prompts.with_context(None))
        >>> without_context.logprobs(rows, completions)
    """

    def __init__(self, teacher: Teacher, prompts: TeacherPrompts | None = None):
        self.teacher = teacher
        self.prompts = teacher.prompts if prompts is None else prompts

    @contextmanager
    def _swapped_in(self) -> Iterator[None]:
        original, self.teacher.prompts = self.teacher.prompts, self.prompts
        try:
            yield
        finally:
            self.teacher.prompts = original

    def score(self, rollouts: Rollouts) -> TeacherSignal:
        """Return the teacher's signal for rollouts that these prompts were rendered into.

        Raises:
            TeacherError: `score` returned what a loss cannot read.
            AlignmentError: other tokens were scored than the rollouts say.
        """
        with self._swapped_in():
            signal = self.teacher.score(rollouts)
        check_signal(signal, rollouts, self.teacher.student, self.teacher.strategy)
        return signal

    def expect(self, rollouts: Rollouts) -> None:
        """Let the teacher begin to score, as `Teacher.expect`."""
        with self._swapped_in():
            self.teacher.expect(rollouts)

    def settle(self, rollouts: Rollouts, seconds: float) -> Rollouts | None:
        """Return the rollouts that have a score, as `Teacher.settle`."""
        with self._swapped_in():
            return self.teacher.settle(rollouts, seconds)

    def sample(self, rows: Sequence[Row], *, max_new_tokens: int, **sampling: Any) -> list[Ids]:
        """Return the teacher's completions of rows, as `Teacher.sample`.

        Raises:
            ConfigError: the strategy cannot sample.
            TeacherError: `sample` returned something else than ids of each row.
        """
        with self._swapped_in():
            completions = self.teacher.sample(rows, max_new_tokens=max_new_tokens, **sampling)
        check_completions(completions, len(rows), self.teacher.strategy)
        return completions

    def logprobs(self, rows: Sequence[Row], completions: Sequence[Ids]) -> list[list[float]]:
        """Return log p in nats of every completion token, as `Teacher.logprobs`."""
        student = self.teacher.student
        prompt_ids = [student.renderer.ids(row["prompt"]) for row in rows]
        rollouts = self.prompts.render(Rollouts(rows, prompt_ids, completions))
        scored_ids_N = torch.tensor(rollouts.scored_ids, dtype=torch.long, device=student.device)
        values = iter(self.score(rollouts).logprobs(scored_ids_N).tolist())
        return [[next(values) for _ in completion] for completion in completions]
