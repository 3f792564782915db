"""`opsd doctor CONFIG.yaml`: check a run before step 1."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import warnings
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from opsd.errors import OPSDError, OPSDWarning
from opsd.findings import Examination, Finding
from opsd.health.text import printable

MARKS = {"pass": ("✓", "green"), "warn": ("!", "yellow"), "fail": ("✗", "bold red"), "skip": ("·", "dim")}
TITLES = {
    "settings": "Settings",
    "tokenizers": "Tokenizers and turns",
    "alignment": "Alignment",
    "sampling": "Sampling",
    "divergence": "Where the two differ",
    "rows": "Rows",
    "prompts": "Prompts",
    "leaks": "Leaks",
    "lift": "Does the teacher help?",
    "reach": "Can rollouts become what the teacher writes?",
    "cost": "Cost",
    "environment": "Environment",
}


def make_parser() -> argparse.ArgumentParser:
    """Return the options of `opsd doctor`; every other option is a setting of the run."""
    parser = argparse.ArgumentParser(
        prog="opsd doctor",
        usage="opsd doctor [CONFIG.yaml] [options] [--key value …]",
        allow_abbrev=False,
        description="Examine a run before step 1: tokenizers and turns, alignment, where student and teacher differ, "
        "prompts, leaks, how good the teacher is, cost, environment. Each finding says what was seen and what to do. "
        "Exit status 1 if a check fails. `opsd train` runs the same checks before step 1.",
        epilog="Settings of the run may follow: opsd doctor run.yaml --context hint --learning_rate 3e-5",
    )
    parser.add_argument("--rows", type=int, default=16, help="rows to look at (default: 16)")
    parser.add_argument("--only", metavar="CHECK,…", help=f"some of: {', '.join(list(TITLES)[1:])}")
    grades = "tells right answers from wrong ones (default: the run's reward functions, else what fits `answer`)"
    parser.add_argument("--grader", help=grades)
    parser.add_argument("--max_new_tokens", type=int, help="of rollouts made here (default: max_completion_length)")
    parser.add_argument("--verbose", action="store_true", help="print every finding, also of checks that are content")
    parser.add_argument("--json", metavar="FILE", help="write the findings; - for standard output")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Examine, print, and return 1 if training would be wrong."""
    has_file = bool(arguments) and not arguments[0].startswith("-")
    options, settings = make_parser().parse_known_args(list(arguments)[1 if has_file else 0 :])
    from opsd.commands.run_file import read_run
    from opsd.doctor import refused
    from opsd.evaluation.run_folder import write_json

    run = read_run(Path(arguments[0]) if has_file else None, settings)
    to_pipe = options.json == "-"
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("always", OPSDWarning)
        try:
            examination = _examined(run, options)
        except OPSDError as error:
            examination = refused(error)
    examination = with_warnings(examination, caught)
    if to_pipe:
        print(json.dumps(examination.as_dict(), indent=1, ensure_ascii=False, default=str))
    else:
        show(examination, Console(), options.verbose)
    if options.json and not to_pipe:  # after the findings are printed: a full disk loses none
        write_json(Path(options.json), examination.as_dict(), default=str)
    return int(examination.failed)


def _examined(run: Any, options: argparse.Namespace) -> Examination:
    from opsd.commands.build import build_trainer
    from opsd.doctor import examine

    output = Path(run.args.output_dir)
    was_there = output.exists()
    only = [name.strip() for name in options.only.split(",")] if options.only else ()
    with Console(stderr=True).status("loading") as status:
        trainer = build_trainer(run)
        examination = examine(
            trainer,
            rows=options.rows,
            only=only,
            grader=options.grader,
            max_new_tokens=options.max_new_tokens,
            progress=lambda name: status.update(TITLES[name]),
        )
    if not was_there and not any(output.iterdir()):  # made by the check that it can be written to
        output.rmdir()
    return examination


def with_warnings(examination: Examination, caught: Sequence[warnings.WarningMessage]) -> Examination:
    """Return an examination with opsd's warnings about the settings as its first findings."""
    messages = dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, OPSDWarning))
    first = [Finding("settings", "warn", message) for message in messages]
    return Examination([*first, *examination.findings], examination.rows, examination.seconds)


def show(examination: Examination, console: Console, verbose: bool = False) -> None:
    """Print the findings, check by check: a line for a check that is content, all of them with `verbose`."""
    for check, group in groupby(examination.findings, key=lambda finding: finding.check):
        findings = list(group)
        noted = [finding for finding in findings if verbose or finding.status in ("warn", "fail")]
        if not noted:
            mark, style = MARKS[findings[0].status]
            title = TITLES[check] + ("" if TITLES[check].endswith("?") else ":")
            line = Text.assemble((f"{mark} ", style), (f"{title} ", "bold"), printable(findings[0].saw))
            line.truncate(console.width, overflow="ellipsis")
            console.print(line)
            continue
        console.print(Text(TITLES[check], "bold"))
        for finding in noted:
            print_finding(finding, console)
    if not verbose:
        console.print(Text("All findings: opsd doctor run.yaml --verbose", "dim"))
    style = "bold red" if examination.failed else "bold yellow" if examination.with_status("warn") else "bold green"
    console.print(Text(examination.verdict, style))


def print_finding(finding: Finding, console: Console) -> None:
    """Print one finding: what was seen, and what to do."""
    mark, style = MARKS[finding.status]
    console.print(_hanging(f"  {mark} ", style, finding.saw, "dim" if finding.status == "skip" else "", console))
    for line in finding.detail:
        console.print(_hanging("      ", "", line, "dim", console))
    if finding.do and finding.status != "pass":
        console.print(_hanging("    → ", style, finding.do, "italic", console))


def _hanging(mark: str, mark_style: str, text: str, style: str, console: Console) -> Text:
    """Return a paragraph whose later lines stand under its first word."""
    indent = len(mark)
    lines = Text(printable(text, keep="\n"), style).wrap(console, max(20, console.width - indent))
    return Text("\n").join(
        Text.assemble((mark if number == 0 else " " * indent, mark_style), line) for number, line in enumerate(lines)
    )
