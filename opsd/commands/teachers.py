"""`opsd teachers`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

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
    strategies = Table("strategy", "class", "whose weights", box=None, header_style="bold", pad_edge=False)
    for name, cls in TEACHERS.items():
        strategies.add_row(name, cls.__name__, (cls.__doc__ or "").split("\n")[0])
    console.print(strategies, "")
    recipes = Table("recipe", "strategy", "context", "about", box=None, header_style="bold", pad_edge=False)
    for name in sources.names("teachers"):
        path = find_recipe(name)
        assert path is not None
        recipe = read_recipe(path)
        context = recipe.context
        template = context if isinstance(context, str) or context is None else context["template"]
        recipes.add_row(name, str(recipe.teacher["strategy"]), template or "—", recipe.about)
    console.print(recipes)
    return 0
