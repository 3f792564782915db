"""`opsd train CONFIG.yaml [--key value …]`."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SKIP_DOCTOR = ("--skip-doctor", "--skip_doctor")
NOT_STARTED = "training did not start"  # where the doctor failed
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
  opsd train run.yaml --resume_from_checkpoint true --learning_rate 3e-5 --allow-changes learning_rate
                                                         a resumed run must be the same run; name what you change
  torchrun --nproc_per_node 2 -m opsd train run.yaml     several processes (also: accelerate launch -m opsd train …)

Before step 1 the doctor examines the run (`opsd doctor run.yaml` does only that). Its findings are printed, and written
into run_card.md of the output folder. If a check fails, nothing is trained.
  --skip-doctor                                          train without it; the run card records that

  --control wrong-context                                train a control of the same run: no-context, wrong-context,
                                                         off-policy, seq-kd, sft, constant-advantage; compare it with
                                                         the method: `opsd compare RUNS…`

often used keys
  evaluation       {test: test.jsonl, grader: last_number, …}: before, during and after training (docs/evaluation.md)
  beta             1 reverse KL (default), 0 forward KL, between them the generalised JSD
  support, tail    full (default), teacher_top_k, student_top_k, union, sampled; bucket, renormalise
  entry_clip       nats per vocabulary entry at most; token_clip per token
  skip_first_tokens, keep_fraction, ref_kl_coef, …      docs/losses.md has all of them
  num_generations, reward_funcs, distill_on, grpo_coef  rollouts per prompt, their rewards, which are distilled
  lmbda            share of rows trained on-policy (default 1)
  temperature      of sampling and of the divergence
  max_completion_length, per_device_train_batch_size, gradient_accumulation_steps
  steps_per_generation                                  more than the accumulation steps: samples for later steps too
  use_peft, lora_r, lora_alpha, lora_target_modules, dtype
  log_completions, report_to, save_steps, seed

  --help-all       every key, those of transformers' TrainingArguments and TRL's DistillationConfig among them
"""


def main(arguments: Sequence[str]) -> int:
    """Train; returns 0, or 128 + the signal that stopped the run."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        return 0
    from opsd.commands.run_file import make_parser, read_run

    if "--help-all" in arguments:
        make_parser().print_help()
        return 0
    arguments = list(arguments)
    skip_doctor = any(argument in SKIP_DOCTOR for argument in arguments)
    arguments = [argument for argument in arguments if argument not in SKIP_DOCTOR]
    has_file = bool(arguments) and not arguments[0].startswith("--")
    run = read_run(Path(arguments[0]) if has_file else None, arguments[1 if has_file else 0 :])

    from opsd.training import checkpoints
    from opsd.training.run_lock import only_run_in

    if run.has_sweep:
        print(
            f"sweep       not read: this is one run of the settings beside it; all of them: opsd sweep {arguments[0]}"
        )
    resume = _as_resume(run.args.resume_from_checkpoint)
    checkpoints.check_writable(run.args.output_dir)
    with only_run_in(run.args.output_dir):  # before a model loads
        return _train(run, resume, skip_doctor)


def _train(run: Any, resume: str | bool | None, skip_doctor: bool) -> int:
    """Examine, train and save; returns as `main`."""
    from opsd.commands.build import build_trainer
    from opsd.commands.report import write_after_training
    from opsd.training import checkpoints

    args = run.args
    checkpoints.resolve(args.output_dir, resume)
    trainer = build_trainer(run)
    # The teacher of a control teaches little on purpose, which the doctor would fail.
    if not resume and not skip_doctor and args.control is None and not _passes_doctor(trainer):
        return 1
    trainer.train(resume_from_checkpoint=resume)
    if trainer.stopped_by is not None:
        return 128 + signal.Signals(trainer.stopped_by).value
    trainer.save_model()
    what = "the trained model" if trainer.learning.learned else "the model, which learned nothing"
    trainer.accelerator.print(f"saved {what}, its model card and run card in {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub()
    if trainer.accelerator.is_main_process:
        write_after_training(args.output_dir, print)
    trainer.end()
    return 0


def _passes_doctor(trainer: Any) -> bool:
    """Examine the run in every process, print the findings, and return whether training may begin."""
    from accelerate.utils import gather_object
    from rich.console import Console

    from opsd.commands.doctor import TITLES, show
    from opsd.doctor import examine

    is_main = trainer.accelerator.is_main_process
    with Console(stderr=True, quiet=not is_main).status("doctor") as status:
        trainer.files.examination = examine(trainer, progress=lambda name: status.update(f"doctor: {TITLES[name]}"))
    if is_main:
        show(trainer.files.examination, Console())
    failed = any(gather_object([trainer.files.examination.failed]))
    if failed:
        way_out = "fix the checks that failed, or train regardless with --skip-doctor"
        trainer.accelerator.print(f"{NOT_STARTED}: {way_out}")
    return not failed


def _as_resume(value: str | bool | None) -> str | bool | None:
    """Return a bool, which the command line gives as "true" or "false", or a checkpoint's path."""
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value
