"""What keeps a run from learning, named before step 1, after step 1 and in the run's last lines.

Three sources, one record (a `Finding`): settings (`causes_in_settings`), the number of steps (`causes_in_steps`), and
what the steps did (`Learning`, a callback that counts). A finding that fails says that nothing is learned; one that
warns, that a part of the run does nothing. Knows settings, teachers and logged metrics; nothing of losses or prompts.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from opsd.findings import Finding
from opsd.models.sharding import local_shard
from opsd.teachers import Recipe, Teacher
from opsd.training.averages import Averages
from opsd.training.config import OPSDConfig
from opsd.training.controls import control_of
from opsd.training.parts import RunParts
from opsd.training.token_selection import row_weight

CHECK = "learning"  # the check that these findings belong to
STORED = "opsd.learning"  # its entry in the trainer state of a checkpoint
# A gradient of smaller norm is rounding: near the teacher a divergence of x nats has a gradient of about the root of x.
ROUNDING = 1e-6
WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")  # schedulers that read no warmup_steps
# Logged metrics, each one value per step, whose means explain a run.
EXPLAINING = ("reward", "group/right", "group/without_context", "group/flat", "completions/clipped_ratio")
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes, to read the bits of floats
BLOCK = 2**24  # values that a checksum reads at once: some 500 MB of integers
FACTORS = (-7046029254386353131, -4658895280553007687)  # odd, of splitmix64


def _fails(saw: str, do: str) -> Finding:
    return Finding(CHECK, "fail", saw, do)


def _warns(saw: str, do: str) -> Finding:
    return Finding(CHECK, "warn", saw, do)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number != 1)


# ---- known from settings --------------------------------------------------------------------------------------------


def causes_in_settings(
    args: OPSDConfig, teacher: Teacher, rows: Any, recipe: Recipe | None, *, brings_optimizer: bool = False
) -> list[Finding]:
    """Return what settings and rows keep from learning, before the number of steps is known.

    Args:
        args: settings.
        teacher: the teacher.
        rows: prepared training rows.
        recipe: the recipe that the teacher was named by in Python, where nothing applies its `args`.
        brings_optimizer: whether the user's own optimizer sets the learning rate.
    """
    findings = []
    if args.learning_rate == 0 and not brings_optimizer:
        findings.append(_fails("learning_rate is 0, so no step changes a weight", "Set a learning_rate above 0."))
    if _teacher_is_student(args, teacher):
        findings.append(
            _fails(
                "the teacher has no context and starts as the student: they predict the same, so the loss and its "
                "gradient are 0 but for rounding, of which Adam makes full steps",
                "Give the teacher a context that the student does not see (`opsd templates`), or take another model.",
            )
        )
    column = args.pass_rate_column
    if column is not None and isinstance(rows, Dataset) and not _any_weight(rows, column):
        findings.append(
            _fails(
                f"column {column!r} is 0 or 1 in all {len(rows):,} rows, and 4p(1-p) weighs each of them 0",
                "Measure pass rates with several samples per row, or leave pass_rate_column out.",
            )
        )
    left_out = _recipe_args_left_out(args, recipe)
    return [*findings, left_out] if left_out else findings


def _teacher_is_student(args: OPSDConfig, teacher: Teacher) -> bool:
    """Tell whether no term of the loss has a gradient while the teacher is the student, which it then stays."""
    divergence = args.objective.divergence
    # Over a support without its tail a divergence may fall as mass leaves the support, teacher or no teacher.
    may_drift = args.support not in ("full", "sampled") and args.tail == "none" and divergence.kind.falls_off_support
    others = args.grpo_coef or may_drift or not args.disable_dropout
    return teacher.starts_as_student and not teacher.prompts.contexts and not others


def _any_weight(rows: Dataset, column: str) -> bool:
    return any(row_weight(rate, column, number) for number, rate in enumerate(rows[column]))


def _recipe_args_left_out(args: OPSDConfig, recipe: Recipe | None) -> Finding | None:
    """Name the arguments of a recipe that this run leaves at their defaults; a value that the user chose is theirs."""
    if recipe is None:
        return None
    control = control_of(args.control)
    defaults = {f.name: f.default for f in fields(args)}
    left_out = {
        name: wanted
        for name, wanted in recipe.args.items()
        if getattr(args, name) == defaults.get(name) != wanted and name not in (control.settings if control else ())
    }
    if not left_out:
        return None
    now = {name: getattr(args, name) for name in left_out}
    values = ", ".join(f"{name} {getattr(now[name], 'value', now[name])} (there {left_out[name]})" for name in left_out)
    return _warns(
        f"{len(left_out)} settings of the teacher's recipe ({recipe.source}) are not in force: {values}",
        "In Python a recipe's name brings its teacher and context; `opsd train` applies its args too. Take them: "
        "OPSDConfig(…, **opsd.teachers.recipe_of(name).args), or set those that you mean.",
    )


# ---- known from the number of steps ---------------------------------------------------------------------------------


def causes_in_steps(args: OPSDConfig, steps: int) -> list[Finding]:
    """Return what a warm-up that is longer than the run keeps from learning.

    Args:
        args: settings.
        steps: optimizer steps of the run.
    """
    warmup = args.get_warmup_steps(steps)
    if args.lr_scheduler_type in WITHOUT_WARMUP or warmup < steps or not warmup or not args.learning_rate:
        return []
    saw, do = f"the warm-up has {warmup:,} steps and the run {steps:,}", "Lower warmup_steps, or train for more steps."
    if steps == 1:
        return [_fails(f"{saw}, at which the learning rate is 0", do)]
    return [_warns(f"{saw}: the learning rate rises from 0 to {(steps - 1) / warmup:.0%} of learning_rate", do)]


def left_undone(teacher: Teacher, done: int, steps: int) -> list[Finding]:
    """Return what of the teacher's schedule, and of its contexts', a run does not come to.

    Args:
        teacher: the teacher.
        done: optimizer steps done.
        steps: of the whole run.
    """
    sentences = [("teacher", teacher.left_undone(done, steps))]
    sentences += [("context", context.left_undone(steps)) for context in teacher.prompts.contexts]
    do = "Train for more steps, or let it change sooner."
    return [_warns(f"{what}: {text}", do) for what, text in dict.fromkeys(sentences) if text]


# ---- known from what the steps did ----------------------------------------------------------------------------------


@dataclass
class Counts:
    """What a run's steps did, counted; a checkpoint holds it.

    >>> Counts(steps=2, tokens=48).tokens
    48

    Args:
        steps: optimizer steps.
        rollouts: over all processes.
        tokens: scored tokens, over all processes.
        with_tokens: steps that scored any.
        with_gradient: steps whose gradient was more than rounding.
        with_rate: steps whose learning rate was above 0.
        sums: of metrics in `EXPLAINING`, one value per step.
        weights: the checksum of the trainable weights before step 1.
        seconds: wall clock of the steps, sampling included; evaluations and saves are not.
        cpu_seconds: processor time of this process in the steps, all threads together.
    """

    steps: int = 0
    rollouts: int = 0
    tokens: int = 0
    with_tokens: int = 0
    with_gradient: int = 0
    with_rate: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    weights: str = ""
    seconds: float = field(default=0.0, compare=False)
    cpu_seconds: float = field(default=0.0, compare=False)

    def is_always(self, name: str, value: float) -> bool:
        """Tell whether a metric had this value in every step."""
        return name in self.sums and self.sums[name] == value * self.steps


class Learning(TrainerCallback):
    """Counts what a run trains, and says what keeps it from learning.

    >>> trainer.train()
    learned     nothing: learning_rate is 0, so no step changes a weight. Set a learning_rate above 0.
    >>> trainer.learning.learned
    False

    Args:
        parts: what the run is made of.
        averages: what the run measures, of which the latest step's values are read.
    """

    def __init__(self, parts: RunParts, averages: Averages):
        self._args, self._scorer, self._groups, self._averages = parts.args, parts.scorer, parts.groups, averages
        self._accelerator, self._brings_optimizer = parts.accelerator, any(parts.optimizers)
        teacher, brings = parts.scorer.teacher, self._brings_optimizer
        self._known = causes_in_settings(parts.args, teacher, parts.rows, parts.recipe, brings_optimizer=brings)
        self._gradient = self._rate = 0.0
        self._began = 0.0, 0.0  # wall clock and processor time at the start of the step
        self._announce(self._known)
        self.counts = Counts()
        self.findings = list(self._known)

    @property
    def is_done(self) -> bool:
        """Whether this process has counted the run's steps."""
        return self.counts.steps > 0

    @property
    def learned(self) -> bool:
        """Whether the last `train` changed weights by a gradient, as far as was counted."""
        return not any(finding.status == "fail" for finding in self.findings)

    @property
    def lines(self) -> list[str]:
        """What a run prints last: steps and tokens, why it learned nothing, and what it did not do."""
        counts, findings = self.counts, self.findings
        titles = {"fail": "learned     nothing: ", "warn": "not done    "}
        return [
            f"trained     {_count(counts.steps, 'step')} on {counts.tokens:,} tokens of "
            f"{_count(counts.rollouts, 'rollout')}",
            *(f"{titles[finding.status]}{finding.saw}. {finding.do}" for finding in findings),
        ]

    @property
    def description(self) -> dict[str, Any]:
        """The same in plain values, for the run card."""
        counts = {name: getattr(self.counts, name) for name in ("steps", "rollouts", "tokens")}
        clocks = {name: round(getattr(self.counts, name), 3) for name in ("seconds", "cpu_seconds")}
        return {"learned": self.learned, **counts, **clocks, "lines": self.lines}

    # ---- events -----------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: OPSDConfig, state: TrainerState, control: TrainerControl, *, model: nn.Module, **kwargs: Any
    ) -> None:
        """Say what the number of steps keeps from learning, and go on counting where a checkpoint stopped."""
        steps = state.max_steps
        self._announce(self._rate_causes(steps) + left_undone(self._scorer.teacher, state.global_step, steps))
        stored = state.stateful_callbacks.get(STORED) if state.global_step else None
        self.counts = Counts(**stored["attributes"]["counts"]) if stored else Counts(weights=self._checksum(model))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clocks of the step; its rollouts are sampled after this."""
        self._began = time.perf_counter(), time.process_time()

    def see_gradient(self, norm: Any) -> None:
        """Take the norm of a step's gradient, before the optimizer steps."""
        self._gradient = float(norm)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, optimizer: Any, **kwargs: Any) -> None:
        """Take the learning rate of the step."""
        self._rate = max(float(group["lr"]) for group in optimizer.param_groups)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the step; after the first one, say why it trained nothing."""
        counts, tokens = self.counts, int(self._averages.latest["scored_tokens"])
        counts.steps += 1
        counts.seconds += time.perf_counter() - self._began[0]
        counts.cpu_seconds += time.process_time() - self._began[1]
        counts.rollouts += args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        counts.tokens += tokens
        counts.with_tokens += tokens > 0
        counts.with_gradient += self._gradient > ROUNDING
        counts.with_rate += self._rate > 0
        for name in EXPLAINING:
            if name in self._averages.latest:
                counts.sums[name] = counts.sums.get(name, 0.0) + self._averages.latest[name]
        state.stateful_callbacks[STORED] = {"args": {}, "attributes": {"counts": asdict(counts)}}
        if counts.steps == 1:
            self._announce(self._causes_in_rollouts(), "step 1      ")

    def on_train_end(
        self, args: OPSDConfig, state: TrainerState, control: TrainerControl, *, model: nn.Module, **kwargs: Any
    ) -> None:
        """Find out what the run did not do."""
        if not self.counts.steps:  # a finished run was resumed, from a checkpoint without counts
            return
        steps = state.global_step
        findings = [*self._known, *self._rate_causes(state.max_steps), *self._causes_in_rollouts()]
        findings += left_undone(self._scorer.teacher, steps, steps)
        is_same = self._checksum(model) == self.counts.weights  # a collective: before anything that may differ
        if not any(each.status == "fail" for each in findings):
            if not self.counts.with_rate:
                saw = f"the learning rate was 0 in {_count(steps, 'step')}"
                findings.append(_fails(saw, "Check the optimizer and its scheduler."))
            elif is_same:
                findings.append(_fails("no trainable weight changed", "Raise learning_rate, or train float32 weights."))
        self.findings = findings

    def _rate_causes(self, steps: int) -> list[Finding]:
        return [] if self._brings_optimizer else causes_in_steps(self._args, steps)

    def _causes_in_rollouts(self) -> list[Finding]:
        """Return what left steps without tokens, rewards or gradients, in all steps counted so far."""
        counts, is_explained = self.counts, any(each.status == "fail" for each in self._known)
        findings = [_warns(saw, do) for saw, do in self._reward_causes()]
        if not counts.with_tokens:
            reasons = list(self._reward_causes())
            if not reasons and not is_explained:
                reasons = [self._selection_cause()]
            start = f"no token was scored in {_count(counts.steps, 'step')}"
            findings = [_fails(f"{start}: {saw}", do) for saw, do in reasons]
        if 0 < counts.with_tokens < counts.steps:
            without = counts.steps - counts.with_tokens
            findings.append(
                _warns(f"{without:,} of {counts.steps:,} steps scored no token", "Plot scored_tokens over the steps.")
            )
        if counts.with_tokens and not counts.with_gradient and not is_explained:
            saw = f"the gradient was 0 in {_count(counts.steps, 'step')} (its norm below {ROUNDING:g}: rounding)"
            findings.append(_fails(saw, "Compare teacher and student: `opsd doctor`."))
        return findings

    def _reward_causes(self) -> Iterator[tuple[str, str]]:
        """Yield (what was seen, way out) of rewards that told no rollouts apart."""
        counts, groups = self.counts, self._groups
        bound, rollouts = f"success_reward {groups.success_reward:g}", f"{counts.rollouts:,} rollouts"
        shows_success = any("sibling" in context.columns for context in self._scorer.teacher.prompts.contexts)
        if counts.is_always("group/right", 0) and (shows_success or groups.distill_on == "right"):
            mean = counts.sums.get("reward", 0.0) / counts.steps
            yield (
                f"0 of {rollouts} reached {bound} (mean reward {mean:.3g})",
                "Lower success_reward, check reward_funcs, sample more per prompt, or take questions that the model "
                "can answer.",
            )
        elif counts.is_always("group/without_context", 1):
            yield f"0 of {rollouts} had a field for the teacher's context", "Sample more per prompt."
        if counts.is_always("group/right", 1) and groups.distill_on == "wrong":
            yield f"{rollouts} all reached {bound}, and distill_on is 'wrong'", "Take harder questions."
        if counts.is_always("group/flat", 1) and groups.grpo_coef:
            yield (
                f"the GRPO term had no advantage: in each group of {groups.num_generations} rollouts all rewards are "
                "equal",
                "Check reward_funcs, or take questions that the model answers sometimes.",
            )

    def _selection_cause(self) -> tuple[str, str]:
        """Return (what was seen, way out) of a token selection that left out every token."""
        args, selection = self._args, self._scorer.selection
        if args.mask_truncated_completions and self.counts.is_always("completions/clipped_ratio", 1):
            length = f"max_completion_length {args.max_completion_length:,}"
            saw = f"every completion was cut at {length}, and mask_truncated_completions leaves those out"
            return saw, "Raise max_completion_length."
        return f"none is left of the tokens {selection.describe()}", "Look at rollouts with log_completions."

    def _announce(self, findings: Sequence[Finding], title: str = "warning     ") -> None:
        for finding in findings:
            self._accelerator.print(f"{title}{finding.saw}. {finding.do}", flush=True)

    def _checksum(self, model: nn.Module) -> str:
        """Return a hash of all trainable weights of all processes."""
        local = [checksum(local_shard(p.detach())) for p in model.parameters() if p.requires_grad]
        return hashlib.sha256(str(gather_object([local])).encode()).hexdigest()[:16]


def checksum(values: Tensor) -> int:
    """Return a sum over a tensor's values, modulo 2⁶⁴, to which each adds a number made of its bits and its place.

    At one place other bits always add another number, so one value that changes always changes the sum. Several
    changes, or values that change places, leave it the same by chance only.

    Args:
        values: of any dtype, on any device; read bit by bit, so 0.0 and -0.0 differ.
    """
    bits, total = values.contiguous().flatten().view(INTEGERS[values.element_size()]), 0
    for start in range(0, len(bits), BLOCK):
        block = bits[start : start + BLOCK]
        place = torch.arange(start, start + len(block), device=bits.device)
        mixed = (block + place * FACTORS[0]) * FACTORS[1]  # int64, which wraps around
        total += int(((mixed ^ (mixed >> 32)) * FACTORS[0]).sum())
    return total % 2**64
