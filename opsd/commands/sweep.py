"""`opsd sweep RUN.yaml --learning_rate 1e-5 3e-5 --control method sft --seed 0 1 2`."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opsd.commands.processes import Job
    from opsd.commands.sweep_plan import SweepPlan, SweepRun

ALIKE = 3  # runs that fail before any is done: what fails them is common to all
HELP = """\
usage: opsd sweep RUN.yaml [--key value value …] [options]

Trains every combination of arms, settings and seeds of a run file, and compares them: which arm is best at its own best
setting, and what it costs elsewhere. A setting that is given several values is swept; one value changes all runs.

  opsd sweep run.yaml --learning_rate 3e-6 1e-5 3e-5 --control method sft off-policy --seed 0 1 2      27 runs
  opsd sweep run.yaml … --dry-run                 print the runs, train none
  opsd sweep run.yaml … --seeds-at best           first seed at every value; the other seeds only at each arm's best
                                                  value on the selection split: 9 + 6 runs instead of 27
  opsd compare runs/sweep                         the comparison again

The run file is that of `opsd train`, with an `evaluation:`; a key `sweep:` in it may hold what is swept:

  output_dir: runs/sweep
  dataset_name: train-{seed}.jsonl                {seed} in any text is the seed of the run
  sweep:
    learning_rate: [3.0e-6, 1.0e-5, 3.0e-5]       a list on the command line takes its place
    seed: [0, 1, 2]
    arms:                                         names and their settings; --control NAME … adds controls
      method: {}
      sft: {control: sft, learning_rate: [1.0e-6, 1.0e-5]}     an arm's own list takes the place of the common one
      answer_only: {context: answer_only}
    seeds_at: best                                also: jobs, keep

Each run is `opsd train` in a process of its own, with a folder in output_dir that is named after arm, values and seed;
its output is in train.log there. Call the sweep again after it was stopped: finished runs are skipped, others go on
from their checkpoint, or begin anew where they have none. A finished run with other settings than asked for is refused.
The doctor examines the first run of the method only.

options
  --control NAME …      arms: `method` (no control) and controls of `opsd train`
  --arms NAME …         only these arms
  --seeds-at all|best   see above; `best` needs `selection:` in the evaluation
  --jobs N              runs at a time, each with its share of the cores (default 1)
  --keep all|none       none: remove a run's weights and checkpoints once its results are written
  --output_dir FOLDER   of the sweep (default runs/sweep)
  --skip-doctor         train without the doctor
  --dry-run             print the runs and what is to do, train none
"""


def main(arguments: Sequence[str]) -> int:
    """Train what is missing and compare; returns 0, 1 if a run failed, or 128 + the signal that stopped the sweep."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        return 0
    from opsd.commands.sweep_plan import read_sweep
    from opsd.training.run_lock import only_run_in

    plan = read_sweep(arguments)
    if plan.dry_run:
        _show_plan(plan)
        return 0
    with only_run_in(plan.folder):
        return Sweep(plan, arguments).run()


class Sweep:
    """Trains the runs of a plan, and prints a line when one starts or ends.

    >>> Sweep(read_sweep(["run.yaml", "--seed", "0", "1"]), ["run.yaml", "--seed", "0", "1"]).run()
    0

    Args:
        plan: the runs.
        arguments: of the command line, to print how to go on.
    """

    def __init__(self, plan: SweepPlan, arguments: Sequence[str]):
        from opsd.commands.sweep_runs import wait_until_free

        self.plan, self._arguments = plan, arguments
        wait_until_free(plan.runs, _say)
        self.states = _states(plan)
        self._by_name = {run.name: run for run in plan.runs}
        self._wanted = list(plan.first_runs)  # runs of the plan as far as it is known
        self._missing = plan.later_count  # and those to come
        self._examined = None if plan.skip_doctor else next((run for run in plan.runs if run.is_method), None)
        self.received: list[int] = []

    def run(self) -> int:
        """Train, compare, and return the exit status."""
        from opsd.evaluation.sweep_folder import write_sweep

        plan = self.plan
        _say(f"sweep       {_count(plan)} in {plan.folder}")
        for line in plan.choice:
            _say(f"choice      {line}")
        declared = {"seeds_at": plan.seeds_at, "choice": plan.choice, "arms": plan.arms, "seeds": plan.seeds}
        write_sweep(plan.folder, declared, [run.name for run in plan.runs])
        goes_on = self._train(plan.first_runs)
        if goes_on and plan.seeds_at == "best":
            later = plan.later_runs(self._best())
            self._wanted, self._missing = [*plan.first_runs, *later], 0
            goes_on = self._train(later)
        if self.received:
            number = signal.Signals(self.received[0])
            _say(f"stopped by {number.name}: {self._done} of {self._total} runs are done. Go on with the same command:")
            _say(f"  opsd sweep {' '.join(self._arguments)}")
            return 128 + number.value
        failed = [run.name for run in self._wanted if self.states[run.name] == "failed"]
        if goes_on and self._done:
            self._compare()
        for name in failed:
            _say(f"failed      {name}: see {plan.folder / name}/train.log; the same command trains it again")
        return 1 if failed or not goes_on else 0

    @property
    def _done(self) -> int:
        return sum(self.states[run.name] == "done" for run in self._wanted)

    @property
    def _failed(self) -> int:
        return sum(self.states[run.name] == "failed" for run in self._wanted)

    @property
    def _total(self) -> int:
        return len(self._wanted) + self._missing

    # ---- training --------------------------------------------------------------------------------------------------

    def _train(self, runs: Sequence[SweepRun]) -> bool:
        """Train the runs that are not done; returns whether the sweep goes on."""
        from opsd.commands.processes import Processes
        from opsd.commands.sweep_runs import job_of

        jobs = [job_of(run, examined=run is self._examined) for run in runs if self.states[run.name] != "done"]
        self._goes_on = True
        processes = Processes(self.plan.jobs, self._started, self._ended, self.received)
        processes.run(jobs)
        return self._goes_on and not self.received

    def _started(self, job: Job) -> None:
        from opsd.commands.sweep_runs import begin

        begin(self._by_name[job.name])
        _say(f"started     {job.name}" + (f": {self.states[job.name]}" if self.states[job.name] != "new" else ""))

    def _ended(self, job: Job, exit_status: int, seconds: float) -> bool:
        from opsd.commands.sweep_runs import end, last_lines, outcome
        from opsd.commands.train import NOT_STARTED

        run = self._by_name[job.name]
        stopped = bool(self.received) or not self._goes_on
        status = self.states[job.name] = end(run, exit_status, seconds, keep=self.plan.keep, stopped=stopped)
        minutes = f"{seconds / 60:.1f} minutes"
        if status == "done":
            _say(f"done        {job.name}: {outcome(run)}, {minutes}; {self._progress()}")
        elif not stopped:
            _say(f"FAILED      {job.name} after {minutes}, exit status {exit_status}; the end of its train.log:")
            _say("\n".join(f"            {line}" for line in last_lines(run)))
            if run is self._examined and any(NOT_STARTED in line for line in last_lines(run)):
                _say(f"the doctor failed this run, and the sweep was stopped. All of it: opsd doctor {job.command[4]}")
                self._goes_on = False
            elif not self._done and self._failed >= ALIKE:
                _say(f"the first {self._failed} runs failed, and the sweep was stopped: the others would fail alike")
                self._goes_on = False
        return self._goes_on

    def _progress(self) -> str:
        """Return how many runs are done, and how long the others take if they take as long as those."""
        from opsd.commands.sweep_runs import seconds_of

        taken = [seconds_of(run) for run in self._wanted if self.states[run.name] == "done"]
        left = self._total - sum(self.states[run.name] in ("done", "failed") for run in self._wanted)
        if not left:
            return f"{self._done} of {self._total} runs done"
        minutes = math.ceil(left * sum(taken) / len(taken) / self.plan.jobs / 60)
        return f"{self._done} of {self._total} runs done, about {minutes} minute{'s' * (minutes != 1)} left"

    # ---- choosing and comparing ------------------------------------------------------------------------------------

    def _best(self) -> dict[str, Mapping[str, Any]]:
        """Return each arm's value with the best selection accuracy at the first seed."""
        from opsd.evaluation.selection import selection_accuracy
        from opsd.evaluation.sweep_folder import as_label

        best: dict[str, Mapping[str, Any]] = {}
        for arm in self.plan.arms:
            runs = [r for r in self.plan.first_runs if r.arm == arm and self.states[r.name] == "done"]
            if not runs:
                _say(f"best        {arm}: no run at the first seed was finished; its other seeds are left out")
                continue
            accuracies = {run.name: selection_accuracy(run.folder) or 0.0 for run in runs}
            chosen = max(runs, key=lambda run: accuracies[run.name])
            best[arm] = chosen.values
            shown = ", ".join(f"{name} {as_label(value)}" for name, value in chosen.values.items())
            _say(f"best        {arm}: {shown}, {accuracies[chosen.name]:.1%} on the selection split")
        return best

    def _compare(self) -> None:
        from opsd.commands import compare

        folder, files = self.plan.folder, compare.FILES
        compare.main(
            [str(folder), *(text for kind, name in files.items() for text in (f"--{kind}", str(folder / name)))]
        )


def _states(plan: SweepPlan) -> dict[str, str]:
    """Return what is to do with each run; refuses the sweep if any of them holds something else."""
    from opsd.commands.sweep_runs import state_of

    return {run.name: state_of(run) for run in plan.runs}


def _show_plan(plan: SweepPlan) -> None:
    states = _states(plan)
    print(f"sweep       {_count(plan)} in {plan.folder}")
    for run in plan.first_runs:
        print(f"            {run.name}: {states[run.name]}")
    if plan.seeds_at == "best":
        seeds = ", ".join(map(str, plan.seeds[1:]))
        print(f"            then seed {seeds} of each arm at its best value on the selection split")


def _count(plan: SweepPlan) -> str:
    points = {(run.arm, str(run.values)) for run in plan.runs}
    arms, seeds = f"{len(plan.arms)} arm(s)", f"{len(plan.seeds)} seed(s)"
    if plan.seeds_at == "best":
        count = len(plan.first_runs) + plan.later_count
        return f"{count} runs: {arms}, {len(points)} points at seed {plan.seeds[0]}, the other seeds at each arm's best"
    return f"{len(plan.runs)} runs: {arms}, {len(points)} points, {seeds}, {plan.jobs} at a time"


def _say(line: str) -> None:
    print(line, flush=True, file=sys.stdout)
