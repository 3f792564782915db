"""`opsd watch RUN`: the report of a run while it goes on, and a line per log entry."""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opsd.errors import CheckpointError, ConfigError

PORT = 8765
SECONDS = 2.0  # between two looks at the log


def make_parser() -> argparse.ArgumentParser:
    """Return the options of `opsd watch`."""
    parser = argparse.ArgumentParser(
        prog="opsd watch",
        description="Show the report of a run while it goes on, at 127.0.0.1 only, and print a line per log entry. It "
        "reads the run's folder; the run itself knows nothing of it. Ctrl-C ends it.",
        epilog="Example: opsd watch runs/first",
    )
    parser.add_argument("run", metavar="RUN", help="the output folder of a run")
    parser.add_argument("--against", metavar="RUN", nargs="+", default=[], help="its controls, and its other seeds")
    parser.add_argument("--port", type=int, default=PORT, help=f"of the page (default: {PORT})")
    parser.add_argument("--terminal", action="store_true", help="print lines only, and serve nothing")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Serve and print until Ctrl-C, or until the run has ended where nothing is served."""
    options = make_parser().parse_args(arguments)
    if not 0 <= options.port < 65536:
        raise ConfigError(f"a port lies between 0 (any) and 65535, and --port is {options.port}.")
    from opsd.health.log import read_log
    from opsd.report.missing import Missing
    from opsd.report.run import ReportedRun, card_of
    from opsd.training.display import line_of

    folder = Path(options.run)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder. Give the output folder of a run that has begun.")
    if not options.terminal:
        from opsd.commands.report import comparison_with
        from opsd.report.live import HOST, LiveReport, make_server

        report = LiveReport(folder, comparison_with(options.against))
        server = make_server(report, options.port)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(f"report      http://{HOST}:{server.server_address[1]}/{report.key}/  (Ctrl-C ends it)", flush=True)
    seen, has_ended, old = 0, False, list[dict[str, Any]]()
    while not (has_ended and options.terminal):
        try:
            logs = read_log(folder)[0]
        except CheckpointError:
            logs = []  # it has not begun to log
        if logs[:seen] != old:
            seen = 0  # it began anew
        card = Missing().tried("the run card", lambda: card_of(folder), dict[str, Any]())
        run = ReportedRun(folder, card, logs)
        for entry in logs[seen:]:
            try:
                line = line_of(entry, entry["step"], run.planned_steps, run.divergence)
            except (TypeError, ValueError):
                line = f"step {entry['step']}  (an entry that cannot be read)"
            print(line, flush=True)
        has_ended, seen, old = run.has_ended, len(logs), logs
        time.sleep(0 if has_ended and options.terminal else SECONDS)
    return 0
