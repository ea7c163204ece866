"""Read credit rules from a command line, and the rule of a run from its ``config.yaml``."""

import json
from pathlib import Path
from typing import Any

from .. import advantage, credit
from ..credit import CreditAssigner
from ..errors import UserError
from ..hints import did_you_mean
from .options.values import check_keys


def read_rule(name: str, typed: list[str], run: Path) -> tuple[CreditAssigner, str]:
    """Create the rule that a command line names. Its options are read as ``fit`` reads those of ``--model.credit``.

    Args:
        name: one of `RULES`.
        typed: its arguments, as `split` returns them.
        run: a run directory; classes that a file in it names are not imported.

    Returns:
        The rule, and the import path of its class.

    Raises:
        UserError: there is no such rule or option, or a value is out of range.
        SystemExit: help was requested, and printed.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    known = ArgumentParser(prog="gear-lightning recredit", exit_on_error=False)
    known.add_argument(name, type=CreditAssigner, required=True)
    asked = [arg.partition("=")[2] for arg in typed if arg.startswith(f"{name}=")]
    helped = any(arg.startswith(f"{name}.help=") for arg in typed)
    if not helped:
        if len(asked) != 1:
            raise UserError(f"{name} names one rule: {', '.join(_names())}, an import path, or a YAML file")
        typed = [_start(name, asked[0], run), *(arg for arg in typed if not arg.startswith(f"{name}="))]
    try:
        found = known.parse_args(typed)
        return getattr(known.instantiate(found), name[2:]), found[name[2:]]["class_path"]
    except ArgumentError as error:
        raise UserError(f"{name}: {' '.join(str(error).split())}") from None
    except UserError:
        raise
    except Exception as error:  # the class may be a user's own
        raise UserError(f"{name}: {' '.join(f'{type(error).__name__}: {error}'.split())}") from error


def run_rule(run: Path, named: dict[str, type[CreditAssigner]]) -> tuple[CreditAssigner | None, str]:
    """Return the credit rule of a run from its ``config.yaml``. The file is untrusted: nothing it names is imported.

    Args:
        run: the run directory.
        named: import path -> class, for classes that the user has named.

    Returns:
        The rule and an empty text, or None and the reason why it is not known.
    """
    path = run / "config.yaml"
    try:
        found = _recipe(path)
    except UserError as error:
        return None, str(error)
    name, options = found["class_path"], found["init_args"]
    kind = named.get(name) or _of_ours(name)
    if kind is None:
        return None, f"{path} names {name}, which is not a class of gear_lightning.credit"
    if not all(value is None or isinstance(value, str | int | float) for value in options.values()):
        return None, f"{path} gives {name} options that are not plain values"
    try:
        return kind(**options), ""
    except Exception as error:
        return None, f"{path} gives {name} options that it does not accept: {error}"


def caveat(path: Any) -> str:
    """Return a line to show with results of a rule that does not implement all of its paper; empty if it does.

    Args:
        path: import path of the rule's class. Classes outside of this package are not imported and give no line.
    """
    kind = _of_ours(path) if isinstance(path, str) else None
    return (
        ""
        if kind is None or not kind.lacks
        else f"{kind.__name__} is in the style of its paper, and lacks {kind.lacks}."
    )


def caveat_of_run(run: Path) -> str:
    """Return `caveat` for a run's own rule, from its ``config.yaml``; empty if the rule is not known."""
    try:
        return caveat(_recipe(run / "config.yaml")["class_path"])
    except UserError:
        return ""


def _names() -> list[str]:
    return [name for name in credit.__all__ if name != "CreditAssigner" and _of_ours(f"gear_lightning.credit.{name}")]


def _of_ours(path: str) -> type[CreditAssigner] | None:
    """Return the class of `gear_lightning.credit` that an import path names, without importing anything, or None."""
    package, _, name = path.rpartition(".")
    found = getattr(credit, name, None) if f"{package}.".startswith("gear_lightning.credit.") else None
    return found if isinstance(found, type) and issubclass(found, CreditAssigner) else None


def _start(name: str, value: str, run: Path) -> str:
    """Return the argument that names a rule, for jsonargparse.

    Raises:
        UserError: there is no such class in this package; or the value is a file that names no class, or a file in the
            run directory that names a class of another package.
    """
    if value.endswith((".yaml", ".yml")):
        found = _recipe(Path(value))
        if found["class_path"] == "gear_lightning.credit.Uniform" and (other := _other_method(Path(value))):
            raise UserError(
                f"{name} {value}: its method is {other}, with the credit of GRPO; this command only recomputes token "
                f"weights (those of GRPO: {name} Uniform)"
            )
        if Path(value).resolve().is_relative_to(run.resolve()) and _of_ours(found["class_path"]) is None:
            raise UserError(
                f"{value} is in the run directory and names {found['class_path']}, which is imported only if you name "
                f"it on the command line: {name} {found['class_path']}"
            )
        return f"{name}={json.dumps(found, default=str)}"
    if "." in value or "{" in value:
        return f"{name}={value}"
    if value not in _names():
        meant = did_you_mean(value, _names())
        raise UserError(f"{name} {value}: not a class of gear_lightning.credit; there are {', '.join(_names())}{meant}")
    return f"{name}=gear_lightning.credit.{value}"


def _other_method(path: Path) -> str | None:
    """Return the distillation or the turn-level advantage that a file names; None if it names neither."""
    found = _yaml(path)
    distillation = _at(found, "model", "distillation", "class_path")
    if isinstance(distillation, str):
        return f"model.distillation={distillation.rpartition('.')[2]}"
    name = str(_at(found, "data", "advantage", "class_path")).rpartition(".")[2]
    kind = getattr(advantage, name, None)
    of_turns = getattr(kind, "of_turns", advantage.GroupAdvantage.of_turns)
    return None if of_turns is advantage.GroupAdvantage.of_turns else f"data.advantage={name}"


def _yaml(path: Path) -> Any:
    import yaml

    try:
        text = path.read_text()
        check_keys(yaml.compose(text, yaml.SafeLoader), str(path))
        return yaml.safe_load(text)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: invalid YAML ({' '.join(str(error).split())[:200]})") from None


def _at(found: Any, *keys: str) -> Any:
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _recipe(path: Path) -> dict[str, Any]:
    """Return ``model.credit`` of a YAML file as plain data.

    Raises:
        UserError: the file cannot be read, or names no rule.
    """
    found = _at(_yaml(path), "model", "credit")
    if not isinstance(found, dict) or not isinstance(found.get("class_path"), str):
        raise UserError(f"{path}: has no model.credit.class_path")
    options = found.get("init_args") or {}
    if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
        raise UserError(f"{path}: model.credit.init_args must map option names to values")
    return {"class_path": found["class_path"], "init_args": options}
