"""Cells of tables: an estimate or a difference with its interval."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opsd.evaluation.statistics import Estimate, PairedDifference


def as_estimate(value: Estimate, scale: int) -> str:
    """Return an estimate with its interval, as a cell."""
    ends = "" if value.low is None or value.high is None else f" ({scale * value.low:.1f} to {scale * value.high:.1f})"
    return f"{scale * value.value:.1f}{ends}"


def as_change(change: PairedDifference, scale: int) -> str:
    """Return a difference with its interval, as a cell."""
    return f"{scale * change.difference:+.1f} ({scale * change.low:+.1f} to {scale * change.high:+.1f})"
