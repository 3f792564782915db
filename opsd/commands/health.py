"""`opsd health RUN`: what the monitors say of a finished run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


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
    from opsd.health.log import read_log
    from opsd.health.monitor import LEVELS
    from opsd.health.traces import read_traces
    from opsd.health.watch import replay

    logs, damaged, folder = read_log(Path(options.run))
    rollouts = list(read_traces(folder))
    watch = replay(logs, rollouts)
    for change in watch.history:
        print(change.line)
    print("\n".join(watch.summary))
    cut = f"; {damaged} damaged line(s) of the log were left out" if damaged else ""
    print(f"            {len(logs):,} log entries, {len(rollouts):,} traced rollouts{cut}")
    if options.json:
        verdicts = {name: verdict.level for name, verdict in watch.verdicts.items()}
        write_json(Path(options.json), {"changes": [each.plain for each in watch.history], "verdicts": verdicts})
    return int(watch.level == LEVELS.index("act"))
