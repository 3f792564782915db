"""What a person sees while a run trains: a line per log entry, and on a terminal a bar with the time that is left.

Everything that is logged stays in full in `trainer.state.log_history` and wherever `report_to` sends it. Knows logged
metrics by name; nothing of models, rollouts or losses.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState

from opsd.health.bound import bound_of_step
from opsd.health.rollout import TracedRollout
from opsd.health.text import printable
from opsd.health.watch import Monitors, is_training
from opsd.training.evaluator import CONSOLE
from opsd.training.log_file import LogFile
from opsd.training.tracer import Tracer

SHOWN = 300  # characters of a prompt
DROPPED = (r"^lr .*", r" \(max .*\)", r"^entropy .*")  # in turn, from a line that is too long for its terminal


def watched(trainer: Any) -> tuple[Tracer, Monitors, Display]:
    """Let a trainer keep traces, ask the monitors of health, and show what it logs in place of callbacks that print."""
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("PrinterCallback", "ProgressCallback", "NotebookProgressCallback"):
            trainer.remove_callback(callback)
    trainer.num_completions_to_print = 0  # TRL's table shows no token; its files and reports stay
    tracer = Tracer(trainer.files.parts, trainer.eos_token_ids, trainer._say)
    divergence = trainer.scorer.objective.divergence
    name = divergence.kind.name(divergence.beta)
    accelerator = trainer.accelerator

    def agree(own: bool) -> bool:
        return bool(accelerator.gather(torch.tensor(own, device=accelerator.device)).any())

    health = Monitors(trainer.args.health_action, trainer._say, lambda: tracer.recent, agree)
    display = Display(name, trainer._say, tracer, health)
    trainer.callback_handler.callbacks.insert(0, health)  # before those that report, which get its level too
    for added in (display, tracer, LogFile(trainer._say)):
        trainer.add_callback(added)
    return tracer, health, display


def line_of(logs: Mapping[str, Any], step: int, steps: int, name: str, width: int | None = None) -> str:
    """Return a log entry in one line, without what stays the same or says the same.

    Args:
        logs: metrics by name.
        step: the step of the entry.
        steps: of the whole run; 0 where that is unknown.
        name: of the divergence, such as "reverse KL".
        width: of a terminal, where a longer line loses learning rate, largest divergence and entropy in turn; None for
            a file.

    Example:
        >>> line_of({"divergence": 0.107, "divergence/max": 1.4, "step_time": 3.7}, 3, 6, "reverse KL")
        'step 3/6  reverse KL 0.107 (max 1.4)  3.7 s'
    """
    start = f"step {step:>{len(str(steps))}}/{steps}" if steps else f"step {step}"
    if "train_runtime" in logs:
        return f"done        {step:,} steps in {_duration(logs['train_runtime'])}"
    parts = _evaluated(logs) if any(key.startswith("eval_") for key in logs) else _trained(logs, name)
    line = "  ".join([start, *parts])
    for dropped in DROPPED if width is not None else ():
        if len(line) > (width or 0):
            parts = [re.sub(dropped, "", part) for part in parts]
            line = "  ".join([start, *filter(None, parts)])
    return line


def rollout_text(rollout: TracedRollout) -> Text:
    """Return a rollout with the prompts of both sides, and the tokens that carried most of the loss marked ‹so›."""
    heavy = rollout.carriers
    text = Text(f"student's prompt  {rollout.prompt[-SHOWN:]!r}\n", style="dim")
    if rollout.context and rollout.context != rollout.prompt:
        text.append(f"teacher's prompt  {rollout.context[-SHOWN:]!r}\n")
    text.append("rollout           ")
    for place, token in enumerate(rollout.tokens):
        shown = printable(token)
        text.append(*((f"‹{shown}›", "bold red not dim") if place in heavy else (shown, "not dim")))
    scored = sum(not math.isnan(nats) for nats in rollout.divergence)
    share = sum(abs(rollout.divergence[place]) for place in heavy) / (rollout.size or 1)
    text.append(f"\n                  {len(heavy)} of {scored} tokens carry {share:.0%} of {rollout.size:.2f} nats")
    return text if math.isnan(rollout.reward) else text.append(f"; reward {rollout.reward:g}")


def _trained(logs: Mapping[str, Any], name: str) -> list[str]:
    parts: list[str] = []
    if "divergence" in logs:
        most = f" (max {logs['divergence/max']:.2g})" if "divergence/max" in logs else ""
        parts.append(f"{name} {logs['divergence']:.3f}{most}")
    elif "loss" in logs:
        parts.append(f"loss {logs['loss']:.3f}")
    parts += [f"{key} {logs[key]:.2f}" for key in ("entropy", "reward") if key in logs]
    if "completions/mean_length" in logs:
        cut = logs.get("completions/clipped_ratio", 0.0)
        parts.append(f"length {logs['completions/mean_length']:.1f}" + (f", {cut:.0%} cut" if cut else ""))
    if "learning_rate" in logs:
        parts.append(f"lr {logs['learning_rate']:.1e}")
    if logs.get("step_time") is not None:
        parts.append(f"{logs['step_time']:.1f} s")
    return parts


def _evaluated(logs: Mapping[str, Any]) -> list[str]:
    parts: list[str] = []
    for key, value in logs.items():
        known = key.removeprefix("eval_")
        if known == key or not isinstance(value, int | float) or known.endswith("_per_second"):
            continue
        if known == "accuracy":
            parts.insert(0, f"accuracy {value:.1%} (selection)")
        elif known in ("length", "runtime") or known.endswith("loss"):
            parts.append(f"{known.removesuffix('_runtime')} {value:.3g}" + (" s" if known.endswith("runtime") else ""))
    return ["evaluation", *parts]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


class Display(TrainerCallback):
    """Prints a line per log entry, and shows a bar on a terminal; in place of transformers' two.

    >>> trainer.train()
    step 1/6  reverse KL 0.107 (max 1.4)  entropy 2.22  length 15.5, 62% cut  lr 1.0e-05  3.7 s

    Args:
        name: of the divergence.
        say: prints a line, in the first process only.
        tracer: has the rollouts since the last entry, for `log_completions`.
        health: the monitors, whose levels stand at the end of a line.
        console: where the bar is shown; a file gets lines only.
    """

    def __init__(
        self, name: str, say: Callable[[str], None], tracer: Tracer, health: Monitors, console: Console = CONSOLE
    ):
        self._name, self._say, self._tracer, self._health, self._console = name, say, tracer, health, console
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show the bar, on a terminal and unless `disable_tqdm` is set."""
        if args.disable_tqdm or not state.is_world_process_zero or not self._console.is_terminal:
            return
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
        )
        self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console, transient=True)
        self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step)
        self._bar.start()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: Mapping[str, Any], **kwargs: Any
    ) -> None:
        """Print the entry, and keep its divergence beside the bar."""
        if not state.is_world_process_zero:
            return
        width = self._console.width if self._console.is_terminal else None
        line = line_of(logs, state.global_step, state.max_steps, self._name, width)
        spoken = {name: verdict.level for name, verdict in self._health.watch.verdicts.items()}
        levels = [f"{level}: {', '.join(names)}" for level in ("act", "watch")
                  if (names := [name for name, of in spoken.items() if of == level])]  # fmt: skip
        self._say("  ".join([line, *(levels if is_training(logs) and "train_runtime" not in logs else [])]))
        if "train_runtime" in logs and (bound := bound_of_step(state.log_history)):
            self._say(f"time        {bound}")
        if args.log_completions:
            for rollout in self._tracer.recent[-(args.num_completions_to_print or 1) :]:
                self._console.print(rollout_text(rollout), soft_wrap=not self._console.is_terminal)
        if self._bar is not None and "divergence" in logs:
            self._bar.update(self._task, description=f"{self._name} {logs['divergence']:.3f}")

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
