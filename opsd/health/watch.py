"""Runs all monitors on a training run, as a callback of any transformers Trainer: ours, or TRL's.

A monitor speaks when its level changes: one line on the terminal, one in `health.jsonl`, and its level among the logged
metrics. One that raises is reported and switched off; it never ends a run. Knows logs and traced rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from opsd.errors import CheckpointError, ConfigError, not_one_of
from opsd.health.log import Lines
from opsd.health.monitor import FINE, LEVELS, Monitor, Values, Verdict
from opsd.health.monitors import MONITORS
from opsd.health.rollout import Step, TracedRollout
from opsd.health.statistics import statistics_of
from opsd.health.traces import read_traces

FILE = "health.jsonl"
ACTIONS = {
    "none": "the run goes on",
    "stop": "the run ends after the step, with a checkpoint",
    "roll_back": "the run ends, and the best checkpoint by the rule of its evaluation is what it gives",
}
LOSSES = ("loss", "divergence", "entropy")  # a gradient may overflow: the loss scaler of float16 expects it
TRACED = "traced_tokens"  # a statistic of rollouts that is there wherever any is
METRIC = "health"  # the worst level of all monitors: 0 fine, 1 watch, 2 act


@dataclass(frozen=True)
class Change:
    """A monitor whose level changed.

    >>> Change(40, "length", "fine", Verdict("watch", "rollouts have 12 tokens, …", "Compare samples …")).line
    'health      step 40: length: watch: rollouts have 12 tokens, …. Compare samples …'

    Args:
        step: at which.
        monitor: its name.
        before: its level before.
        verdict: what it says now.
    """

    step: int
    monitor: str
    before: str
    verdict: Verdict

    @property
    def line(self) -> str:
        """The change as a line for the terminal."""
        start = f"health      step {self.step}: {self.monitor}"
        if self.verdict.level == "fine":
            return f"{start} is fine again"
        return f"{start}: {self.verdict.level}: {self.verdict.saw}. {self.verdict.do}"

    @property
    def plain(self) -> dict[str, Any]:
        """The change in plain values."""
        return {"step": self.step, "monitor": self.monitor, "before": self.before, **asdict(self.verdict)}


class Watch:
    """All monitors of a run, their values and their levels.

    >>> watch = Watch()
    >>> watch.look(Step(10, {"grad_norm": 0.0}))
    [Change(step=10, monitor='gradient', before='fine', verdict=Verdict(level='watch', …))]

    Args:
        monitors: classes of monitors.
    """

    def __init__(self, monitors: Sequence[type[Monitor]] = MONITORS):
        self._monitors = {monitor.name: monitor() for monitor in monitors}
        self.values = Values()
        self.statistics: dict[str, float] = {}  # of the last entry's rollouts
        self.verdicts: dict[str, Verdict] = {}
        self.broken: dict[str, str] = {}  # why a monitor was switched off
        self.history: list[Change] = []

    def look(self, step: Step) -> list[Change]:
        """Add a log entry, ask all monitors that know what they need, and return whose level changed."""
        try:
            self.statistics = statistics_of(step.rollouts)
        except Exception as error:
            self.statistics, self.broken["statistics of rollouts"] = {}, f"{type(error).__name__}: {error}"
        entry = {**self.statistics, **step.logs}  # what was logged was read of all that was traced then
        losses = [entry[name] for name in LOSSES if isinstance(entry.get(name), float)]
        if losses:
            entry["not_finite"] = float(not all(map(math.isfinite, losses)))
        self.values.add(step.number, entry)
        changes = []
        for name, monitor in list(self._monitors.items()):
            # An entry without its values is no look: evaluations are logged apart.
            if not any(need in entry for need in monitor.needs) or not all(
                need in self.values for need in monitor.needs
            ):
                continue
            try:
                verdict = monitor.judge(self.values)
            except Exception as error:
                self.broken[name] = f"{type(error).__name__}: {error}"
                del self._monitors[name]
                continue
            before, self.verdicts[name] = self.verdicts.get(name, FINE), verdict
            if verdict.level != before.level:
                changes.append(Change(step.number, name, before.level, verdict))
        self.history += changes
        return changes

    @property
    def level(self) -> int:
        """The worst level: 0 fine, 1 watch, 2 act."""
        return max((LEVELS.index(verdict.level) for verdict in self.verdicts.values()), default=0)

    @property
    def summary(self) -> list[str]:
        """What the monitors say at the end, in lines; the worst first."""
        spoken = sorted(self.verdicts.items(), key=lambda item: -LEVELS.index(item[1].level))
        lines = [
            f"health      {name}: {verdict.level}: {verdict.saw}. {verdict.do}"
            for name, verdict in spoken
            if verdict.level != "fine"
        ]
        lines += [f"health      {name} was not looked at: {reason}" for name, reason in self.broken.items()]
        over = sorted({change.monitor for change in self.history} - {name for name, v in spoken if v.level != "fine"})
        again = f"; {', '.join(over)} spoke, and {'is' if len(over) == 1 else 'are'} fine again" if over else ""
        fine = sum(verdict.level == "fine" for _, verdict in spoken)
        return [*lines, f"health      {fine} of {len(spoken)} monitors that could look are content{again}"]


class Monitors(TrainerCallback):
    """The monitors as a callback, for any Trainer; without traces, those whose metrics are logged.

    >>> trainer = GRPOTrainer(model, reward, train_dataset=rows, callbacks=[Monitors()])

    Args:
        action: what to do when a monitor says act: a key of ACTIONS.
        say: prints a line, in the first process only.
        rollouts: returns the traced rollouts since the last entry.
        agree: tells whether any process says yes; a collective, which is called at each log entry where there is an
            action. Without it processes must log the same, as those of a Trainer do.
    """

    def __init__(
        self,
        action: str = "none",
        say: Callable[[str], None] | None = None,
        rollouts: Callable[[], Sequence[TracedRollout]] = tuple,
        agree: Callable[[bool], bool] = bool,
    ):
        if action not in ACTIONS:
            raise ConfigError(not_one_of("health_action", action, ACTIONS))
        self._action, self._say, self._rollouts, self._agree = action, say, rollouts, agree
        self.watch = Watch()
        self.stopped: Change | None = None  # by which the run ended
        self._file: Lines | None = None  # in the process that writes

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Begin anew; a resumed run looks at its own log and traces first, without a word."""
        folder, self.stopped = Path(args.output_dir), None
        is_first = state.is_world_process_zero
        rollouts, damage = list[TracedRollout](), ""
        try:
            rollouts += read_traces(folder) if state.global_step and is_first else ()
        except CheckpointError as error:
            damage = str(error)
        self.watch = replay(state.log_history, rollouts)
        if damage:
            self.watch.broken["traces"] = damage
        if self._action != "none" and args.logging_strategy == "no":
            self._print(f"health      health_action {self._action} has nothing to look at: logging_strategy is no")
        if is_first and args.should_save:
            self._file = Lines(folder / FILE)
            self._file.forget_after(state.global_step)
            self._note_damage()

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> TrainerControl:
        """Look at an entry, say what changed, add what was seen to it, and end the run where that was asked for."""
        if "train_runtime" in logs:
            return control
        changes = self.watch.look(Step(state.global_step, logs, self._rollouts() if is_training(logs) else ()))
        added = {**self.watch.statistics, METRIC: self.watch.level}
        logs.update(added)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(added)  # transformers added a copy of the entry
        if state.is_world_process_zero:
            for change in changes:
                self._print(change.line)
            if changes and self._file is not None:
                self._file.append([change.plain for change in changes])
                self._note_damage()
        acting = next((change for change in changes if change.verdict.level == "act"), None)
        if self._action != "none" and self.stopped is None and self._agree(acting is not None):
            self.stopped = acting or Change(state.global_step, "of another process", "fine", FINE)
            self._print(f"stopped     by the monitor {self.stopped.monitor} (health_action: {self._action})")
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no"
            control.should_evaluate = control.should_evaluate or self._action == "roll_back"  # it may be the best yet
        return control

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Say what the monitors say at the end."""
        if state.is_world_process_zero:
            self._print("\n".join(self.watch.summary))

    @property
    def plain(self) -> dict[str, Any]:
        """What the monitors said, in plain values, for the run card."""
        spoken = {name: verdict for name, verdict in self.watch.verdicts.items() if verdict.level != "fine"}
        return {
            "looked": sorted(self.watch.verdicts),
            "now": {name: {"level": verdict.level, "saw": verdict.saw} for name, verdict in spoken.items()},
            "changes": len(self.watch.history),
            "switched_off": self.watch.broken,
            "stopped_by": None if self.stopped is None else self.stopped.monitor,
        }

    def _note_damage(self) -> None:
        if self._file is not None and self._file.damage:
            self.watch.broken[FILE] = self._file.damage

    def _print(self, line: str) -> None:
        if self._say is None:
            print(line, flush=True)
        else:
            self._say(line)


def is_training(entry: Mapping[str, Any]) -> bool:
    """Tell whether a log entry is of training steps; evaluations are logged apart."""
    return any(name in entry for name in ("loss", "divergence", "grad_norm"))


def replay(logs: Iterable[Mapping[str, Any]], rollouts: Sequence[TracedRollout] = ()) -> Watch:
    """Return what the monitors would have said of a finished run.

    Args:
        logs: its log history: entries with `step`, as transformers keeps them.
        rollouts: its traces, in the order of steps.
    """
    watch, seen = Watch(), 0
    for entry in logs:
        step = int(entry.get("step", 0))
        upto = seen
        while is_training(entry) and upto < len(rollouts) and rollouts[upto].step <= step:
            upto += 1
        # What was logged was read of rollouts then.
        watch.look(Step(step, entry, () if TRACED in entry else rollouts[seen:upto]))
        seen = upto
    return watch
