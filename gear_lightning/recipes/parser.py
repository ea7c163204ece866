"""The parser of the command line, and changes to jsonargparse, which has no settings for them."""

import inspect
import re
import sys
from typing import Any, NoReturn

import jsonargparse._typehints as typehints
import torch
from jsonargparse._util import import_object
from lightning.pytorch.cli import LightningArgumentParser, OptimizerCallable

from ..errors import UserError
from ..hints import close
from .options.tree import known_classes


class Parser(LightningArgumentParser):
    """A parser that accepts no abbreviated options."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print an error without the usage, whose hundreds of options would hide it; and where help is."""
        if not self.exit_on_error:
            super().error(message, ex)
        key = re.match(r'Parser key "([\w.]+)"', message)
        topic = "" if key is None or key[1] == "config" else f" {key[1]}"
        sys.stderr.write(f"tip: gear-lightning fit --help{topic}\nerror: {message}\n")
        self.exit(2)


def _forget_other_class(parser_or_action: Any, prev_val: Any, value: Any) -> None:
    """Make a class that replaces another one start from its own defaults.

    jsonargparse carries over every argument of the same name, including defaults
    (https://github.com/mauvilsa/jsonargparse/issues/460): RLSD would get GEAR's clip.

    An optimizer keeps options that were set for the previous optimizer if it has them too: the learning rate belongs to
    the recipe.
    """
    if prev_val and "init_args" in prev_val and prev_val["class_path"] != value["class_path"]:
        before, after = _optimizer_options(prev_val["class_path"]), _optimizer_options(value["class_path"])
        for key in list(prev_val["init_args"].keys()):
            known = key in before and key in after
            if not known or _same(prev_val["init_args"][key], before[key].default):
                prev_val["init_args"].pop(key)


def _optimizer_options(class_path: Any) -> dict[str, inspect.Parameter]:
    """Return the options of an optimizer class, or of a function that returns an `OptimizerCallable`, else none."""
    try:
        kind: Any = import_object(class_path)
        signature = inspect.signature(kind)
    except (ImportError, AttributeError, ValueError, TypeError):
        return {}  # jsonargparse reports the error
    optimizer = inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)
    return dict(signature.parameters) if optimizer or signature.return_annotation == OptimizerCallable else {}


def _same(given: Any, default: Any) -> bool:
    return list(given) == list(default) if isinstance(default, tuple) and given is not None else given == default


def _let_through_unions() -> None:
    """Make jsonargparse raise the `UserError` of a class for an option with a union type, for example a strategy.

    A strategy is a name or an object. By default jsonargparse reports the error of every type of the union, and keeps
    only the text of the errors. If the only other type is None, the message about None is left out, because it does not
    help.
    """
    refuse = typehints.raise_union_unexpected_value

    def raise_ours(subtypes: Any, val: Any, exceptions: list[Exception]) -> None:
        for error in exceptions:
            if isinstance(error, UserError):
                raise error
        if len(subtypes) == len(exceptions):
            of_values = [e for kind, e in zip(subtypes, exceptions, strict=True) if kind is not type(None)]
            if len(of_values) == 1:
                raise ValueError(str(of_values[0])) from of_values[0]
        refuse(subtypes, val, exceptions)

    typehints.raise_union_unexpected_value = raise_ours  # pyright: ignore[reportAttributeAccessIssue]


def _name_classes() -> None:
    """Make jsonargparse know all classes of this package by name, also those of modules that are not imported yet.

    If there is no such class, the error lists the known names.
    """
    resolve = typehints.resolve_class_path_by_name

    def resolve_or_list(cls: Any, name: str) -> str:
        found = resolve(cls, name)
        if "." in found:
            return found
        known = known_classes(f"{getattr(cls, '__module__', '')}.{getattr(cls, '__qualname__', '')}")
        if name in known:
            return known[name].path
        if not getattr(cls, "__module__", "").startswith("gear_lightning."):
            return found
        names = {path.rpartition(".")[2] for path in typehints.get_all_subclass_paths(cls)} | set(known)
        meant = close(name, names)
        question = ";" if meant is None else f"; did you mean {meant}?"
        there = ", ".join(sorted(names))
        raise ValueError(f"No class {name}{question} known by name are {there}; others by their import path")

    typehints.resolve_class_path_by_name = resolve_or_list


def install_hooks() -> None:
    """Change jsonargparse, once in a process."""
    if typehints.discard_init_args_on_class_path_change is not _forget_other_class:
        typehints.discard_init_args_on_class_path_change = _forget_other_class
        _let_through_unions()
        _name_classes()
