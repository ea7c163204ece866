"""Arguments of ``gear-lightning recredit`` that describe credit rules."""

from ..errors import UserError

RULES = ("--credit", "--against")


def split(argv: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Split a command line into arguments that do not describe rules, and those that do.

    Returns:
        The other arguments; and for each of `RULES` its arguments, as ``--credit=X`` or ``--credit.option=X``.

    Raises:
        UserError: an argument of a rule has no value.
    """
    others, rules, rest = [], {name: [] for name in RULES}, list(argv)
    while rest:
        key, equals, value = (arg := rest.pop(0)).partition("=")
        name = key.partition(".")[0]
        if name not in RULES:
            others.append(arg)
        elif equals or rest:
            rules[name].append(f"{key}={value if equals else rest.pop(0)}")
        else:
            raise UserError(f"{key}: the value is missing")
    return others, rules
