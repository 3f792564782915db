"""OPSDConfig: TRL's DistillationConfig and what opsd adds to it.

Which teacher and what it is shown are not here: they are arguments of the trainer, and keys of a run's YAML.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from trl import DistillationConfig

from opsd.errors import ConfigError, OPSDWarning
from opsd.losses.divergence import NEAR_AN_END, Divergence
from opsd.precision import choose_bf16

# Below it most training tokens are not the student's own: what it meets at inference it has not been trained on.
LOW_LMBDA = 0.5


@dataclass
class OPSDConfig(DistillationConfig):
    """Settings of an opsd run; every field of TRL's DistillationConfig and transformers' TrainingArguments is here too.

    `beta` and `temperature` choose the divergence as in GKD: 1 is the reverse KL, 0 the forward KL, between them the
    generalised JSD.

    Raises:
        ConfigError: a value outside its range, before any model loads.
    """

    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU, also where there is a GPU."})
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
        self._check()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and choose_bf16(self.output_dir, self.use_cpu)
            if self.bf16 and not torch.accelerator.is_available():
                self.use_cpu = True  # transformers takes bf16 on a CPU only from those who said that they mean the CPU
        super().__post_init__()
        self._warn()

    def _check(self) -> None:
        Divergence(self.beta, self.temperature)
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

    def _warn(self) -> None:
        if self.lmbda < LOW_LMBDA:
            warnings.warn(
                f"lmbda is {self.lmbda:g}: {1 - self.lmbda:.0%} of the training tokens are not the student's own. It "
                "is then trained on prefixes it will not meet at inference (exposure bias); 1 is on-policy.",
                OPSDWarning,
                stacklevel=4,
            )
        if self.seq_kd and self.lmbda == 1.0:
            warnings.warn("seq_kd has no effect where lmbda is 1: no row is off-policy.", OPSDWarning, stacklevel=4)
        if 0.0 < min(self.beta, 1.0 - self.beta) < NEAR_AN_END:
            warnings.warn(
                f"beta is {self.beta:g}: the generalised JSD goes to 0 at both ends, so the loss and its gradient "
                "nearly vanish. For the exact KLs use 0 (forward) or 1 (reverse).",
                OPSDWarning,
                stacklevel=4,
            )
