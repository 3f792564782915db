"""Builds the trainer of a run file, ready for step 1; `opsd train` and `opsd doctor` start here."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from opsd.commands.run_file import Run
from opsd.data.columns import import_columns
from opsd.data.files import load_rows
from opsd.errors import ConfigError

if TYPE_CHECKING:
    from opsd.training.trainer import OPSDTrainer


def rows_of(run: Run, split: str) -> Any:
    """Return a split of a run's dataset, its columns under opsd's names."""
    data = run.run
    loaded = load_rows(data.dataset_name or "", split=split, name=data.dataset_config, streaming=data.dataset_streaming)
    return import_columns(loaded, data.columns)


def build_trainer(run: Run) -> OPSDTrainer:
    """Load the rows, the teacher and the student.

    Raises:
        OPSDError: settings, rows or models that cannot work.
    """
    from peft.utils.error import NoMatchingPeftModuleError
    from trl import get_peft_config, get_quantization_config

    from opsd.teachers import load_teacher
    from opsd.training.trainer import OPSDTrainer

    args, model = run.args, run.model
    teacher = load_teacher(run.run.teacher, context=run.run.context)
    rows, test = rows_of(run, run.run.dataset_train_split), run.run.dataset_test_split
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "dtype": model.dtype or "float32",
        "attn_implementation": model.attn_implementation,
        **(args.model_init_kwargs or {}),
    }
    if isinstance(targets := model.lora_target_modules, str) and targets.isidentifier():
        # TRL writes a list of one as text, and peft reads a text as a pattern of whole names, which fits no module.
        model.lora_target_modules = [targets]
    try:
        trainer = OPSDTrainer(
            model.model_name_or_path or "",
            teacher,
            args=args,
            train_dataset=rows,
            eval_dataset=rows_of(run, test) if test else None,
            peft_config=get_peft_config(model),
            quantization_config=get_quantization_config(model),
            reward_funcs=run.run.reward_funcs,
            evaluation=run.run.evaluation,  # type: ignore[arg-type]
        )
    except NoMatchingPeftModuleError as error:
        raise ConfigError(
            f"lora_target_modules is {model.lora_target_modules}, and the model has no such layer. An adapter needs "
            "one to learn in. Write all-linear, or names as the model has them, such as q_proj and v_proj."
        ) from error
    trainer.files.parts = replace(trainer.files.parts, recipe=run.recipe)  # its teacher was built above
    return trainer
