"""What a resumed run must have in common with the run of its checkpoint, and what a user may change on purpose.

Everything that a run is made of is compared by value. Settings that cannot change a number are listed here, so a
setting that a later version adds is compared until someone lists it. Knows plain
dictionaries, an optimizer and its schedule.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from opsd.errors import CheckpointError, ConfigError, OPSDWarning, did_you_mean

# Settings that cannot change a number; every other one is compared. `logging_steps` is: a log entry is an average over
# its steps, and a gate reads the log. So is `dataloader_num_workers`: a stream is split over workers.
NOT_COMPARED = {
    "where the run writes, and its name": ("output_dir", "run_name", "project"),
    "how it was called": ("resume_from_checkpoint", "allow_changes", "do_train", "do_eval", "do_predict"),
    "the machine": (
        *("use_cpu", "local_rank", "ddp_timeout", "trust_remote_code", "torch_empty_cache_steps"),
        *("dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
        "dataloader_multiprocessing_context",
    ),
    # Not per_device_eval_batch_size: an evaluation samples batch by batch, from the random state that training goes on
    # with.
    "the memory of an evaluation": ("eval_accumulation_steps",),
    "vLLM's address and memory": (
        *("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port"),
        "vllm_gpu_memory_utilization",
    ),
    "which checkpoints it keeps": (
        *("save_strategy", "save_steps", "save_total_limit", "save_only_model", "save_on_each_node"),
        "enable_jit_checkpoint",
    ),
    "what it prints and reports": (
        *("log_level", "log_level_replica", "log_on_each_node", "disable_tqdm", "report_to", "log_completions"),
        *("num_completions_to_print", "log_unique_prompts", "skip_memory_metrics", "debug"),
        *("trace_rollouts", "trace_mb", "health_action"),
        *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    ),
    "the hub": (
        *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
        "hub_revision",
    ),
}

# What is compared beside the settings, and how it is named in errors and by `allow_changes`.
COMPARED = {
    "student": "hash of the weights that the run began with",
    "trainable": "names of the parameters that train",
    "adapter": "configuration of the student's adapter",
    "model": "configuration of the student's model",
    "dtypes": "number formats of the student's weights",
    "optimizer": "an optimizer that was given",
    "scheduler": "a schedule of the learning rate that was given",
    "sharding": "how parameters are sharded",
    "teacher": "strategy, settings and contexts",
    "contrast": "the contrast context",
    "rewards": "reward functions, by name and code",
    "tools": "the student's tools, by name and code",
    "left_out_ids": "ids that mask_tokens and mask_special_tokens leave out",
    "end_ids": "ids that end a completion",
    "tokenizer": "hash of the student's tokenizer",
    "chat_template": "hash of the student's chat template",
    "data": "hash of the training rows, their content and order",
    "rows": "number of training rows",
    "eval_data": "hash of the evaluation rows",
    "evaluation": "the evaluation plan and its rows",
    "processes": "number of processes",
}

# The optimizer's, beside the learning rate.
OPTIMIZER_SETTINGS = ("optim", "optim_args", "optim_target_modules", "weight_decay",
                      "adam_beta1", "adam_beta2", "adam_epsilon")  # fmt: skip
_IN_THE_OPTIMIZER = "the optimizer's state in the checkpoint holds it, and would replace a new value"
# Never to be changed, and why.
FIXED = {
    "student": "the checkpoint's weights and its teacher come from these weights",
    "trainable": "the optimizer's state in the checkpoint belongs to these parameters",
    "adapter": "the checkpoint's adapter was trained with it",
    "sharding": "the optimizer's state in the checkpoint is laid out for it",
    "teacher.strategy": "the teacher's state in the checkpoint is of another kind",
    "optimizer": _IN_THE_OPTIMIZER,
    "scheduler": _IN_THE_OPTIMIZER,
    **dict.fromkeys(OPTIMIZER_SETTINGS, _IN_THE_OPTIMIZER),
}
SCHEDULE = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_steps",
    "num_train_epochs",
)
# Never refused: named in a warning and in the run card.
RECORDED = ("versions", "hardware")


@dataclass(frozen=True)
class Change:
    """What differs between a checkpoint and the run that resumes from it.

    >>> Change("learning_rate", 1e-5, 3e-5)

    Args:
        name: as `allow_changes` names it.
        before: value in the checkpoint, plain.
        after: value of the resuming run, plain.
    """

    name: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.name}: {self.before!r} in the checkpoint, {self.after!r} now"

    @property
    def is_recorded(self) -> bool:
        """Whether it is noted only: versions and hardware."""
        return self.name.startswith(RECORDED)


def check_allowed(names: Iterable[str], settings: Collection[str]) -> None:
    """Refuse names in `allow_changes` that a resume does not compare, or could not change.

    Args:
        names: of `allow_changes`; `a.b` is a part of `a`.
        settings: names of all settings.

    Raises:
        ConfigError: names the nearest known name, or the reason.
    """
    known = [*settings, *COMPARED]
    for name in names:
        if reason := _why_fixed(name):
            raise ConfigError(
                f"allow_changes names {name!r}, and a resumed run cannot change it: {reason}. Start a new run from the "
                "checkpoint's weights instead: model_name_or_path."
            )
        if name.partition(".")[0] not in known:
            raise ConfigError(
                f"allow_changes names {name!r}, which is neither a setting nor something a resume compares."
                f"{did_you_mean(name, known)} Beside the settings it compares: {', '.join(COMPARED)}."
            )


def changes(folder: Path, stored: Mapping[str, Any], now: Mapping[str, Any], allowed: Collection[str]) -> list[Change]:
    """Return what differs between a checkpoint and the run that resumes from it: versions, and what is allowed.

    Args:
        folder: the checkpoint, for messages.
        stored: facts in the checkpoint.
        now: facts of this run.
        allowed: names that may differ; `a` allows `a.b`.

    Raises:
        CheckpointError: something else differs; every difference is named with both values. Or the checkpoint was
            written by a version that stored no settings.
    """
    if "settings" not in stored:
        raise CheckpointError(
            f"{folder} was written by an earlier version of opsd, which stored neither settings nor a hash of the "
            "data. Whether this is the same run cannot be told. Resume with that version (run_card.json names it), or "
            "start a new run from the checkpoint's weights: model_name_or_path."
        )
    before, after = _flat(stored), _flat(json.loads(json.dumps(now)))
    names = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
    differing = [Change(name, before.get(name), after.get(name)) for name in names]
    refused = [c for c in differing if not c.is_recorded and (_why_fixed(c.name) or not _is_in(c.name, allowed))]
    if refused:
        raise CheckpointError(_refusal(folder, refused))
    return differing


def _refusal(folder: Path, refused: Sequence[Change]) -> str:
    lines = []
    for change in refused:
        what, reason = COMPARED.get(change.name.partition(".")[0]), _why_fixed(change.name)
        lines.append(f"  {change}" + f" ({what})" * bool(what) + f"; fixed: {reason}" * bool(reason))
    free = [change.name for change in refused if not _why_fixed(change.name)]
    if len(free) == len(refused):
        way_out = f"--allow-changes {' '.join(free)} (in Python: OPSDConfig(allow_changes={free}))"
        way_out = f"Restore them, or name those that you mean to change: {way_out}."
    else:
        way_out = "Restore those that are fixed, or start a new run from the checkpoint's weights: model_name_or_path."
    return (
        f"{folder} was made by a run with other settings:\n" + "\n".join(lines) + f"\nA resumed run must be the same "
        f"run, or its numbers would be of neither. {way_out}"
    )


def warn(
    folder: Path | None, now: Mapping[str, Any], differing: Iterable[Change], allowed: Collection[str] | None
) -> None:
    """Warn of other versions and hardware than the checkpoint's, of rows that have no hash, of an idle switch.

    Args:
        folder: the checkpoint, or None for a new run.
        now: facts of this run.
        differing: what differs.
        allowed: `allow_changes`.
    """
    if folder is None:
        if allowed:
            warnings.warn(
                "allow_changes has no effect: the run is new, and resumes nothing.", OPSDWarning, stacklevel=3
            )
        return
    if now["rows"] is None:
        warnings.warn(
            "the training rows are a stream, which has no hash: whether they are those of the checkpoint was not "
            "checked. Resume with the same files in the same order.",
            OPSDWarning,
            stacklevel=3,
        )
    recorded = [change for change in differing if change.is_recorded]
    if recorded:
        warnings.warn(
            "the run goes on with other versions or hardware:\n"
            + "\n".join(f"  {change}" for change in recorded)
            + "\nIts numbers may differ from those of an undisturbed run. The run card notes it.",
            OPSDWarning,
            stacklevel=3,
        )


class ResumedSettings(TrainerCallback):
    """Puts changed settings into force where a checkpoint has brought the old ones back.

    transformers restores the learning rate, and the steps between log entries, evaluations and saves, from the
    checkpoint; new values would be ignored.

    >>> callback = ResumedSettings()
    >>> callback.changes = [Change("learning_rate", 1e-5, 3e-5)]
    """

    def __init__(self) -> None:
        self.changes: Sequence[Change] = ()

    @property
    def keeps_samples(self) -> bool:
        """Whether samples that wait in the checkpoint are those that this run would have drawn."""
        return all(change.is_recorded or change.name in SCHEDULE for change in self.changes)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, lr_scheduler: Any = None, **kwargs: Any
    ) -> None:
        """Set intervals and learning rate of a resumed run, after its checkpoint was loaded."""
        if state.global_step == 0:
            return
        state.compute_steps(args, state.max_steps)
        if any(not change.is_recorded for change in self.changes):
            _set_rates(self.changes, optimizer, getattr(lr_scheduler, "scheduler", lr_scheduler))


def _set_rates(differing: Sequence[Change], optimizer: Any, scheduler: Any) -> None:
    """Set the learning rates of the next step by the new settings.

    Raises:
        CheckpointError: the schedule is one whose rates follow from its own state.
    """
    by_name = {change.name.partition(".")[0]: change for change in differing}
    if not isinstance(scheduler, LambdaLR):
        named = [name for name in SCHEDULE if name in by_name]
        if named:
            raise CheckpointError(
                f"{', '.join(named)} cannot change in this run: its schedule, {type(scheduler).__name__}, is restored "
                "from the checkpoint. Restore the old value, or start a new run from the checkpoint's weights."
            )
        return
    rate = by_name.get("learning_rate")
    for place, group in enumerate(optimizer.param_groups):
        if rate is not None:
            is_base = group["initial_lr"] == rate.before  # otherwise a group with a rate of its own, kept in proportion
            group["initial_lr"] = rate.after if is_base else group["initial_lr"] * rate.after / rate.before
        scheduler.base_lrs[place] = group["initial_lr"]
        group["lr"] = group["initial_lr"] * scheduler.lr_lambdas[place](scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def _why_fixed(name: str) -> str | None:
    """Return why something can never change, or None."""
    return next((reason for each, reason in FIXED.items() if _is_in(name, (each,))), None)


def _is_in(name: str, names: Collection[str]) -> bool:
    """Tell whether a name, or one that it is a part of, is among names."""
    parts = name.split(".")
    return any(".".join(parts[:count]) in names for count in range(1, len(parts) + 1))


def _flat(facts: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with keys like `teacher.decay`; settings stand under their own names."""
    flat: dict[str, Any] = {}
    for key, value in facts.items():
        below = "" if key == "settings" and not above else f"{above}{key}."
        flat |= _flat(value, below) if isinstance(value, Mapping) else {f"{above}{key}": value}
    return flat
