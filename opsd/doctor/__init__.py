"""The doctor: checks a run before step 1, and reports what is wrong, what was seen, and what to do.

One file per check, one table. A check takes a `Patient` (the run under examination) and yields findings; it changes
nothing.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from opsd.doctor.alignment import check_alignment
from opsd.doctor.cost import check_cost
from opsd.doctor.divergence import check_divergence
from opsd.doctor.environment import check_environment
from opsd.doctor.leaks import check_leaks
from opsd.doctor.lift import check_lift
from opsd.doctor.patient import Patient
from opsd.doctor.prompts import check_prompts
from opsd.doctor.reach import check_reach
from opsd.doctor.rows import check_rows
from opsd.doctor.sampling import check_sampling
from opsd.doctor.tokenizers import check_tokenizers
from opsd.errors import ConfigError, OPSDError, not_one_of
from opsd.findings import Examination, Finding
from opsd.settings import as_list
from opsd.training.trainer import OPSDTrainer

__all__ = ["CHECKS", "Examination", "Finding", "Patient", "examine", "refused"]

CHECKS: dict[str, Callable[[Patient], Iterator[Finding]]] = {
    "tokenizers": check_tokenizers,
    "alignment": check_alignment,
    "sampling": check_sampling,
    "divergence": check_divergence,
    "rows": check_rows,
    "prompts": check_prompts,
    "leaks": check_leaks,
    "lift": check_lift,
    "reach": check_reach,
    "cost": check_cost,
    "environment": check_environment,
}
ROWS = 16


def examine(
    trainer: OPSDTrainer,
    *,
    rows: int = ROWS,
    only: Iterable[str] = (),
    grader: str | None = None,
    max_new_tokens: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Examination:
    """Examine a run before its first step; weights, counters and random states stay as they are.

    >>> examination = examine(trainer, only=["tokenizers", "lift"])
    >>> examination.failed, examination.verdict

    Args:
        trainer: ready for step 1.
        rows: rows to examine.
        only: checks to run, keys of `CHECKS`; empty runs all.
        grader: tells right answers from wrong ones, see `opsd eval --grader`; None takes the run's reward functions,
            else a grader that fits the column `answer`.
        max_new_tokens: longest rollout sampled here; None takes the run's.
        progress: called with the name of each check before it runs.

    Raises:
        ConfigError: no such check, or the run is a control.
    """
    if trainer.args.control is not None:
        raise ConfigError(
            f"this run is the control {trainer.args.control!r}, whose teacher is meant to teach little, and the doctor "
            "would fail it for that. Examine the method itself: leave --control out."
        )
    start, chosen = time.perf_counter(), list(as_list("only", only)) or list(CHECKS)
    for name in chosen:
        if name not in CHECKS:
            raise ConfigError(not_one_of("a check", name, CHECKS))
    if rows < 1:
        raise ConfigError(f"rows is {rows}, and the doctor examines 1 row at least. Raise it; 16 is the default.")
    states = random.getstate(), np.random.get_state()
    patient = Patient(trainer, rows=rows, grader=grader, max_new_tokens=max_new_tokens)
    findings: list[Finding] = []
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            for name in chosen:
                if progress:
                    progress(name)
                findings += _findings_of(name, patient)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        trainer.scorer.forget_counts()
    return Examination(findings, len(patient.rows), time.perf_counter() - start)


def _findings_of(name: str, patient: Patient) -> list[Finding]:
    """Return the findings of a check; an error in it becomes one more, so that those before it are kept."""
    findings: list[Finding] = []
    try:
        for finding in CHECKS[name](patient):
            findings.append(finding)
    except OPSDError as error:
        findings.append(Finding(name, "fail", str(error)))
    except torch.OutOfMemoryError as error:
        do = "Examine fewer rows (--rows 4), or shorter rollouts (--max_new_tokens)."
        findings.append(Finding(name, "warn", f"this check ran out of memory: {error}", do))
    except Exception as error:  # a reward function's, or a model's: training would meet it as well
        saw = f"this check could not finish: {type(error).__name__}: {error}"
        findings.append(Finding(name, "fail", saw, "Training would most likely stop at the same error. Fix it first."))
    return findings


def refused(error: OPSDError) -> Examination:
    """Return the examination of a run that was refused before it was ready."""
    return Examination([Finding("settings", "fail", f"{type(error).__name__}: {error}")])
