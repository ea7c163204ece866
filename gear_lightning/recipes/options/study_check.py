"""Check the keys of a study's file, and those of the recipe that its arms set."""

from pathlib import Path

import yaml

from ...errors import UserError
from ...hints import did_you_mean, some
from ..packaged import found
from .check import CONFIG, Check
from .signatures import signature
from .source import find
from .values import composed, text_of

STUDY = "gear_lightning.study.plan.Study"
FLAGS = ("report_only", "no_report_only", "plan", "no_plan", "config", "help", "print_config")


def check_study(arguments: list[str]) -> None:
    """Check the options of ``gear-lightning study``, and the keys of the files that it reads.

    Raises:
        UserError: a key or an option is unknown; names the file and the line.
    """
    kind = find(STUDY)
    assert kind is not None
    known = [*signature(kind).options]
    for place, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        name = option.removeprefix("--").partition(".")[0].removesuffix("+")
        if option.startswith("--") and name not in (*known, *FLAGS):
            raise UserError(
                f"{option}: there is no such option{did_you_mean(option, [f'--{one}' for one in (*known, *FLAGS)])}"
            )
        if option in CONFIG:
            _check_file(value if equals else arguments[place + 1], known)


def _check_file(name: str, known: list[str]) -> None:
    path = Path(name)
    if not path.is_file():
        return
    plan = composed(text_of(path), name)
    if not isinstance(plan, yaml.MappingNode):
        raise UserError(f"{name}: a study must have keys and values; they are {some(known)}")
    given = {}
    for key, value in plan.value:
        if key.value not in known:
            where = f"{name}:{key.start_mark.line + 1}: {key.value}"
            raise UserError(f"{where}: a study has no such key{did_you_mean(key.value, known) or _there(known)}")
        given[key.value] = value
    recipe = Check("fit")
    recipe.arguments([f"--config={one}" for one in _files(given.get("recipe"))])
    for key in ("options", "grid", "per_seed"):
        _check_options(recipe, given.get(key), name, many=key == "grid")
    arms = given.get("arms")
    for _, arm in arms.value if isinstance(arms, yaml.MappingNode) else ():
        _check_options(recipe.copy(), arm, name)


def _there(known: list[str]) -> str:
    return f"; it has {some(known)}"


def _files(node: yaml.Node | None) -> list[str]:
    items = node.value if isinstance(node, yaml.SequenceNode) else [] if node is None else [node]
    return [found(str(item.value)) for item in items if isinstance(item, yaml.ScalarNode)]


def _check_options(check: Check, node: yaml.Node | None, name: str, many: bool = False) -> None:
    """Check a mapping from options of ``fit`` to values; with ``many``, to lists of values."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        if key.value == "config":
            check.arguments([f"--config={one}" for one in _files(value)])
    for key, value in node.value:
        values = value.value if many and isinstance(value, yaml.SequenceNode) else [value]
        for one in values if key.value != "config" else ():
            if isinstance(one, yaml.ScalarNode):
                one.value = one.value.replace("{seed}", "0").replace("{block}", "0")  # as in the first run
            check.entry(key, one, name)
