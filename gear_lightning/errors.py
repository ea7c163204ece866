"""Errors that users can fix, which the command line prints in one line."""

import re


class UserError(ValueError):
    """An error that the user can fix: an invalid file, key, path or combination of options.

    The message says what was given, what is allowed and what to do. ``gear-lightning`` prints it without a traceback
    and exits with status 2.
    """


class Stopped(Exception):
    """Ends a run that was asked to stop, at a place that all processes agreed on. Not a failure.

    Attributes:
        status: exit status of the process: 75 if the same command can resume the run, 143 if nothing was saved.
    """

    def __init__(self, status: int = 128 + 15):
        super().__init__("the run was asked to stop")
        self.status = status


def printable(text: str) -> str:
    """Return text with visible control characters, so that text from files or policies cannot control the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else f"⟨U+{ord(c):04X}⟩" for c in text)


EXTRAS = {  # importable module -> the extra of this package that installs it
    "datasets": "datasets",
    "gguf": "gguf",
    "math_verify": "math-verify",
    "matplotlib": "study",
    "peft": "lora",
    "pyarrow": "datasets",
    "reasoning_gym": "reasoning-gym",
    "scipy": "study",
    "torchao": "torchao",
    "wandb": "wandb",
}


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """Return an install command if the import of an optional dependency failed; None for any other module."""
    named = re.findall(r"[\w.-]+", error.name or str(error))
    for module, extra in EXTRAS.items():
        if any(name.partition(".")[0].replace("-", "_") == module for name in named):
            return f"'{module}' is not installed: pip install 'gear_lightning[{extra}]'"
    return None


def one_line(error: BaseException | None) -> str | None:
    """Return a one-line message for a library error that users can fix, or for its cause; None for other errors."""
    seen: set[int] = set()  # a chain of errors can lead back to its start
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        kind = type(error)
        if isinstance(error, ModuleNotFoundError) and (advice := missing_extra(error)):
            return advice
        if kind.__module__.startswith("omegaconf"):
            return f"in the config: {str(error).splitlines()[0]}"
        if kind.__name__ == "MisconfigurationException":
            return " ".join(str(error).split())
        error = error.__cause__ or error.__context__
    return None


def require_extra(module: str) -> None:
    """Check that an optional dependency can be imported.

    Args:
        module: importable module name, a key of `EXTRAS`.

    Raises:
        UserError: the module is not installed; names the command that installs it.
    """
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise UserError(f"'{module}' is not installed: pip install 'gear_lightning[{EXTRAS[module]}]'")
