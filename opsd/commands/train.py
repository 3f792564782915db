"""`opsd train CONFIG.yaml [--key value …]`."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HELP = """\
usage: opsd train CONFIG.yaml [--key value …]

Trains a model on its own rollouts, graded token by token by a teacher. The YAML file holds flat keys; every key can
also be given, or changed, on the command line.

  # run.yaml
  model_name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct
  dataset_name: rows.jsonl            # rows with `prompt` and whatever the template needs
  teacher: ema                        # opsd teachers;  or {strategy: ema, decay: 0.99}
  context: worked_solution            # opsd templates; or {template: my.jinja, truncate: solution}
  output_dir: runs/first
  learning_rate: 1.0e-5
  max_steps: 100

  opsd train run.yaml --learning_rate 3e-5
  opsd train run.yaml --resume_from_checkpoint true      newest checkpoint of output_dir, or a checkpoint's path
  torchrun --nproc_per_node 2 -m opsd train run.yaml     several processes (also: accelerate launch -m opsd train …)

often used keys
  beta             1 reverse KL (default), 0 forward KL, between them the generalised JSD
  support, tail    full (default), teacher_top_k, student_top_k, union, sampled; bucket, renormalise
  entry_clip       nats per vocabulary entry at most; token_clip per token
  skip_first_tokens, keep_fraction, anchor_coef, …      docs/losses.md has all of them
  num_generations, reward_funcs, route, grpo_coef       several rollouts per prompt, graded, and who learns how
  lmbda            share of rows trained on-policy (default 1)
  temperature      of sampling and of the divergence
  max_completion_length, per_device_train_batch_size, gradient_accumulation_steps
  use_peft, lora_r, lora_alpha, lora_target_modules, dtype
  log_completions, report_to, save_steps, seed

  --help-all       every key (those of transformers' TrainingArguments and TRL's DistillationConfig are all here)
"""


def main(arguments: Sequence[str]) -> int:
    """Train; returns 0, or 128 + the signal that stopped the run."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        return 0
    from opsd.run_file import make_parser, read_run

    if "--help-all" in arguments:
        make_parser().print_help()
        return 0
    has_file = not arguments[0].startswith("--")
    run = read_run(Path(arguments[0]) if has_file else None, list(arguments)[1 if has_file else 0 :])

    from trl import get_peft_config, get_quantization_config

    from opsd import checkpoints
    from opsd.data import load_rows
    from opsd.teachers import load_teacher
    from opsd.trainer import OPSDTrainer

    args, model = run.args, run.model
    resume = _as_resume(args.resume_from_checkpoint)
    checkpoints.check_writable(args.output_dir)
    checkpoints.resolve(args.output_dir, resume)
    teacher = load_teacher(run.run.teacher, context=run.run.context)

    def load(split: str) -> Any:
        name, streaming = run.run.dataset_config, run.run.dataset_streaming
        return load_rows(run.run.dataset_name or "", split=split, name=name, streaming=streaming)

    rows = load(run.run.dataset_train_split)
    test = run.run.dataset_test_split
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "dtype": model.dtype or "float32",
        "attn_implementation": model.attn_implementation,
        **(args.model_init_kwargs or {}),
    }
    trainer = OPSDTrainer(
        model.model_name_or_path or "",
        teacher,
        args=args,
        train_dataset=rows,
        eval_dataset=load(test) if test else None,
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
        reward_funcs=run.run.reward_funcs,
    )
    trainer.train(resume_from_checkpoint=resume)
    if trainer.stopped_by is not None:
        return 128 + signal.Signals(trainer.stopped_by).value
    trainer.save_model()
    trainer.accelerator.print(f"saved the trained model in {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()
    return 0


def _as_resume(value: str | bool | None) -> str | bool | None:
    """YAML gives a bool, the command line the words "true" and "false"; anything else is a path."""
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value
