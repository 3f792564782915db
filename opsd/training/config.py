"""OPSDConfig: TRL's DistillationConfig and what opsd adds to it.

Which teacher and what it is shown are not here: they are arguments of the trainer, and keys of a run's YAML.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from trl import DistillationConfig

from opsd.errors import ConfigError, OPSDWarning
from opsd.losses import Divergence, Objective
from opsd.training.controls import CONTROLS, control_of
from opsd.training.groups import Groups
from opsd.training.machine import choose_bf16
from opsd.training.token_selection import TokenSelectionSettings

# Below it most training tokens are not the student's own: what it meets at inference it has not been trained on.
LOW_LMBDA = 0.5
# Nearer to an end than this the generalised JSD is close to 0, whatever the two models predict.
NEAR_AN_END = 0.05


@dataclass
class OPSDConfig(TokenSelectionSettings, DistillationConfig):
    """Settings of an opsd run; every field of TRL's DistillationConfig and transformers' TrainingArguments is here too.

    `beta` and `temperature` choose the divergence as in GKD: 1 is the reverse KL, 0 the forward KL, between them the
    generalised JSD.

    Raises:
        ConfigError: a value outside its range, before any model loads.
    """

    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU, also where there is a GPU."})
    control: str | None = field(
        default=None,
        metadata={
            "help": "Train a control in place of the method, everything else alike: "
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
    seq_kd: bool = field(
        default=False,
        metadata={"help": "Take off-policy completions from the teacher's own samples. No effect where lmbda is 1."},
    )
    divergence: str | None = field(
        default=Divergence.divergence,
        metadata={
            "help": "The divergence by its name in losses.pointwise.DIVERGENCES: forward_kl, reverse_kl, "
            "generalised_jsd, or one that you added. Unset: the one that beta chooses."
        },
    )
    support: str = field(
        default=Divergence.support,
        metadata={
            "help": "What is compared at each token: full (the whole vocabulary), teacher_top_k, student_top_k, union, "
            "or sampled (the sampled token, as a policy gradient)."
        },
    )
    support_k: int = field(
        default=Divergence.support_k,
        metadata={"help": "Tokens per side of a top-k support. SDPO takes 100, SDFT's recipe 20."},
    )
    tail: str = field(
        default=Divergence.tail,
        metadata={
            "help": "The mass outside a top-k support: bucket (one entry for the rest), renormalise, or none (refused "
            "with beta above 0 unless force_tail)."
        },
    )
    force_tail: bool = field(
        default=Divergence.force_tail,
        metadata={"help": "Train with tail none although the loss falls when mass leaves the support."},
    )
    entry_clip: float | None = field(
        default=Divergence.entry_clip,
        metadata={
            "help": "Nats that each vocabulary entry adds at most (OPSD: 0.05). A forward KL may then be negative, "
            "which is no error."
        },
    )
    token_clip: float | None = field(
        default=Divergence.token_clip, metadata={"help": "Nats that each token adds at most; no gradient above."}
    )
    entropy_gate: float | None = field(
        default=Divergence.entropy_gate,
        metadata={"help": "Nats of teacher entropy above which the forward KL is added to the reverse KL (EOPD)."},
    )
    baseline: str = field(
        default=Divergence.baseline,
        metadata={"help": "With support sampled, what a log-ratio is compared with: optimal, or none."},
    )
    keep_fraction: float = field(
        default=Objective.keep_fraction,
        metadata={
            "help": "Share of each rollout's tokens to train on, in (0, 1] (TIP: 0.5). Costs a pass over the head."
        },
    )
    keep_by: str = field(
        default=Objective.keep_by,
        metadata={"help": "Which to keep: the highest student entropy, or disagreement (the divergence)."},
    )
    reward_to_go: str = field(
        default=Objective.reward_to_go,
        metadata={
            "help": "What a token pays for later ones, as a policy gradient: none, discounted (with support sampled: "
            "Thinking Machines), mean (with full support: MiniLLM)."
        },
    )
    discount: float = field(
        default=Objective.discount, metadata={"help": "Of reward_to_go discounted, per token, in (0, 1]."}
    )
    importance_clip: float | None = field(
        default=Objective.importance_clip,
        metadata={
            "help": "Correct for an engine (vLLM) whose probabilities differ from the trainer's, by their ratio, at "
            "most this. Unset: no correction. SDPO takes 2."
        },
    )
    ref_kl_coef: float = field(
        default=Objective.ref_kl_coef,
        metadata={"help": "Weight of KL(student ‖ student at step 0, plain prompt). Costs one forward pass."},
    )
    contrast_context: str | None = field(
        default=None,
        metadata={
            "help": "A template with a wrong hint: tokens are weighed by what the teacher's own context says beyond it "
            "(RLCSD). Costs one forward pass."
        },
    )
    student_system_prompt: str | None = field(
        default=None,
        metadata={"help": "The student's system turn, in rows that have none. A context's `system` is the teacher's."},
    )
    num_generations: int = field(
        default=1,
        metadata={
            "help": "Rollouts per prompt. Batch per device × accumulation steps must be a multiple of it, and counts "
            "rollouts. SDPO takes 8."
        },
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward function in the sum. Unset: 1 each."}
    )
    success_reward: float = field(
        default=Groups.success_reward,
        metadata={"help": "From this reward on a rollout is right: it may be shown to its group's teacher (SDPO)."},
    )
    distill_on: str = field(
        default=Groups.distill_on,
        metadata={"help": "Which rollouts are distilled: all, wrong (SRPO), or right."},
    )
    grpo_coef: float = field(
        default=Groups.grpo_coef,
        metadata={"help": "Weight of a GRPO term on rewards beside the distillation, 0 for none."},
    )
    grpo_on: str = field(
        default=Groups.grpo_on,
        metadata={"help": "Which rollouts the GRPO term reinforces: all, or undistilled (SRPO)."},
    )
    loss_budget_mb: float | None = field(
        default=Objective.loss_budget_mb,
        metadata={"help": "MiB that the logits of a chunk may take. Unset: 128 on a CPU, 1,024 on a GPU."},
    )
    recompute_loss: bool = field(
        default=Objective.recompute_loss,
        metadata={
            "help": "Do not keep the gradient of the head, which is as large as the head, from forward to backward "
            "pass: half as many products again."
        },
    )
    compile_loss: bool | None = field(
        default=Objective.compile_loss,
        metadata={"help": "Fuse the loss's work between the products with torch.compile. Unset: on a GPU with Triton."},
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "bfloat16 autocast. Unset: on a GPU if it can, on a CPU if a measurement at start finds it at "
            "least 1.5 times faster than float32; the choice is stored with the run and reused on resume."
        },
    )
    # A rollout is sampled, and scored by the teacher, without dropout; a student with it would be another model.
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Train without dropout, as rollouts are sampled and scored. TRL's default is off."},
    )
    # Rows reach the trainer as text: there is no tensor to pin, and torch warns about it where there is no GPU.
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "No effect: rows are text, not tensors."})
    # A NaN that is replaced in the log hides the moment a run broke; opsd stops at it instead.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Whether to leave NaN and infinity out of the log. opsd stops at them."}
    )

    def __post_init__(self) -> None:
        control = control_of(self.control)
        for name, value in control.settings.items() if control else ():
            setattr(self, name, value)
        self._check()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and choose_bf16(self.output_dir, self.use_cpu)
            if self.bf16 and not torch.accelerator.is_available():
                self.use_cpu = True  # transformers takes bf16 on a CPU only from those who said that they mean the CPU
        super().__post_init__()
        self._warn()

    @property
    def objective(self) -> Objective:
        """What training minimises."""
        return Objective.from_config(self)

    def _check(self) -> None:
        self._check_on_policy(self.objective)
        if self.hub_token:
            raise ConfigError(
                "hub_token would be written into training_args.bin in every checkpoint. Log in with `hf auth login`, "
                "or set the environment variable HF_TOKEN."
            )
        if not 0.0 <= self.lmbda <= 1.0:
            raise ConfigError(
                f"lmbda must lie between 0 and 1, and is {self.lmbda}. It is the share of rows trained on the "
                "student's own rollouts. Use 1 for all of them, 0 for none."
            )
        if self.max_completion_length is None or self.max_completion_length < 1:
            raise ConfigError(
                f"max_completion_length must be at least 1, and is {self.max_completion_length}. Without a token "
                "there is nothing to score. Set it to the tokens a full answer needs."
            )
        self.check_token_selection()
        self._check_groups()

    def _check_groups(self) -> None:
        size, rollouts = self.num_generations, self.per_device_train_batch_size * self.gradient_accumulation_steps
        if size < 1 or rollouts % size:
            raise ConfigError(
                f"num_generations is {size}, and a step makes {rollouts} rollouts per device (batch per device × "
                "accumulation steps). A group would span two steps or devices, and its rollouts could not be compared. "
                "Make one a multiple of the other."
            )
        if size > 1 and self.lmbda < 1.0 and self.control is None:
            raise ConfigError(
                f"num_generations is {size} and lmbda {self.lmbda:g}: off-policy rows have one completion, so a group "
                "of them would be one rollout several times. Set one of them to 1."
            )

    def _check_on_policy(self, objective: Objective) -> None:
        sampled = objective.divergence.support == "sampled" or objective.reward_to_go != "none"
        if sampled and self.lmbda < 1.0:
            raise ConfigError(
                f"support 'sampled' and reward_to_go {self.reward_to_go!r} learn from tokens that the student sampled, "
                f"and lmbda is {self.lmbda:g}: {1 - self.lmbda:.0%} of the rows would bring tokens of others, on which "
                "a policy gradient is biased. Set lmbda to 1, or compare distributions: support 'full' and "
                "reward_to_go 'none'."
            )

    def _warn(self) -> None:
        self._warn_no_effect()
        if self.lmbda < LOW_LMBDA and self.control is None:
            warnings.warn(
                f"lmbda is {self.lmbda:g}: {1 - self.lmbda:.0%} of the training tokens are not the student's own. It "
                "is then trained on prefixes it will not meet at inference (exposure bias); 1 is on-policy.",
                OPSDWarning,
                stacklevel=4,
            )
        if self.seq_kd and self.lmbda == 1.0:
            warnings.warn("seq_kd has no effect where lmbda is 1: no row is off-policy.", OPSDWarning, stacklevel=4)
        kind = self.objective.divergence.kind
        if kind.vanishes_near_ends and min(self.beta, 1.0 - self.beta) < NEAR_AN_END:
            warnings.warn(
                f"beta is {self.beta:g}: the {kind.describe(self.beta)} goes to 0 at both ends, so the loss and its "
                "gradient nearly vanish. For the exact KLs use beta 0 (forward) or 1 (reverse).",
                OPSDWarning,
                stacklevel=4,
            )

    def _warn_no_effect(self) -> None:
        """Name settings that change nothing in this combination."""
        kind = self.objective.divergence.kind
        idle = {
            "beta": self.beta != Divergence.beta and self.divergence is not None and not kind.uses_beta,
            "support_k": self.support in ("full", "sampled") and self.support_k != Divergence.support_k,
            "tail": self.support in ("full", "sampled") and self.tail != Divergence.tail,
            "force_tail": self.force_tail and (self.tail != "none" or not kind.falls_off_support),
            "baseline": self.support != "sampled" and self.baseline != Divergence.baseline,
            "keep_by": self.keep_fraction == 1.0 and self.keep_by != Objective.keep_by,
            "grpo_on": self.grpo_coef == 0.0 and self.grpo_on != Groups.grpo_on,
            "importance_clip": self.importance_clip is not None and not self.use_vllm,
        }
        for name in (name for name, has_no_effect in idle.items() if has_no_effect):
            warnings.warn(f"{name} has no effect in this combination of settings.", OPSDWarning, stacklevel=5)
