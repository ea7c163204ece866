"""What a mistyped name was probably meant to be."""

from collections.abc import Iterable
from difflib import get_close_matches

SHOWN = 25  # names in a list


def close(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known name that is most similar, without regard to case, dashes and underscores; None if none is."""
    plain = {_plain(one): one for one in known}
    found = get_close_matches(_plain(name), plain, 1, cutoff)
    return plain[found[0]] if found else None


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a question to append to an error message; empty if nothing is similar."""
    found = close(name, known)
    return "" if found is None else f"; did you mean {found}?"


def some(names: Iterable[str]) -> str:
    """Return names as a list, shortened if it is long."""
    names = list(names)
    return ", ".join(names if len(names) <= SHOWN else [*names[:SHOWN], f"... ({len(names)} in all)"])
