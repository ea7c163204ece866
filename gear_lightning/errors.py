"""The one exception type that the command line turns into a single readable line."""


class UserError(ValueError):
    """Something the user can mend: a bad file, key, path or combination of settings.

    The message says what was given, what is allowed and what to do. ``gear-lightning`` prints it without a traceback
    and exits with status 2.
    """


def require_extra(module: str, extra: str) -> None:
    """Check that an optional dependency can be imported.

    Args:
        module: importable module name, e.g. ``"peft"``.
        extra: the extra of this package that installs it.

    Raises:
        UserError: the module is not installed; names the command that installs it.
    """
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise UserError(f"'{module}' is not installed: pip install 'gear_lightning[{extra}]'")
