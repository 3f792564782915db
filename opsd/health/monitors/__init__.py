"""THE table of monitors, one file each."""

from __future__ import annotations

from opsd.health.monitor import Monitor
from opsd.health.monitors.clip import Clip
from opsd.health.monitors.context import Context
from opsd.health.monitors.diversity import Diversity
from opsd.health.monitors.drift import Drift
from opsd.health.monitors.engine import Engine
from opsd.health.monitors.entropy import Entropy
from opsd.health.monitors.finite import Finite
from opsd.health.monitors.gradient import Gradient
from opsd.health.monitors.idle import Idle
from opsd.health.monitors.large_kl import LargeKL
from opsd.health.monitors.leak import Leak
from opsd.health.monitors.length import Length
from opsd.health.monitors.lift import Lift
from opsd.health.monitors.lmbda import Lmbda
from opsd.health.monitors.opening import Opening
from opsd.health.monitors.overfit import Overfit
from opsd.health.monitors.repetition import Repetition
from opsd.health.monitors.siblings import Siblings
from opsd.health.monitors.style import Style
from opsd.health.monitors.support import Support
from opsd.health.monitors.task import Task
from opsd.health.monitors.thinking import Thinking
from opsd.health.monitors.tools import Tools
from opsd.health.monitors.truncation import Truncation
from opsd.health.monitors.unscored import Unscored
from opsd.health.thresholds import THRESHOLDS

MONITORS: tuple[type[Monitor], ...] = (
    Finite,
    Gradient,
    Opening,
    Style,
    LargeKL,
    Leak,
    Length,
    Truncation,
    Entropy,
    Repetition,
    Diversity,
    Siblings,
    Thinking,
    Tools,
    Drift,
    Engine,
    Task,
    Lift,
    Overfit,
    Lmbda,
    Idle,
    Unscored,
    Context,
    Support,
    Clip,
)


def as_markdown() -> str:
    """Return the table as docs/health.md has it."""
    rows = []
    for monitor in MONITORS:
        limits, needs = THRESHOLDS[monitor.name], ", ".join(f"`{need}`" for need in monitor.needs)
        cells = (f"`{monitor.name}`", needs, f"{limits.watch:g}", f"{limits.act:g}", limits.unit, limits.source)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(["| monitor | reads | watch | act | of what | source |", "|---" * 6 + "|", *rows])
