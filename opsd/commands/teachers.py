"""`opsd teachers`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding

from opsd import sources
from opsd.teachers import TEACHERS
from opsd.teachers.recipes import find_recipe, read_recipe


def main(arguments: Sequence[str]) -> int:
    """List strategies and recipes."""
    parser = argparse.ArgumentParser(
        prog="opsd teachers",
        description="List the teacher strategies (whose weights score) and the recipes (with which numbers).",
        epilog="Use one: OPSDTrainer(teacher='ema'), or `teacher: ema` in a run's YAML. Copy one: opsd cp ema .",
    )
    parser.parse_args(arguments)
    console = Console()
    console.print("Strategies: whose weights score\n", style="bold underline")
    for name, cls in TEACHERS.items():
        _entry(console, name, cls.__name__, (cls.__doc__ or "").split("\n")[0])
    console.print("\nRecipes: a strategy, its context and the numbers of its paper\n", style="bold underline")
    for name in sources.names("teachers"):
        path = find_recipe(name)
        assert path is not None
        recipe = read_recipe(path)
        context = recipe.context
        template = context if isinstance(context, str) or context is None else context["template"]
        shown = f"context {template}" if template else "no context"
        _entry(console, name, f"{recipe.teacher['strategy']}, {shown}", recipe.about)
    return 0


def _entry(console: Console, name: str, beside: str, text: str) -> None:
    """Print a name with what belongs to it, and below, at full width, what it is."""
    console.print(f"[bold]{escape(name)}[/]  {escape(beside)}", highlight=False)
    console.print(Padding(escape(text), (0, 0, 0, 4)), highlight=False)
