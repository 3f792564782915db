"""`opsd report RUN`: what training did, as one HTML page."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opsd.evaluation.compare import Comparison
    from opsd.report.page import Table

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
    try:
        _write(Path(folder), Path(folder) / FILE, [], say)
    except Exception as error:
        say(f"report      not written: {type(error).__name__}: {error}. Later: opsd report {folder}")


def main(arguments: Sequence[str]) -> int:
    """Write the page and say where it is."""
    options = make_parser().parse_args(arguments)
    from opsd.evaluation.run_folder import check_output

    folder = Path(options.run)
    path = Path(options.output) if options.output else folder / FILE
    check_output(path)
    for each in _write(folder, path, options.against, print):
        print(f"missing     {each}")
    return 0


def comparison_with(controls: Sequence[str]) -> Callable[[Path], tuple[Comparison, list[Table]]] | None:
    """Return what compares a run with its controls; None where there are none.

    Raises:
        CheckpointError: a control was not measured after training.
    """
    from opsd.commands.compare import as_table
    from opsd.evaluation.compare import compare, read_runs

    if not controls:
        return None
    others = read_runs(controls)

    def compared(folder: Path) -> tuple[Comparison, list[Table]]:
        comparison = compare([*read_runs([str(folder)]), *others])
        return comparison, [as_table(comparison)]

    return compared


def _write(folder: Path, path: Path, controls: Sequence[str], say: Callable[[str], None]) -> Sequence[str]:
    """Write the report of a run, say where it is, and return what it lacks."""
    from opsd.evaluation.run_folder import write_whole
    from opsd.report.build import report_of
    from opsd.report.run import read_run

    run, compared = read_run(folder), comparison_with(controls)
    comparison, tables = compared(folder) if compared else (None, [])
    write_whole(path, report_of(run, comparison, tables))
    say(f"report      {path}")
    return run.missing
