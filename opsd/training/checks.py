"""What is checked between loading the student and step 1, so that nothing of it fails hours later.

Knows a model, a dataset and a teacher; changes none of them.
"""

from __future__ import annotations

import json
import os
import random
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftConfig
from torch import nn

from opsd.contexts.base import Context
from opsd.data.prepare import ready_rows
from opsd.data.rows import check_completions, row_columns
from opsd.errors import ConfigError, DataError, OPSDWarning, did_you_mean
from opsd.evaluation.plan import METRIC, EvaluationPlan
from opsd.models.forward import check_lengths, context_length, counting_passes, embedded_tokens
from opsd.rollouts import Rollouts
from opsd.teachers import Cost, StudentHandle, Teacher
from opsd.teachers.weight_copy import adapter_adds_nothing, digest
from opsd.training.controls import control_of
from opsd.training.groups import Groups, placeholders
from opsd.training.loss import Scorer

# Rows whose prompts are rendered for both sides before step 1: about ten seconds of one core.
CHECKED_ROWS = 20_000
HEADS = ("lm_head", "embed_out", "output_layer")  # as model families name it
# What every run logs, and what a run with rewards logs beside it; a gate may read these.
# `loss` is not among them: transformers forgets its running mean in a resume, and `divergence` says the same.
LOGGED = (
    "entropy", "divergence", "divergence/max", "scored_tokens", "completions/mean_length", "completions/max_length",
    "completions/min_length", "completions/clipped_ratio", "completions/mean_terminated_length",
    "completions/min_terminated_length", "completions/max_terminated_length",
)  # fmt: skip
GROUP_METRICS = ("group/right", "group/distilled", "group/without_context", "group/unused", "group/flat")
PROBED_ROWS = 8  # scored before step 1 to count what a teacher costs


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


def check_text_only(reads_images: bool) -> None:
    """Refuse a model that reads images.

    Raises:
        ConfigError: it does.
    """
    if reads_images:
        raise ConfigError(
            "this model reads images, and version 1 of opsd trains text models only. Its prompts would reach the "
            "teacher without their images. Use a text model."
        )


def check_sharding(args: Any, evaluates: bool = False) -> None:
    """Refuse kinds of sharding whose parameters teachers could not follow.

    Args:
        args: training arguments. accelerate's launcher says the rest by environment variables.
        evaluates: whether the student is to answer questions beside its training.

    Raises:
        ConfigError: FSDP 1, DeepSpeed's ZeRO-3, or a teacher that would have to sample in shards.
    """
    fsdp = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    version = str((args.fsdp_config or {}).get("version") or os.environ.get("FSDP_VERSION") or 1)
    if fsdp and version != "2":
        raise ConfigError(
            "FSDP 1 flattens parameters, and a teacher made of the student could not find its own among them. Use "
            "FSDP 2: fsdp_version: 2 (examples/accelerate/fsdp2.yaml), or fsdp_config: {version: 2}."
        )
    if fsdp and args.seq_kd:
        raise ConfigError(
            "seq_kd lets the teacher sample, and with FSDP each process would gather its weights token by token, as "
            "often as its own longest completion asks for: one would wait for the others. Sample before the run, into "
            "a column `completion`, and leave seq_kd out."
        )
    if fsdp and evaluates:
        raise ConfigError(
            "evaluation lets each process answer its own share of the questions, and with FSDP it would gather weights "
            "token by token, as often as its own longest answer asks for: one would wait for the others. Evaluate "
            "saved checkpoints instead: `opsd eval RUN/checkpoint-N`."
        )
    if _zero_stage(args) == 3:
        raise ConfigError(
            "DeepSpeed's ZeRO-3 empties parameters between passes, and a teacher made of the student would copy "
            "nothing. Use FSDP 2, which shards as much (examples/accelerate/fsdp2.yaml), or ZeRO-2 "
            "(examples/accelerate/zero2.yaml)."
        )


def _zero_stage(args: Any) -> int:
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is not None:
        return int(plugin.zero_stage)
    config = args.deepspeed
    if isinstance(config, str) and Path(config).is_file():
        config = json.loads(Path(config).read_text())
    return int(config.get("zero_optimization", {}).get("stage", 0)) if isinstance(config, dict) else 0


def check_adapter(config: PeftConfig) -> None:
    """Refuse adapters that the loss would go around.

    Raises:
        ConfigError: virtual tokens, or an adapter on the head.
    """
    if getattr(config, "is_prompt_learning", False):
        raise ConfigError(
            f"{type(config).__name__} learns virtual tokens in front of the prompt. Sampling would use them, and the "
            "loss, which calls the model below, would not: it would train nothing. Use LoRA."
        )
    targets = getattr(config, "target_modules", None) or []
    if isinstance(targets, str):  # a pattern over whole names
        on_the_head = any(re.fullmatch(targets, f"model.{head}") or re.fullmatch(targets, head) for head in HEADS)
    else:
        on_the_head = any(name.split(".")[-1] in HEADS for name in targets)
    if on_the_head:
        raise ConfigError(
            "the adapter is on the head (lm_head), whose weight the loss reads directly: what the adapter adds there "
            "would be sampled from and never trained. Leave the head out of target_modules, or train it whole: "
            "modules_to_save=['lm_head']."
        )


def check_settings(
    args: Any,
    teacher: Teacher,
    groups: Groups,
    eval_dataset: Any,
    evaluation: Any,
    peft_config: PeftConfig | None,
    *,
    has_tools: bool,
) -> None:
    """Refuse what cannot work together, before any model loads.

    Raises:
        ConfigError: names the two.
    """
    check_importance(args.importance_clip, has_tools)
    check_sharding(args, evaluates=evaluation is not None)
    if peft_config is not None:
        check_adapter(peft_config)
    check_gate_metrics(teacher, args, eval_dataset, groups, EvaluationPlan.parse(evaluation))
    if args.seq_kd and not teacher.can_sample:
        raise ConfigError(
            f"seq_kd takes the teacher's own samples, and teacher {teacher.strategy!r} is no single model that could "
            "sample. Use another teacher, or set seq_kd to false."
        )
    spread = args.accelerator_config
    if groups.size > 1 and (spread.split_batches or spread.dispatch_batches):
        raise ConfigError(
            "num_generations is above 1, and accelerator_config splits or dispatches batches: rollouts of one prompt "
            "would land in different processes, and could not be compared. Leave both options off."
        )


def check_importance(clip: float | None, has_tools: bool) -> None:
    """Refuse importance correction of completions that several calls of the engine made.

    Raises:
        ConfigError: it is on, and so are tools.
    """
    if clip is not None and has_tools:
        raise ConfigError(
            "importance_clip is set and the student calls tools. A completion is then sampled in several calls, and "
            "TRL keeps no log-probabilities across them. Leave importance_clip out."
        )


def fingerprint(student: nn.Module, vocab_size: int) -> str:
    """Return a hash of the weights that a resumed run must begin with: all but an adapter that adds nothing yet."""
    fresh = hasattr(student, "disable_adapter") and adapter_adds_nothing(student, vocab_size)
    return digest({name: p for name, p in student.named_parameters() if not (fresh and p.requires_grad)})


def check_rows_fit(
    dataset: Any, student: StudentHandle, teacher: Teacher, max_new_tokens: int, rollout_fields: Sequence[str] = ()
) -> None:
    """Render the first rows' prompts for both sides: templates that fail and prompts that are too long show here.

    Args:
        dataset: prepared rows; a stream is checked row by row as it is used.
        student: the student.
        teacher: the teacher, prepared.
        max_new_tokens: tokens a completion may get.
        produced: names that training makes for contexts; they stand for a few words here.

    Raises:
        DataError: a prompt leaves no room for its completion; names the row.
        TemplateError: the template fails on a row.
    """
    if not isinstance(dataset, Dataset):
        return
    limit, words = context_length(student.model), embedded_tokens(student.model)
    for number, row in enumerate(islice(dataset, CHECKED_ROWS)):
        own = student.renderer.ids(row["prompt"])
        check_lengths(limit, [own], [max_new_tokens], "student", first_row=number)
        if max(own) >= words:
            token = student.tokenizer.decode([max(own)])
            raise DataError(
                f"row {number}: the prompt has the token {token!r} with id {max(own):,}, and the model embeds "
                f"{words:,}. Model and tokenizer do not belong together, or tokens were added to one of them: "
                "model.resize_token_embeddings(len(tokenizer))."
            )
        for leaf in teacher.prompts.leaves_of(row):
            if leaf.context is None:
                continue
            made = placeholders(rollout_fields, row)
            for context in leaf.context.possible_contexts(row, made):
                try:
                    prompt = context.render(row, made, side=leaf.renderer)
                except DataError as error:
                    raise DataError(f"row {number}: {error}") from error
                # What training makes may be as long as a completion.
                to_come = max_new_tokens * (1 + _whole_rollouts_shown(context, rollout_fields))
                check_lengths(leaf.teacher.max_length, [prompt], [to_come], "teacher", first_row=number)
    teacher.prompts.forget_counts()


def _check_siblings(teacher: Teacher) -> None:
    """Refuse a context that only siblings could fill where no rollout has one, and warn where little else could."""
    for context in teacher.prompts.contexts:
        rule = f"template {context.name!r} shows correct siblings of a rollout, and num_generations is 1: there is none"
        if "sibling" in context.fields:
            raise ConfigError(f"{rule}, so nothing would be trained. Set num_generations to 8 or so.")
        if "sibling" in context.optional_fields and context.missing(()):
            warnings.warn(
                f"{rule}. Rollouts without feedback from the verifier (log_extra) will train nothing. Set "
                "num_generations to 8 or so.",
                OPSDWarning,
                stacklevel=2,
            )


def _whole_rollouts_shown(context: Context, rollout_fields: Sequence[str]) -> int:
    """Return how many rollouts a context shows at full length."""
    return len(context.untruncated_fields({"sibling", "attempt"} & set(rollout_fields)))


def prepare_dataset(dataset: Any, name: str, args: Any, scorer: Scorer, groups: Groups) -> Any:
    """Return rows as the run uses them, once they were checked against contexts and settings.

    Args:
        dataset: map-style, streaming, None, or several by name.
        name: "train", or what errors call it.
        args: training arguments.
        scorer: the loss, whose contexts and weights read columns.
        groups: how rollouts are graded.
    """
    if isinstance(dataset, dict) and name != "train":
        return {each: prepare_dataset(rows, each, args, scorer, groups) for each, rows in dataset.items()}
    if dataset is None:
        return None
    dataset = ready_rows(dataset, name=name, system_prompt=args.student_system_prompt, needed=scorer.columns)
    control = control_of(args.control)
    if control is not None and name == "train":
        dataset = control.rows(dataset)
    # A teacher that samples does so before there is a rollout that anything could be made of.
    scorer.check_rows(dataset, () if args.seq_kd else groups.rollout_fields)
    check_groups(dataset, scorer.teacher, groups, trains=name == "train")
    if name == "train" and not args.seq_kd:
        check_completions(dataset, off_policy=1.0 - args.lmbda)
    return dataset


def check_trained(steps: int, rows_per_step: int) -> None:
    """Refuse a training that did nothing.

    Raises:
        DataError: there were too few rows for a step.
    """
    if steps == 0:
        raise DataError(
            f"the dataset ended before one step of {rows_per_step} rows (batch per device × accumulation steps × "
            "processes), so nothing was trained. Lower one of these, or add rows."
        )


def check_groups(dataset: Any, teacher: Teacher, groups: Groups, *, trains: bool) -> None:
    """Refuse several rollouts per prompt where rows are a stream; warn where evaluation will find nothing to show.

    Raises:
        DataError: a stream, or rows without what a grader reads.
        ConfigError: a context that nothing could fill.
    """
    groups.rewards.check_columns(row_columns(dataset))
    if trains and groups.size == 1 and groups.rewards.functions:
        _check_siblings(teacher)
    if trains and groups.size > 1 and not isinstance(dataset, Dataset):
        raise DataError(
            "num_generations is above 1, and the training rows are a stream, whose shuffling would tear groups apart. "
            "Load them as a Dataset, or set num_generations to 1."
        )
    for context in [] if trains else teacher.prompts.contexts:
        if (context.fields | context.optional_fields) & set(groups.rollout_fields):
            warnings.warn(
                f"template {context.name!r} shows what a group of rollouts made, and evaluation samples each row once: "
                "there are no siblings, and rows with nothing to show count nowhere, so eval_loss may be 0. Read "
                "eval_reward instead.",
                OPSDWarning,
                stacklevel=2,
            )


def check_gate_metrics(
    teacher: Teacher, args: Any, eval_dataset: Any, groups: Groups, plan: EvaluationPlan | None
) -> None:
    """Refuse a gate on a metric that this run will not log, or not often enough.

    Raises:
        ConfigError: names the metric and what is logged.
    """
    own = [*LOGGED, *(["reward", *GROUP_METRICS] if groups.rewards.functions else [])]
    own += [f"rewards/{name}" for name in groups.rewards.names]
    sets = [f"eval_{name}_" for name in eval_dataset] if isinstance(eval_dataset, dict) else ["eval_"]
    evaluates = eval_dataset is not None and args.eval_strategy != "no"
    later = [f"{start}{name}" for start in sets for name in ("loss", *own)] if evaluates else []
    every = {METRIC: plan.every} if plan is not None and plan.every else {}
    later += list(every)
    for name, window in sorted(teacher.watches.items()):
        # Reward functions may log metrics of their own, whose names only they know.
        if name not in [*own, *later] and not groups.rewards.functions:
            why = " There is no eval_dataset with eval_strategy." if name.startswith("eval_") and not later else ""
            raise ConfigError(
                f"the teacher's gate reads {name!r}, and this run logs no such metric, so the gate would never open."
                f"{did_you_mean(name, [*own, *later])}{why} Logged: {', '.join([*own, *later])}."
            )
        interval = "every" if name in every else "eval_steps" if name.startswith("eval_") else "logging_steps"
        found = every.get(name) or getattr(args, interval, None)
        if found and found > window:
            raise ConfigError(
                f"the teacher's gate reads {name!r} every {window} steps, and {interval} is {found:g}: it would find "
                f"nothing and never open. Lower it to {window} at most."
            )


def measured_cost(
    scorer: Scorer, dataset: Any, student: StudentHandle, rollout_fields: Sequence[str] = (), micro_batches: int = 1
) -> Cost:
    """Let everyone who scores do so for a token of some rows, and return what they cost together, passes counted.

    Args:
        scorer: the loss, prepared: its teacher, and what anchors or contrasts it.
        dataset: prepared rows; None where nothing will be trained: then no pass is counted.
        student: the student.
        produced: names that training makes for contexts.
        micro_batches: of an optimizer step.
    """
    costs = [teacher.cost for teacher in {id(view.teacher): view.teacher for view in scorer.views}.values()]
    total = Cost(sum(cost.megabytes for cost in costs), sum(cost.offloaded for cost in costs))
    if dataset is None:
        return total
    if isinstance(dataset, Dataset):
        # Drawn, since a route's cost depends on them, and kinds of rows may alternate.
        drawn = random.Random(0).sample(range(len(dataset)), min(PROBED_ROWS, len(dataset)))
        rows = [dataset[number] for number in drawn]
    else:
        rows = list(islice(iter(dataset), PROBED_ROWS))
    made: list[dict[str, Any]] = [placeholders(rollout_fields, row) for row in rows]
    prompts = [student.renderer.ids(row["prompt"]) for row in rows]
    probe = Rollouts(rows, prompts, [prompt[-1:] for prompt in prompts], rollout_fields=made)
    with counting_passes() as sequences:
        for view in scorer.views:
            view.score(view.prompts.render(probe))
    scorer.forget_counts()
    return replace(total, passes=sum(sequences) / len(rows), micro_batches=micro_batches)


def summary(scorer: Scorer, groups: Groups, cost: Cost) -> str:
    """Return what a user is told of a run before its first step."""
    teacher = scorer.teacher
    return (
        f"teacher     {teacher.describe()}\nis shown    {teacher.prompts.describe()}\ncosts       {cost}\n"
        f"learns      {groups.describe()}\nminimises   {scorer.describe()}\n            {scorer.objective.formula}"
    )
