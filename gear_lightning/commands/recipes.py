"""``gear-lightning recipes``: the configuration files that the package brings along."""

import argparse

from rich.console import Console
from rich.table import Table

from ..recipes.packaged import about, configs

KINDS = {
    "": "recipes",
    "task": "task, on top of a recipe",
    "credit": "credit rules, on top of a recipe",
    "objective": "objectives, on top of a recipe",
    "model": "model, on top of a recipe",
    "optimizer": "optimizers, on top of a recipe",
    "strategy": "strategies, on top of a recipe",
    "study": "plans of `gear-lightning study`",
    "slurm": "`--cluster` files of `gear-lightning slurm`",
}


def recipes_command(argv: list[str]) -> int:
    """List packaged configuration files, one line each. Returns the exit status."""
    parser = argparse.ArgumentParser(
        "gear-lightning recipes",
        description="List the packaged configuration files. --config takes their names: --config quickstart, "
        "--config credit/grpo. A file of your own with that name goes first.",
    )
    parser.add_argument("--path", action="store_true", help="print the folder that they are in, and nothing else")
    if parser.parse_args(argv).path:
        print(configs())
        return 0
    table = Table(box=None, pad_edge=False, show_header=False)
    longest = max(len(str(path.relative_to(configs()))) for path in configs().rglob("*.yaml"))
    table.add_column(no_wrap=True, min_width=longest)
    table.add_column(no_wrap=True, overflow="ellipsis")
    for kind, title in KINDS.items():
        table.add_row(f"[bold]{title}[/bold]", "")
        for path in sorted((configs() / kind).glob("*.yaml")):
            table.add_row(f"  {path.relative_to(configs()).with_suffix('')}", about(path))
    Console(highlight=False).print(table)
    return 0
