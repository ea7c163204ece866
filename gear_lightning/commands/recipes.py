"""``gear-lightning recipes``: list the configuration files of the package."""

from ..recipes.options.parser import CommandParser
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
    parser = CommandParser(
        "recipes",
        description="List the packaged configuration files. --config takes their names: --config quickstart, "
        "--config credit/grpo. A file with that name in the working directory has precedence.",
    )
    parser.add_argument("--path", action="store_true", help="print the folder that they are in, and nothing else")
    if parser.parse_args(argv).path:
        print(configs())
        return 0
    found = {kind: sorted((configs() / kind).glob("*.yaml")) for kind in KINDS}
    names = {path: str(path.relative_to(configs()).with_suffix("")) for paths in found.values() for path in paths}
    longest = max(map(len, names.values()))
    for kind, title in KINDS.items():
        print(f"{title}:")
        for path in found[kind]:
            print(f"  {names[path]:<{longest}}  {about(path)}")
    return 0
