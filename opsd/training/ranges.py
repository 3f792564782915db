"""The ranges of settings that transformers and peft do not check, or check after a model has loaded."""

from __future__ import annotations

import math
from typing import Any

from opsd.errors import ConfigError

AT_LEAST_1 = (1, math.inf)
POSITIVE = (math.ulp(0.0), math.inf)
NOT_NEGATIVE = (0, math.inf)
SHARE = (0, 1)
DECAY = (0, math.nextafter(1.0, 0.0))  # of a running mean: at 1 it would never move
WORDS = {AT_LEAST_1: "1 or more", POSITIVE: "above 0", NOT_NEGATIVE: "0 or more", SHARE: "between 0 and 1"}
WORDS[DECAY] = "0 or more, and below 1"
# setting -> (smallest, largest)
RANGES: dict[str, tuple[float, float]] = {
    "learning_rate": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "adam_beta1": DECAY,
    "adam_beta2": DECAY,
    "adam_epsilon": POSITIVE,
    "max_grad_norm": NOT_NEGATIVE,
    "warmup_steps": NOT_NEGATIVE,
    "num_train_epochs": POSITIVE,
    "per_device_train_batch_size": AT_LEAST_1,
    "per_device_eval_batch_size": AT_LEAST_1,
    "gradient_accumulation_steps": AT_LEAST_1,
    "steps_per_generation": AT_LEAST_1,
    "save_steps": POSITIVE,
    "save_total_limit": AT_LEAST_1,
    "seed": NOT_NEGATIVE,
    "trace_rollouts": NOT_NEGATIVE,
    "trace_mb": POSITIVE,
    "dataloader_num_workers": NOT_NEGATIVE,
    "lora_r": AT_LEAST_1,
    "lora_dropout": DECAY,
}


def check_ranges(settings: Any) -> None:
    """Refuse a setting out of its range; one that is None has no value.

    Raises:
        ConfigError: names the setting, its value and its range.
    """
    for name, (least, most) in RANGES.items():
        value = getattr(settings, name, None)
        if value is not None and not least <= value <= most:
            raise ConfigError(f"{name} must be {WORDS[least, most]}, and is {value:g}.")
