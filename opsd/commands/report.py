"""`opsd report RUN`: what training did, as one HTML page."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

FILE = "report.html"


def make_parser() -> argparse.ArgumentParser:
    """Return the options of `opsd report`."""
    parser = argparse.ArgumentParser(
        prog="opsd report",
        description="Write what a run did as one HTML page that loads nothing from elsewhere: the verdict, curves, "
        "each token coloured by how much the teacher disagrees, answers before and after, the run card. A run that "
        "broke off, or one of another trainer, is shown as far as it goes.",
        epilog="Example: opsd report runs/first --against runs/sft-* runs/wrong-context-*",
    )
    parser.add_argument("run", metavar="RUN", help="the output folder of a run")
    parser.add_argument("--against", metavar="RUN", nargs="+", default=[], help="its controls, and its other seeds")
    parser.add_argument("-o", "--output", metavar="FILE.html", help=f"the page (default: {FILE} in the run's folder)")
    return parser


def write_after_training(folder: str, say: Callable[[str], None]) -> None:
    """Write the report of a run that has just ended; what goes wrong is said, and spoils no run."""
    from opsd.evaluation.run_folder import write_whole
    from opsd.report.build import report_of
    from opsd.report.run import read_run

    path = Path(folder) / FILE
    try:
        write_whole(path, report_of(read_run(Path(folder))))
        say(f"report      {path}")
    except Exception as error:
        say(f"report      not written: {type(error).__name__}: {error}. Later: opsd report {folder}")


def main(arguments: Sequence[str]) -> int:
    """Write the page and say where it is."""
    options = make_parser().parse_args(arguments)
    from opsd.commands.compare import as_table
    from opsd.evaluation.compare import compare, read_runs
    from opsd.evaluation.run_folder import check_output, write_whole
    from opsd.report.build import report_of
    from opsd.report.run import read_run

    path = Path(options.output) if options.output else Path(options.run) / FILE
    run = read_run(Path(options.run))
    check_output(path)
    comparison = compare(read_runs([options.run, *options.against])) if options.against else None
    tables = [] if comparison is None else [as_table(comparison)]
    write_whole(path, report_of(run, comparison, tables))
    for each in run.missing:
        print(f"missing     {each}")
    print(f"report      {path}")
    return 0
