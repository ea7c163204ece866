"""The recipes in the package: ``configs/`` of a checkout, ``gear_lightning/configs/`` of a wheel."""

from pathlib import Path

from ..errors import UserError
from ..hints import did_you_mean

PACKAGE = Path(__file__).resolve().parents[1]
TAKE_NAMES = ("--config", "-c", "--cluster")  # options whose value can be the name of a packaged file


def configs() -> Path:
    """Return the folder of the packaged configuration files."""
    inside = PACKAGE / "configs"
    return inside if inside.is_dir() else PACKAGE.parent / "configs"


def packaged(name: str) -> Path | None:
    """Find a packaged configuration file.

    Args:
        name: ``quickstart``, ``credit/grpo``, or its path in a checkout, ``configs/credit/grpo.yaml``.

    Returns:
        Its path; None if the package has no such file.
    """
    short = name.removeprefix("configs/").removesuffix(".yaml")
    place = configs() / f"{short}.yaml"
    inside = place.resolve().is_relative_to(configs().resolve())
    return place if inside and place.is_file() else None


def found(name: str) -> str:
    """Return the path of a configuration file: as given if it exists, else of the packaged file of that name.

    Raises:
        UserError: a bare name that is neither.
    """
    if name.startswith(("{", "[")) or "\n" in name:  # a config given as text
        return name
    if Path(name).exists() and not Path(name).is_dir():  # a pipe, too; a run directory can have a recipe's name
        return name
    place = packaged(name)
    if place is None and name and not Path(name).suffix:
        names = [str(file.relative_to(configs()).with_suffix("")) for file in configs().rglob("*.yaml")]
        raise UserError(
            f"{name}: no such file, and no packaged recipe{did_you_mean(name, names) or ';'} "
            "`gear-lightning recipes` lists these"
        )
    return name if place is None else str(place)


def with_packaged(arguments: list[str]) -> list[str]:
    """Replace names of packaged configuration files after ``--config``, ``-c`` and ``--cluster`` by their paths.

    Raises:
        UserError: see `found`.
    """
    given, replaced = iter(arguments), []
    for argument in given:
        option, equals, value = argument.partition("=")
        if equals and option in TAKE_NAMES:
            argument = f"{option}={found(value)}"
        replaced.append(argument)
        if argument in TAKE_NAMES and (value := next(given, None)) is not None:
            replaced.append(found(value))
    return replaced


def about(path: Path) -> str:
    """Return the first sentence of the comment that a configuration file begins with."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    text = " ".join(lines)
    return text.partition(". ")[0].partition("  gear-lightning")[0].rstrip(".: ")
