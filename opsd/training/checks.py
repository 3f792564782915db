"""Checks of settings, models, adapters and sharding: what cannot work is refused before it costs an hour.

Knows settings, a model and a teacher; changes none of them, except that a text in place of a list in an adapter's
settings becomes a list. Rows are checked in `dataset.py`.
"""

from __future__ import annotations

import os
import re
from typing import Any

from peft import PeftConfig
from torch import nn
from transformers import PreTrainedTokenizerBase

from opsd.errors import ConfigError, did_you_mean, not_one_of
from opsd.evaluation.plan import METRIC, EvaluationPlan
from opsd.health.watch import ACTIONS
from opsd.models.vocabulary import check_is_tokenizer
from opsd.settings import read_lists
from opsd.teachers import Teacher
from opsd.training.groups import Groups
from opsd.training.metrics import gate_metrics

HEADS = ("lm_head", "embed_out", "output_layer")  # as model families name it


def check_student(student: nn.Module) -> list[str]:
    """Return the names of the parameters that training moves.

    Raises:
        ConfigError: there are none.
    """
    trainable = [name for name, p in student.named_parameters() if p.requires_grad]
    if not trainable:
        raise ConfigError(
            "no parameter of this model is trainable, so nothing could be learned. An adapter that was loaded for "
            "inference is frozen: PeftModel.from_pretrained(…, is_trainable=True)."
        )
    return trainable


def check_reads_text(reads_images: bool, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a model that reads images, or has no tokenizer.

    Raises:
        ConfigError: names which.
    """
    if reads_images:
        raise ConfigError(
            "this processor reads images, and version 1 of opsd trains on text only: prompts would reach the teacher "
            "without their images. Give the model by its name, and its language model is trained alone; or pass "
            "processing_class=AutoTokenizer.from_pretrained(…), with a text model."
        )
    check_is_tokenizer(tokenizer)


def check_sharding(args: Any, evaluates: bool = False) -> None:
    """Refuse kinds of sharding whose parameters teachers could not follow.

    Args:
        args: training arguments; accelerate's launcher sets the rest in environment variables.
        evaluates: whether the run has an evaluation plan.

    Raises:
        ConfigError: FSDP 1, parameters that are offloaded, DeepSpeed, or a teacher that would have to sample in shards.
    """
    config = args.fsdp_config or {}
    fsdp = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    version = config.get("version", 2) if args.fsdp else os.environ.get("FSDP_VERSION", 1)  # their own defaults
    if fsdp and str(version) != "2":
        raise ConfigError(
            "FSDP 1 flattens parameters, and a self-teacher could not swap its copies for them. Use "
            "FSDP 2: fsdp_version: 2 (examples/accelerate/fsdp2.yaml), or fsdp_config: {version: 2}."
        )
    launched = {name for name in ("FSDP_OFFLOAD_PARAMS", "ACCELERATE_USE_DEEPSPEED") if os.environ.get(name) == "true"}
    if fsdp and (config.get("cpu_offload") or "offload" in str(args.fsdp) or "FSDP_OFFLOAD_PARAMS" in launched):
        raise ConfigError(
            "FSDP would keep parameters in CPU memory between passes, and a self-teacher swaps its copies for them on "
            "the device: this has never been run. Leave the offload out; more processes hold less each."
        )
    if fsdp and args.seq_kd:
        raise ConfigError(
            "with seq_kd the teacher samples, and under FSDP each process would gather its weights once per token of "
            "its longest completion: processes with shorter completions would hang. Sample before the run, into a "
            "column `completion`, and leave seq_kd out."
        )
    if fsdp and evaluates:
        raise ConfigError(
            "in an evaluation each process answers a share of the questions, and under FSDP it would gather weights "
            "once per token of its longest answer: processes with shorter answers would hang. Evaluate saved "
            "checkpoints instead: `opsd eval RUN/checkpoint-N`."
        )
    if args.deepspeed or "ACCELERATE_USE_DEEPSPEED" in launched:
        raise ConfigError(
            "DeepSpeed restores a checkpoint on a path of its own, on which a teacher is not restored: a resumed run "
            "would go on with the teacher of step 0. Use FSDP 2, which shards as much (examples/accelerate/fsdp2.yaml)."
        )


def check_adapter(config: PeftConfig) -> None:
    """Refuse adapters that the loss would bypass or that cannot learn.

    Raises:
        ConfigError: virtual tokens, an adapter on the head, or one that is scaled by 0.
    """
    alphas = [getattr(config, "lora_alpha", None), *(getattr(config, "alpha_pattern", None) or {}).values()]
    if 0 in alphas:
        raise ConfigError(
            "lora_alpha is 0, and what an adapter adds is scaled by lora_alpha / r: it would add nothing, and have no "
            "gradient. Set lora_alpha to r or 2·r."
        )
    ranks = [getattr(config, "r", None), *(getattr(config, "rank_pattern", None) or {}).values()]
    if any(isinstance(rank, int) and rank < 1 for rank in ranks):
        raise ConfigError(f"the rank of an adapter, r, must be 1 or more, and is {ranks}. Usual are 8 to 64.")
    if getattr(config, "is_prompt_learning", False):
        raise ConfigError(
            f"{type(config).__name__} trains virtual tokens before the prompt. Sampling would use them, and the loss, "
            "which calls the model without its adapter's wrapper, would not: nothing would be trained. Use LoRA."
        )
    targets = getattr(config, "target_modules", None) or []
    if isinstance(targets, str):  # a pattern over whole names
        on_the_head = any(re.fullmatch(targets, f"model.{head}") or re.fullmatch(targets, head) for head in HEADS)
    else:
        on_the_head = any(name.split(".")[-1] in HEADS for name in targets)
    if on_the_head:
        raise ConfigError(
            "the adapter is on the head (lm_head), whose weight the loss reads directly: the adapter's part would be "
            "sampled from and never trained. Leave the head out of target_modules, or train all of it: "
            "modules_to_save=['lm_head']."
        )


def check_adapters(model: Any) -> None:
    """Refuse a model that arrives with such an adapter, or with several.

    Raises:
        ConfigError: as `check_adapter`; or names the adapters.
    """
    adapters = getattr(model, "peft_config", {})
    for config in adapters.values():
        check_adapter(config)
    if len(adapters) > 1:
        raise ConfigError(
            f"the student has {len(adapters)} adapters: {', '.join(adapters)}. One of them trains, and a saved folder "
            "would be loaded with another. Keep the one to train: model.delete_adapter(name), or merge the others."
        )


def check_settings(
    args: Any,
    teacher: Teacher,
    groups: Groups,
    eval_dataset: Any,
    evaluation: Any,
    peft_config: PeftConfig | None,
    has_tools: bool,
) -> None:
    """Refuse what cannot work together, before any model loads.

    Raises:
        ConfigError: names the two.
    """
    check_importance(args.importance_clip, has_tools)
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name):
            raise ConfigError(
                f"{name} casts the student's weights to 16 bits in an evaluation, and they stay so: what trains and is "
                "saved afterwards is rounded. Leave it out; with bf16: true an evaluation computes in bfloat16 already."
            )
    check_sharding(args, evaluates=evaluation is not None)
    if peft_config is not None:
        vars(peft_config).update(read_lists(type(peft_config), vars(peft_config)))
        check_adapter(peft_config)
    check_gate_metrics(teacher, args, eval_dataset, groups, EvaluationPlan.parse(evaluation))
    if args.seq_kd and not teacher.can_sample:
        raise ConfigError(
            f"seq_kd trains on the teacher's samples, and teacher {teacher.strategy!r} is no single model that could "
            "sample. Use another teacher, or set seq_kd to false."
        )
    if teacher.lists is not None:
        check_listed(args, teacher.lists)
    if teacher.needs_given_rollouts and (args.on_policy_share.most > 0 or args.seq_kd):
        raise ConfigError(
            f"teacher {teacher.strategy!r} has scores of rollouts that exist already, and this run would sample new "
            "ones. Train on those that were scored: lmbda: 0, without seq_kd."
        )
    if teacher.needs_given_rollouts and (eval_dataset is not None or args.contrast_context is not None):
        raise ConfigError(
            f"teacher {teacher.strategy!r} has scores of rollouts that exist already, under one context. An "
            "eval_dataset would sample new ones, and contrast_context asks for another context. Leave both out; "
            "`evaluation:` measures accuracy without the teacher's scores."
        )
    if args.teacher_lead is not None:
        check_lead(teacher, groups)
    check_health(args, EvaluationPlan.parse(evaluation))
    spread = args.accelerator_config
    if groups.num_generations > 1 and (spread.split_batches or spread.dispatch_batches):
        raise ConfigError(
            "num_generations is above 1, and accelerator_config splits or dispatches batches: rollouts of one prompt "
            "would land in different processes, and could not be compared. Leave both options off."
        )


def check_listed(args: Any, count: int) -> None:
    """Refuse a divergence that needs more than a list of the teacher's likeliest tokens, or another number of them.

    Raises:
        ConfigError: says what fits.
    """
    args.objective.divergence.check_listed()
    if args.support == "teacher_top_k" and args.support_k != count:
        raise ConfigError(
            f"support_k is {args.support_k}, and the teacher lists its {count} likeliest tokens (top_k): a divergence "
            f"over the one cannot be computed from the other. Set both to the same number."
        )


def check_health(args: Any, plan: EvaluationPlan | None) -> None:
    """Refuse an action that there is not, or that has nothing to go back to.

    Raises:
        ConfigError: names it.
    """
    if args.health_action not in ACTIONS:
        raise ConfigError(not_one_of("health_action", args.health_action, ACTIONS))
    if args.health_action == "roll_back" and (plan is None or plan.rule != "best"):
        raise ConfigError(
            "health_action roll_back takes the best checkpoint, and no evaluation says which that is. Add evaluation: "
            "{test: …, selection: …, every: …, rule: best}, or use health_action stop."
        )


def check_lead(teacher: Teacher, groups: Groups) -> None:
    """Refuse a lead of a teacher that cannot answer before the student has.

    Raises:
        ConfigError: the teacher is no single model, or its context reads what rollouts provide.
    """
    reads = {name for context in teacher.prompts.contexts for name in context.columns} & set(groups.rollout_fields)
    if not teacher.can_sample or reads:
        why = f"its context reads {', '.join(sorted(reads))}" if reads else "it is no single model that could sample"
        raise ConfigError(
            f"teacher_lead compares the teacher's own answers with the student's, and teacher {teacher.strategy!r} "
            f"cannot answer: {why}. Use another teacher or context, or leave teacher_lead out."
        )


def check_importance(clip: float | None, has_tools: bool) -> None:
    """Refuse importance correction of completions that were sampled in several calls.

    Raises:
        ConfigError: importance_clip is set, and the student has tools.
    """
    if clip is not None and has_tools:
        raise ConfigError(
            "importance_clip is set and the student calls tools. A completion is then sampled in several calls, and "
            "TRL keeps no log-probabilities across them. Leave importance_clip out."
        )


def check_gate_metrics(
    teacher: Teacher, args: Any, eval_dataset: Any, groups: Groups, plan: EvaluationPlan | None
) -> None:
    """Refuse a gate on a metric that this run will not log, or not often enough.

    Raises:
        ConfigError: names the metric and what is logged.
    """
    known = gate_metrics(groups.rewards.names)
    prefixes = [f"eval_{name}_" for name in eval_dataset] if isinstance(eval_dataset, dict) else ["eval_"]
    evaluates = eval_dataset is not None and args.eval_strategy != "no"
    evaluated = [f"{prefix}{name}" for prefix in prefixes for name in ("loss", *known)] if evaluates else []
    every = {METRIC: plan.every} if plan is not None and plan.every else {}
    evaluated += list(every)
    for name, window in sorted(teacher.watches.items()):
        # Reward functions may log metrics of their own, whose names only they know.
        if name not in [*known, *evaluated] and not groups.rewards.functions:
            no_set = name.startswith("eval_") and not evaluated
            why = " There is no eval_dataset with eval_strategy." if no_set else ""
            raise ConfigError(
                f"the teacher's gate reads {name!r}, and this run logs no such metric, so the gate would never open."
                f"{did_you_mean(name, [*known, *evaluated])}{why} Logged: {', '.join([*known, *evaluated])}."
            )
        setting = "every" if name in every else "eval_steps" if name.startswith("eval_") else "logging_steps"
        interval = every.get(name) or getattr(args, setting, None)
        if interval and interval > window:
            raise ConfigError(
                f"the teacher's gate reads {name!r} every {window} steps, and {setting} is {interval:g}: it would find "
                f"no value and never open. Set {setting} to {window} at most."
            )
