"""`opsd …`: a table of subcommands, no logic.

Each subcommand is a module of `opsd.commands` with a `main(arguments)`, imported when it is called.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import sys
import warnings
from collections.abc import Sequence

from rich.console import Console

from opsd import __version__
from opsd.errors import OPSDError

# name -> module of opsd.commands, one line of help
COMMANDS = {
    "train": ("train", "train a model with a teacher, from a YAML file"),
    "sweep": ("sweep", "train arms x learning rates x seeds of a run file, and compare them"),
    "doctor": ("doctor", "examine a run before step 1: alignment, prompts, leaks, whether the teacher helps"),
    "eval": ("evaluate", "grade a model's answers on a dataset, with intervals"),
    "health": ("health", "ask the monitors about a finished run: what failed, from which step on, what to try"),
    "score": ("score", "show what teachers with contexts say of each token of a row, without a run"),
    "rollout": ("rollout", "sample completions of rows from a model, to score and to train on"),
    "serve": ("serve", "print or start the vLLM command that serves a model as a teacher"),
    "report": ("report", "write what a run did as one HTML page: verdict, curves, every token, samples"),
    "watch": ("watch", "show the report of a run while it goes on, at 127.0.0.1"),
    "compare": ("compare", "compare a method with its controls, with intervals"),
    "show": ("show", "show a row's student and teacher prompt side by side, as text and as tokens"),
    "lint": ("lint", "check templates: syntax, safety, fields, leaks, boundaries"),
    "diff": ("diff", "list the differences between two runs"),
    "templates": ("templates", "list the templates, or those that fit a dataset's columns"),
    "teachers": ("teachers", "list the teacher strategies and recipes"),
    "cp": ("cp", "copy a shipped template or recipe, to edit it"),
    "demo": ("demo", "show on a small real model what fine-tuning costs, and how that comes back"),
}

# A full disk, a used-up quota, a read-only or a foreign folder: no fault of opsd's, and no traceback.
NOT_WRITABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENODEV, errno.ENAMETOOLONG),
)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `opsd` itself; each command's options are its own."""
    parser = argparse.ArgumentParser(
        prog="opsd",
        description="On-policy self-distillation with teachers that know more than the student is told.",
        epilog="Start here:  opsd demo   ·   opsd teachers   ·   opsd templates   ·   opsd COMMAND --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"opsd {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 0 done, 1 something was found, 2 wrong input, 130 stopped by Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Libraries warn each other of coming renames; whoever types a command can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning)
    options = make_parser().parse_args(arguments[:1] or ["--help"])
    module = importlib.import_module(f"opsd.commands.{COMMANDS[options.command][0]}")
    joined_before = _in_process_group()
    try:
        status = int(module.main(arguments[1:]) or 0)
        if _in_process_group() and not joined_before:
            _end_process_group()
        return status
    except OPSDError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]{type(error).__name__}:[/] ", end="")
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        path = error.filename2 or error.filename or "a file"
        way_out = "Make room, or choose another place; what is printed above holds."
        print(f"{path} could not be written: {error.strerror}. {way_out}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _in_process_group() -> bool:
    distributed = sys.modules.get("torch.distributed")  # commands that load no model do not import it
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _end_process_group() -> None:
    """End the group of a command that torchrun started: its threads can abort an interpreter that is torn down.

    Not after an error: one process may have failed alone, and ending the group may wait for work of the others.
    """
    sys.modules["torch.distributed"].destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
