"""`opsd cp NAME [FOLDER]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from opsd import sources
from opsd.errors import ConfigError, did_you_mean
from opsd.evaluation.run_folder import write_whole


def main(arguments: Sequence[str]) -> int:
    """Copy a shipped template or recipe."""
    parser = argparse.ArgumentParser(
        prog="opsd cp", description="Copy a shipped template or recipe into a folder, to edit it. Never overwrites."
    )
    parser.add_argument("name", help="a name from `opsd templates` or `opsd teachers`")
    parser.add_argument("folder", nargs="?", default=".", help="where to (default: here)")
    options = parser.parse_args(arguments)
    paths = [path for kind in sources.SUFFIX if (path := sources.find(kind, options.name))]
    if not paths:
        known = [name for kind in sources.SUFFIX for name in sources.names(kind)]
        raise ConfigError(
            f"no template or recipe is called {options.name!r}.{did_you_mean(options.name, known)} "
            f"There are: {', '.join(known)}."
        )
    for path in paths:
        target = Path(options.folder) / path.name
        if not target.parent.is_dir():
            raise ConfigError(f"there is no folder {options.folder}. Make it first.")
        if target.exists():
            raise ConfigError(f"{target} exists, and copying would lose your edits. Move it, or name another folder.")
        write_whole(target, path.read_text("utf-8"))
        print(target)
    return 0
