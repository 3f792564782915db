"""What a trainer writes beside weights: cards, and in checkpoints what opsd adds to TRL's.

Knows TRL's hooks for saving and loading; nothing of steps, rollouts or losses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from trl import DistillationTrainer

from opsd.training.averages import Averages
from opsd.training.fsdp import whole_state_dict
from opsd.training.run_files import RunFiles
from opsd.training.samples_ahead import SamplesAhead


class SavingTrainer(DistillationTrainer):
    """TRL's trainer with the files of an opsd run; the base of `OPSDTrainer`.

    >>> trainer.save_model("runs/first/final")
    """

    files: RunFiles
    ahead: SamplesAhead
    _averages: dict[str, Averages]

    @property
    def run_card(self) -> dict[str, Any]:
        """What this run is, in plain values."""
        return self.files.card

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, with its model card (README.md) and its run card."""
        with whole_state_dict(self.accelerator):
            super().save_model(output_dir, _internal_call)
        if not _internal_call and self.is_world_process_zero():
            self.create_model_card()
            self.files.copy_cards(output_dir)

    def create_model_card(self, model_name: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Write the model card into the output folder; TRL's card, whose tags ours takes, is written first."""
        super().create_model_card(model_name, *args, **kwargs)
        if self.is_world_process_zero():
            self.files.write_model_card(model_name, self.hub_model_id)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the teacher first: a checkpoint with a trainer state is a whole one."""
        pending = {"lists": dict(self._metrics["train"]), "tallies": self._averages["train"].state}
        self.files.write_checkpoint(self.state.global_step, pending, self.ahead.waiting)
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        pending, waiting = self.files.read_checkpoint(Path(resume_from_checkpoint))
        self.ahead.load(waiting if self.files.resumed.keeps_samples else None)
        self._metrics["train"].clear()
        self._metrics["train"].update(pending["lists"])
        self._averages["train"].load(pending["tallies"])
