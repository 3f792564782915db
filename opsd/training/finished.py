"""Resumes a run that has ended: transformers would train one more step where its last one ends no epoch.

Knows a trainer and a checkpoint; trains nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer_utils import TrainOutput


def take_finished(trainer: Any, checkpoint: str) -> TrainOutput:
    """Load the last checkpoint of a run, or its best one where the run keeps that, and train nothing.

    A run that was killed between its last checkpoint and its end is evaluated, and its card gets its outcome.

    Args:
        trainer: an OPSDTrainer.
        checkpoint: its last checkpoint.
    """
    trainer._load_from_checkpoint(checkpoint)
    trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
        trainer._load_best_model()
    trainer.accelerator.print(f"{checkpoint} is of the run's last step: nothing is left to train.", flush=True)
    events = trainer.args, trainer.state, trainer.control
    for callback in (trainer.learning, trainer.evaluator):
        if callback is not None and not callback.is_done:
            callback.on_train_begin(*events, model=trainer.model)
            callback.on_train_end(*events, model=trainer.model)
    trainer.health.on_train_begin(*events)  # which looks at the log and at the traces
    trainer.files.end(trainer.outcome)  # the card was written anew
    return TrainOutput(trainer.state.global_step, 0.0, {})
