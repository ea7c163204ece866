"""``gear-lightning init``: a small project that trains at once."""

import shlex
from importlib.resources import files
from pathlib import Path

from ..errors import UserError
from ..recipes.options.parser import CommandParser


def init_command(argv: list[str]) -> int:
    """Write a project into a new or empty directory. Returns the exit status."""
    parser = CommandParser(
        "init",
        description="Write a small project: tasks, a tool, a reward, an environment, a recipe and tests.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="directory to write; must not exist, or be empty")
    folder = parser.parse_args(argv).folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not an empty directory")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for template in sorted((files("gear_lightning") / "commands" / "project").iterdir(), key=lambda f: f.name):
            name = template.name.removesuffix(".txt")
            (folder / name).write_text(template.read_text(encoding="utf-8"), encoding="utf-8")
            print(folder / name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
    print(f"train it:  cd {shlex.quote(str(folder))} && gear-lightning fit --config recipe.yaml")
    return 0
