"""OPSDConfig: TRL's DistillationConfig and the settings that opsd adds to it.

Settings of the loss, of groups and of token selection stand beside the classes that use them, and are inherited. The
teacher and its context are not settings: they are arguments of the trainer, and keys of a run's YAML.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import wraps
from typing import Any

import torch
from trl import DistillationConfig

from opsd.errors import ConfigError, OPSDWarning
from opsd.losses.divergence import DivergenceSettings
from opsd.losses.objective import Objective, ObjectiveSettings
from opsd.settings import read_values
from opsd.training.controls import CONTROLS, control_of
from opsd.training.groups import GroupSettings
from opsd.training.machine import choose_bf16
from opsd.training.ranges import check_ranges
from opsd.training.resume import check_allowed
from opsd.training.sampling import check_sampling, warn_sampling
from opsd.training.schedules import StepSchedule
from opsd.training.token_selection import TokenSelectionSettings

# Below it most training tokens are not the student's own, and it is not trained on the prefixes of its inference.
LOW_LMBDA = 0.5
# Nearer to an end than this the generalised JSD is close to 0, whatever the two models predict.
NEAR_AN_END = 0.05

# Old name -> new name, of settings and of their values. An old name is refused with the new one.
RENAMED = {"anchor_coef": "ref_kl_coef", "future_cost": "reward_to_go", "route": "distill_on"}
RENAMED_VALUES = {"baseline": {"least_variance": "optimal"}, "reward_to_go": {"length_normalised": "mean"}}


def check_renamed(names: Iterable[str], where: str) -> None:
    """Refuse names that settings no longer have.

    Raises:
        ConfigError: gives the new name.
    """
    for name in names:
        if name in RENAMED:
            raise ConfigError(
                f"{where}: the setting {name!r} is now called {RENAMED[name]!r}, and the old name is not read. Write "
                f"{RENAMED[name]} in its place; it means the same."
            )


def _with_new_names(config: type) -> type:
    """Make the constructor of a settings class refuse old names of settings."""
    init = config.__init__  # type: ignore[misc]

    @wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        check_renamed(kwargs, config.__name__)
        init(self, *args, **kwargs)

    config.__init__ = checked  # type: ignore[misc]
    return config


@_with_new_names
@dataclass
class OPSDConfig(DivergenceSettings, ObjectiveSettings, TokenSelectionSettings, GroupSettings, DistillationConfig):
    """Settings of an opsd run; every field of TRL's DistillationConfig and transformers' TrainingArguments is here too.

    `opsd train --help-all` lists them, and docs/losses.md those of the loss.

    Raises:
        ConfigError: a value outside its range, or a name that a setting once had, before any model loads.

    Example:
        >>> args = OPSDConfig("runs/first", beta=0.0, ref_kl_coef=0.1, learning_rate=1e-5, max_steps=100)
        >>> args.objective.describe()
        'forward KL(teacher ‖ student); + 0.1·KL(student ‖ student at step 0)'
    """

    use_cpu: bool = field(default=False, metadata={"help": "Run on the CPU, also where there is a GPU."})
    control: str | None = field(
        default=None,
        metadata={
            "help": "Train a control in place of the method, with everything else equal: "
            + "; ".join(f"{name} ({control.asks})" for name, control in CONTROLS.items())
        },
    )
    lmbda: float = field(
        default=1.0,
        metadata={
            "help": "Share of rows trained on the student's own rollouts, in [0, 1] (GKD, arXiv 2306.13649). The rest "
            "uses the row's own `completion`, or the teacher's samples with `seq_kd`. 0 never generates."
        },
    )
    lmbda_schedule: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "lmbda by step, such as {0: 0.0, 8: 1.0}: off-policy first, then on-policy (Qwen3; arXiv "
            "2606.30044). Unset: lmbda at every step."
        },
    )
    steps_per_generation: int | None = field(
        default=None,
        metadata={
            "help": "Micro-batches that one batch of rollouts gives, as TRL's GRPO counts them: a multiple of "
            "gradient_accumulation_steps. 4 times as many sample the rollouts of 4 optimizer steps at once, which "
            "takes the memory of as many rows; the later of these steps train on samples of older weights, and may "
            "teach less (docs/results.md). An epoch has whole batches of rollouts. Unset: one step's."
        },
    )
    completion_length_schedule: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Tokens of the longest completion by step, such as {0: 64, 50: 512}, max_completion_length at most "
            "(ShortOPD, arXiv 2607.13124). Unset: max_completion_length at every step."
        },
    )
    seq_kd: bool = field(
        default=False,
        metadata={"help": "Take off-policy completions from the teacher's samples. No effect where lmbda is 1."},
    )
    contrast_context: str | None = field(
        default=None,
        metadata={
            "help": "Template with a wrong hint: tokens are weighed by how much log t(y) differs between it and the "
            "teacher's context (RLCSD, arXiv 2606.11709). Unset: no such weight. Costs one forward pass."
        },
    )
    student_system_prompt: str | None = field(
        default=None,
        metadata={"help": "The student's system turn, in rows that have none. A context's `system` is the teacher's."},
    )
    drop_long_rows: bool = field(
        default=False,
        metadata={
            "help": "Drop training rows whose prompt, the student's or the teacher's with its context, leaves no room "
            "for max_completion_length tokens or exceeds max_prompt_tokens; their number is printed and noted in the "
            "run card. Off: such a row is an error."
        },
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward function in the sum. Unset: 1 each."}
    )
    generation_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "More settings of sampling, by the engine's names: eos_token_id (ids that end a completion beside "
            "the model's and the tokenizer's own), and what reshapes the distribution, such as suppress_tokens."
        },
    )
    health_action: str = field(
        default="none",
        metadata={
            "help": "What to do when a monitor of health says act: none, stop (with a checkpoint), or roll_back: stop, "
            "and take the best checkpoint, which needs an evaluation with rule: best."
        },
    )
    trace_rollouts: int = field(
        default=8,
        metadata={
            "help": "Rollouts of each step that are kept in traces/ of the output folder, with what student and "
            "teacher gave every token: about 7 kB per 100 tokens. `opsd health` reads them. 0: none."
        },
    )
    trace_mb: float = field(
        default=64.0, metadata={"help": "MB that traces/ may take; above it every second file is removed."}
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "bfloat16 autocast. Unset: on a GPU that can, and on a CPU with instructions for it (AMX, "
            "AVX512-BF16); the choice is stored with the run and reused on resume."
        },
    )
    allow_changes: list[str] | None = field(
        default=None,
        metadata={
            "help": "What a resumed run may change on purpose, by name: settings such as learning_rate; data, rows, "
            "processes, teacher, evaluation, …. All else must be as in the checkpoint. The run card notes each change "
            "with its step."
        },
    )
    # Rollouts are sampled, and scored by the teacher, without dropout; a student with dropout is another model.
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Train without dropout, as rollouts are sampled and scored. TRL's default is off."},
    )
    # Rows reach the trainer as text: there is no tensor to pin, and torch warns about it where there is no GPU.
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "No effect: rows are text, not tensors."})
    # A NaN that is replaced in the log hides the step at which a run broke; opsd stops at it instead.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Whether to leave NaN and infinity out of the log. opsd stops at them."}
    )

    bf16_is_default = False  # no setting: whether `bf16` was chosen here, so that a resumed run may take its own

    def __post_init__(self) -> None:
        self.__dict__.update(read_values(type(self), self.__dict__))
        check_ranges(self)
        control = control_of(self.control)
        for name, value in control.settings.items() if control else ():
            setattr(self, name, value)
        self._check()
        if not self.bf16 and not torch.accelerator.is_available():
            # Where it is not set transformers refuses bf16 on a CPU, and processes there train each for itself.
            self.use_cpu = True
        if self.bf16 is None:
            self.bf16, self.bf16_is_default = not self.fp16 and choose_bf16(self.use_cpu), True
        super().__post_init__()  # which also reads generation_kwargs from text
        self._use_one_gpu()
        check_sampling(self, self.objective)
        self._warn()

    @property
    def on_policy_share(self) -> StepSchedule:
        """The share of rows trained on the student's own rollouts, by step: `lmbda_schedule`, or `lmbda`."""
        if self.lmbda_schedule is None:
            return StepSchedule({0: self.lmbda})
        return StepSchedule.parse("lmbda_schedule", self.lmbda_schedule)

    @property
    def completion_length(self) -> StepSchedule:
        """Tokens of the longest completion, by step: `completion_length_schedule`, or `max_completion_length`."""
        if self.completion_length_schedule is None:
            return StepSchedule({0: self.max_completion_length or 0})
        return StepSchedule.parse("completion_length_schedule", self.completion_length_schedule)

    @property
    def steps_per_rollouts(self) -> int:
        """Optimizer steps whose rollouts are sampled at once: `steps_per_generation` ÷ accumulation steps."""
        steps = self.gradient_accumulation_steps
        return (self.steps_per_generation or steps) // steps

    @property
    def objective(self) -> Objective:
        """The training loss, as the settings describe it."""
        return Objective.from_config(self)

    def _check(self) -> None:
        for name, renamed in RENAMED_VALUES.items():
            if (value := getattr(self, name)) in renamed:
                raise ConfigError(
                    f"{name} is {value!r}, which is now called {renamed[value]!r}, and the old name is not read. Write "
                    f"{renamed[value]} in its place; it means the same."
                )
        self._check_on_policy(self.objective)
        self.check_token_selection()
        self.check_groups()
        check_allowed(self.allow_changes or (), [setting.name for setting in fields(self)])
        self._check_group_size()
        if self.hub_token:
            raise ConfigError(
                "hub_token would be written into training_args.bin in every checkpoint. Log in with `hf auth login`, "
                "or set the environment variable HF_TOKEN."
            )
        if self.max_completion_length is None or self.max_completion_length < 1:
            raise ConfigError(
                f"max_completion_length must be at least 1, and is {self.max_completion_length}. Without a token "
                "there is nothing to score. Set it to the tokens a full answer needs."
            )
        if self.neftune_noise_alpha:
            raise ConfigError(
                "neftune_noise_alpha adds noise to the embeddings while training, so the student that is trained would "
                "not be the one that sampled, and its divergence from the teacher would be the noise's. Leave it out."
            )
        self._check_schedules()
        self._check_steps_per_generation()
        self.check_any_token(int(self.completion_length.least))

    def _check_schedules(self) -> None:
        share, name = self.on_policy_share, "lmbda" if self.lmbda_schedule is None else "lmbda_schedule"
        if self.lmbda_schedule is not None and self.lmbda != 1.0:
            raise ConfigError(
                f"lmbda is {self.lmbda:g} and lmbda_schedule {self.lmbda_schedule}: two settings of one share. Leave "
                "one of them out."
            )
        if not (share.least >= 0.0 and share.most <= 1.0):
            raise ConfigError(
                f"{name} must lie between 0 and 1, and is {getattr(self, name)}. It is the share of rows trained on "
                "the student's own rollouts. Use 1 for all of them, 0 for none."
            )
        lengths, longest = self.completion_length.values.values(), self.max_completion_length
        if any(length != int(length) or not 1 <= length <= (longest or 0) for length in lengths):
            raise ConfigError(
                f"completion_length_schedule must hold whole numbers of tokens from 1 to max_completion_length, and is "
                f"{self.completion_length_schedule} with {longest}. Prompts and memory are checked for "
                "max_completion_length. Raise that, or lower the schedule."
            )

    def _check_steps_per_generation(self) -> None:
        steps, together = self.gradient_accumulation_steps, self.steps_per_rollouts
        if self.steps_per_generation is not None and self.steps_per_generation % steps:
            raise ConfigError(
                f"steps_per_generation is {self.steps_per_generation}, and one optimizer step takes {steps} "
                "micro-batches (gradient_accumulation_steps). A step would train on rollouts of two batches. Make "
                "it a multiple."
            )
        between = [step for step in self.completion_length.values if step % together]
        if between:
            raise ConfigError(
                f"completion_length_schedule changes at step {between[0]}, and the rollouts of {together} optimizer "
                f"steps are sampled at once (steps_per_generation). Let it change at multiples of {together}."
            )

    def _check_group_size(self) -> None:
        size, rollouts = self.num_generations, self.per_device_train_batch_size * self.gradient_accumulation_steps
        if size < 1 or rollouts % size:
            raise ConfigError(
                f"num_generations is {size}, and a step makes {rollouts} rollouts per device (batch per device × "
                "accumulation steps). A group would span two steps or devices, and its rollouts could not be compared. "
                "Make one a multiple of the other."
            )
        if size > 1 and self.on_policy_share.least < 1.0 and self.control is None:
            raise ConfigError(
                f"num_generations is {size} and lmbda {self.on_policy_share.least:g}: off-policy rows have one "
                "completion, so a group of them would be one rollout several times. Set one of them to 1."
            )

    def _check_on_policy(self, objective: Objective) -> None:
        share = self.on_policy_share.least
        if objective.uses_sampled_tokens and share < 1.0:
            raise ConfigError(
                f"support 'sampled' and reward_to_go {self.reward_to_go!r} need tokens that the student sampled, and "
                f"lmbda is {share:g}: {1 - share:.0%} of the rows would have completions of others, on which "
                "a policy gradient is biased. Set lmbda to 1, or compare distributions: support 'full' and "
                "reward_to_go 'none'."
            )

    def _use_one_gpu(self) -> None:
        """Let one process use one GPU; transformers would split its batches over all with DataParallel."""
        if self.n_gpu > 1:
            warnings.warn(
                f"there are {self.n_gpu} GPUs, and one process uses one of them. Start a process for each: "
                f"torchrun --nproc_per_node {self.n_gpu} -m opsd train …; or choose one: CUDA_VISIBLE_DEVICES=0.",
                OPSDWarning,
                stacklevel=5,
            )
            self._n_gpu = 1

    def _warn(self) -> None:
        self._warn_no_effect()
        warn_sampling(self, stacklevel=5)
        if self.bf16 and self.device.type == "cpu" and not choose_bf16(self.use_cpu):
            warnings.warn(
                "bf16 is on, and this CPU has no instructions for bfloat16: torch emulates it, and a step takes many "
                "times as long as in float32. Leave bf16 out; opsd chooses what is faster on the machine.",
                OPSDWarning,
                stacklevel=5,
            )
        share = self.on_policy_share.last
        if share < LOW_LMBDA and self.control is None:
            warnings.warn(
                f"lmbda is {share:g}: {1 - share:.0%} of the training tokens are not the student's. It is "
                "then trained on prefixes that do not occur at its inference (exposure bias). Set lmbda to 1 for "
                "on-policy training.",
                OPSDWarning,
                stacklevel=5,
            )
        if self.seq_kd and self.on_policy_share.least == 1.0:
            warnings.warn("seq_kd has no effect where lmbda is 1: no row is off-policy.", OPSDWarning, stacklevel=5)
        kind = self.objective.divergence.kind
        if kind.vanishes_near_ends and min(self.beta, 1.0 - self.beta) < NEAR_AN_END:
            warnings.warn(
                f"beta is close to an end: the {kind.describe(self.beta)} goes to 0 at both ends, so the loss and its "
                "gradient nearly vanish. For the exact KLs use beta 0 (forward) or 1 (reverse).",
                OPSDWarning,
                stacklevel=5,
            )

    def _warn_no_effect(self) -> None:
        """Name settings that change nothing in this combination."""
        kind = self.objective.divergence.kind
        idle = {
            "beta": self.beta != DivergenceSettings.beta and self.divergence is not None and not kind.uses_beta,
            "support_k": self.support in ("full", "sampled") and self.support_k != DivergenceSettings.support_k,
            "tail": self.support in ("full", "sampled") and self.tail != DivergenceSettings.tail,
            "force_tail": self.force_tail and (self.tail != "none" or not kind.falls_off_support),
            "baseline": self.support != "sampled" and self.baseline != DivergenceSettings.baseline,
            "keep_by": self.keep_fraction == 1.0 and self.keep_by != ObjectiveSettings.keep_by,
            "prefix_weight": self.prefix_weight > 0.0 and self.max_completion_length == 1,
            "sibling_choice": self.num_generations < 3 and self.sibling_choice != GroupSettings.sibling_choice,
            "grpo_on": self.grpo_coef == 0.0 and self.grpo_on != GroupSettings.grpo_on,
            "importance_clip": self.importance_clip is not None and not self.use_vllm and self.steps_per_rollouts == 1,
        }
        for name in (name for name, has_no_effect in idle.items() if has_no_effect):
            warnings.warn(f"{name} has no effect in this combination of settings.", OPSDWarning, stacklevel=6)
