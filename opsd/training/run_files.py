"""The files of a run beside its weights: its cards, and in checkpoints the teacher's state and what the run is made of.

Knows the parts of a run and where their descriptions are made; nothing of steps or losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opsd.evaluation.run_folder import CARD, read_card
from opsd.findings import Examination
from opsd.teachers.checks import load_state, saved_state
from opsd.training import checkpoints
from opsd.training.facts import changes_on_resume, model_facts, run_facts
from opsd.training.model_card import copy_cards, write_model_card
from opsd.training.parts import RunParts
from opsd.training.resume import ResumedSettings
from opsd.training.run_card import data_digests, resumed_card, run_card, write_run_card
from opsd.training.together import failing_together


class RunFiles:
    """Writes and reads the files of one run.

    >>> files = RunFiles(parts)  # before anything shards or trains the student
    >>> checkpoint = files.begin(resume=None)
    >>> files.write_checkpoint(step=10, pending={})
    >>> files.end(outcome)

    Args:
        parts: what the run is made of.
    """

    examination: Examination | None = None  # what the doctor found, if it was asked; goes into the run card

    def __init__(self, parts: RunParts):
        self.parts = parts
        self.folder = Path(parts.args.output_dir)
        self.resumed = ResumedSettings()
        self._start_facts = {
            **model_facts(parts.student.model, len(parts.student.tokenizer)),
            "teacher": parts.scorer.teacher.description,  # here, so that settings of a wrong kind end no run
        }
        self._facts: dict[str, Any] | None = None  # in processes that write checkpoints, once the run has begun
        self._digests: tuple[str, str] | None = None  # of the training rows

    @property
    def card(self) -> dict[str, Any]:
        """What this run is, in plain values."""
        return run_card(self.parts, self._digests, self.examination)

    @property
    def _writes(self) -> bool:
        return bool(self.parts.args.should_save)

    def begin(self, resume: str | bool | None) -> str | None:
        """Find the checkpoint to resume from, compare the run with it, and write what the run is.

        Args:
            resume: False or None for a new run, True for the newest usable checkpoint, or a checkpoint's path.

        Returns:
            The checkpoint's path, or None for a new run.

        Raises:
            CheckpointError: the folder holds another run; nothing to resume from; the checkpoint is of another run,
                apart from what `allow_changes` names. This and any other error is raised in every process.
        """
        with failing_together():
            checkpoint, passed_over = checkpoints.resolve(self.folder, resume)
        for line in passed_over:
            self.parts.accelerator.print(line, flush=True)
        with failing_together():
            if self._writes:
                self._digests = data_digests(self.parts.rows)
                self._facts = self._start_facts | run_facts(self.parts, self._digests[0])
        self.resumed.changes = changes_on_resume(checkpoint, self._facts, self.parts.args.allow_changes)
        with failing_together():
            if self._writes:
                card = self.card
                checkpoints.store_number_format(self.folder, bool(self.parts.args.bf16))
                if checkpoint is not None:
                    card = resumed_card(card, self.folder, checkpoints.step_of(checkpoint), self.resumed.changes)
                write_run_card(self.folder, card)
        return None if checkpoint is None else str(checkpoint)

    def is_finished(self, checkpoint: Path) -> bool:
        """Tell whether a checkpoint is of the run's last step, and nothing is left to train."""
        if any(change.name == "num_train_epochs" for change in self.resumed.changes):
            return False
        return checkpoints.is_finished(checkpoint, self.parts.args.max_steps)

    def write_checkpoint(self, step: int, pending: Mapping[str, Any], waiting: Mapping[str, Any] | None) -> None:
        """Write the teacher's state and the facts into a checkpoint; every process calls it.

        Args:
            step: optimizer steps done.
            pending: metrics since the last log entry.
            waiting: samples of this process for later steps; None where each step has its own.
        """
        state = saved_state(self.parts.scorer.teacher, keep=self._writes)  # a collective where values are sharded
        folder = self.folder / f"checkpoint-{step}"
        if self._writes:
            checkpoints.write(folder, state, self._facts or {}, step=step, pending=pending)
        if waiting is not None:
            checkpoints.write_samples(folder, self.parts.accelerator.process_index, waiting)

    def read_checkpoint(self, folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Give the teacher its state from a checkpoint; return the metrics that were pending, and samples that wait."""
        state, pending = checkpoints.read_state(folder)
        load_state(self.parts.scorer.teacher, state)
        return pending, checkpoints.read_samples(folder, self.parts.accelerator.process_index)

    def end(self, outcome: Mapping[str, Any]) -> None:
        """Print what the run did (`Learning.description`), and add it to the card that was written when it began."""
        self.parts.accelerator.print("\n".join(outcome["lines"]), flush=True)
        if self._writes:
            write_run_card(self.folder, {**read_card(str(self.folder)), "outcome": outcome})

    def write_model_card(self, name: str | None, repository: str | None) -> None:
        """Write the model card, and the run card where there is none yet."""
        is_adapter = hasattr(self.parts.student.model, "peft_config")
        if not (self.folder / CARD).is_file():
            write_run_card(self.folder, self.card)
        write_model_card(self.folder, name or self.folder.absolute().name, repository, is_adapter)

    def copy_cards(self, output_dir: str | None) -> None:
        """Copy the cards to the folder that the model was saved into, where that is another one."""
        copy_cards(self.folder, Path(output_dir or self.folder))
