"""The accuracy of a run on its selection split, by which a value of a swept setting is chosen.

Knows summaries of runs; nothing of the test split.
"""

from __future__ import annotations

import re
from pathlib import Path

from opsd.evaluation.summary import FOLDER, read_summary


def selection_accuracy(run: str | Path) -> float | None:
    """Return the accuracy on the selection split of the checkpoint that the run ended with; None without that split.

    Args:
        run: its output folder.
    """
    summary = read_summary(Path(run) / FOLDER)
    looks, chosen = summary.get("selection") or [], re.match(r"step (\d+)", summary.get("chosen", ""))
    if not looks or chosen is None:
        return None
    # With `rule: last` the last look may be some steps before the end.
    until = [look for look in looks if look["step"] <= int(chosen.group(1))]
    return float(until[-1]["accuracy"]["value"]) if until else None
