"""`opsd health RUN`: what the monitors say of a finished run."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opsd.errors import CheckpointError

STATE = "trainer_state.json"
CHECKPOINT = re.compile(r"checkpoint-\d+")


def make_parser() -> argparse.ArgumentParser:
    """Return the options of `opsd health`."""
    parser = argparse.ArgumentParser(
        prog="opsd health",
        description="Ask the monitors of health about a finished run, from its log and its traces: a folder of opsd, "
        "or of any transformers or TRL trainer. Exit status 1 if a monitor says act.",
        epilog="Example: opsd health runs/first",
    )
    parser.add_argument("run", metavar="RUN", help="an output folder, a checkpoint, or a trainer_state.json")
    parser.add_argument("--json", metavar="FILE", help="write every change of a level, and the verdicts at the end")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Print each change of a level and the verdicts at the end."""
    options = make_parser().parse_args(arguments)
    from opsd.evaluation.run_folder import write_json
    from opsd.health.monitor import LEVELS
    from opsd.health.traces import read_traces
    from opsd.health.watch import replay

    path = _find_log(Path(options.run))
    folder = path.parent.parent if CHECKPOINT.fullmatch(path.parent.name) else path.parent
    logs, rollouts = _log_of(path), list(read_traces(folder))
    watch = replay(logs, rollouts)
    for change in watch.history:
        print(change.line)
    print("\n".join(watch.summary))
    print(f"            {len(logs):,} log entries, {len(rollouts):,} traced rollouts")
    if options.json:
        verdicts = {name: verdict.level for name, verdict in watch.verdicts.items()}
        write_json(Path(options.json), {"changes": [each.plain for each in watch.history], "verdicts": verdicts})
    return int(watch.level == LEVELS.index("act"))


def _find_log(run: Path) -> Path:
    """Return the newest log of a run: its own, or a checkpoint's."""
    if run.is_file():
        return run
    checkpoints = [path for path in run.glob(f"checkpoint-*/{STATE}") if CHECKPOINT.fullmatch(path.parent.name)]
    found = [path for path in (run / STATE, *checkpoints) if path.is_file()]
    if not found:
        raise CheckpointError(
            f"{run} holds no {STATE}, in which transformers keeps the log of a run. Give the output folder of a run "
            "that has ended or saved a checkpoint; of another trainer, call trainer.save_state() at its end."
        )
    return max(found, key=lambda path: (max((entry["step"] for entry in _log_of(path)), default=0), path.parent == run))


def _log_of(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a log."""
    try:
        entries = json.loads(path.read_text("utf-8"))["log_history"]
        return [{**entry, "step": int(entry["step"])} for entry in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no log of a trainer ({type(error).__name__}: {error}).") from error
