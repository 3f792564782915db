"""Resumes a run that has ended: transformers would train one more step where its last one ends no epoch.

Knows a trainer of transformers and a checkpoint; trains nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerState
from transformers.trainer_utils import TrainOutput


def take_finished(trainer: Trainer, checkpoint: str) -> TrainOutput:
    """Load the last checkpoint of a run, or its best one where the run keeps that, and train nothing.

    Args:
        trainer: of the run.
        checkpoint: its last checkpoint.
    """
    loader: Any = trainer
    loader._load_from_checkpoint(checkpoint)
    trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
        loader._load_best_model()
    trainer.accelerator.print(f"{checkpoint} is of the run's last step: nothing is left to train.", flush=True)
    return TrainOutput(trainer.state.global_step, 0.0, {})
